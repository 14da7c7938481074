#!/usr/bin/env bash
# The SHA-256 of every result file of one short run of each command that makes one, on the embedded
# models: run it before a change that should not change any result, and after it, and compare.
#
#     bash benchmarks/pins.sh /tmp/before > before.txt
#
# About three minutes on two cores. float32 throughout: sums are the same on CPUs with and without
# bf16 units. results.json and logs hold times, and are left out.
set -uo pipefail
out=${1:?usage: bash benchmarks/pins.sh FOLDER}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$out" || exit 1

run() { # run NAME MODULE FLAGS...
    local name=$1
    shift
    python -m "$@" --out "$name" --dtype float32 --overwrite > "${name%.jsonl}.log" 2>&1 ||
        echo "$name failed: $(tail -n 1 "${name%.jsonl}.log")"
}

windows=(--nsamples 8 --seqlen 128)
grid=(--wbits 4 --groupsize 64)
run gptq-w3 gptq tiny-llama stdlib --wbits 3 --groupsize 64 --true-sequential "${windows[@]}"
run gptq-w4-act-order gptq tiny-llama stdlib "${grid[@]}" --sym --act-order --static-groups \
    --format gptq "${windows[@]}"
run gptq-w4-dense gptq tiny-llama stdlib "${grid[@]}" --sym --format dense "${windows[@]}"
run rtn-w4 gptq tiny-llama --nearest "${grid[@]}"
run sparsegpt sparse.sparsegpt tiny-llama stdlib --sparsity .5 --true-sequential "${windows[@]}"
run sparsegpt-w4 sparse.sparsegpt tiny-llama stdlib --sparsity .5 --wbits 4 "${windows[@]}"
run wanda sparse.wanda tiny-llama stdlib --prunen 2 --prunem 4 "${windows[@]}"
run magnitude sparse.magnitude tiny-llama --sparsity .5 --format bitmask
run pruner-block sparse.llm_pruner tiny-llama stdlib --pruning_ratio .25 --block_wise \
    --taylor param_first --multiple 32
run pruner-channel sparse.llm_pruner tiny-llama stdlib --pruning_ratio .2 --channel_wise \
    --taylor param_mix --multiple 16
run clipped bitdistiller.autoclip tiny-llama stdlib --w_bit 3 --q_group_size 64 --n_samples 8 \
    --seqlen 128 --format dense
run blockwise bitdistiller.blockwise tiny-llama stdlib --bits 3 --group_size 64 "${windows[@]}"

steps=(--max_steps 2 --eval_steps 1 --micro_batch_size 2 --batch_size 4 --cutoff_len 64)
few=(--max_train_samples 12 --val_set_size 4)
run recover-lora sparse.recover pruner-channel --dataset stdlib-doc "${steps[@]}" "${few[@]}"
run recover-full sparse.recover sparsegpt --dataset stdlib --tune full --teacher tiny-llama \
    "${steps[@]}" "${few[@]}"
data=(--data stdlib-doc --train-num 12 --dev-num 4 --max-length 128 --max-prompt-length 96)
steps=(--batch-size 2 --total-iters 2 --eval-interval 1)
run sft minillm.finetune tiny-llama-student "${data[@]}" "${steps[@]}"
run kd minillm.finetune tiny-llama-student --type kd --teacher tiny-llama "${data[@]}" "${steps[@]}"
run cache minillm.cache_teacher tiny-llama "${data[@]}" --topk 16
run kd-cache minillm.finetune tiny-llama-student --type kd --teacher-cache cache "${data[@]}" \
    "${steps[@]}"
run minillm minillm.train_minillm tiny-llama-student --teacher tiny-llama "${data[@]}" \
    --lm-data stdlib "${steps[@]}" --num-rollouts 4 --chunk-size 4 --lm-num 8
run responses.jsonl minillm.generate tiny-llama "${data[@]:0:2}" --gen-num 6 --max-length 48 \
    --max-prompt-length 24
run qat bitdistiller.train tiny-llama --clip clipped --bits 3 --q_group_size 64 --data stdlib-doc \
    --max_train_samples 12 --model_max_length 64 --per_device_train_batch_size 2 --max_steps 2 \
    --eval_steps 1 --max_eval_samples 4 --learn all
run qat-packed bitdistiller.export qat
run answers.jsonl bitdistiller.generate tiny-llama --dataset stdlib --max_sample 4 \
    --engine transformers --max_new_tokens 8
run dense harness convert gptq-w3 --format dense
run unmasked harness convert magnitude --format dense

find . -type f \( -name '*.safetensors' -o -name '*.jsonl' -o -name 'tokenizer*' \
    -o -name 'config.json' \) -not -path '*.partial*' | LC_ALL=C sort | xargs sha256sum
