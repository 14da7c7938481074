#!/usr/bin/env bash
# BitDistiller from end to end: clip, let the dense model write its own training data, train at 2
# bits against it, pack; then perplexity, MMLU (or the embedded quiz) and tokens/s of the dense
# model, round-to-nearest, clipped round-to-nearest, GPTQ and BitDistiller in one table.
#   bash recipes/bitdistiller.sh                    the embedded tiny-llama, offline: 15 minutes
#   bash recipes/bitdistiller.sh MODEL              a hub id or a folder: the paper's data and settings
# What is there already is kept, and what was stopped goes on. Other widths, another domain:
#   BITS=3 QUANT_TYPE=nf3 bash recipes/bitdistiller.sh MODEL
#   DATASETS=code COUNTS=3000 EPOCHS=2 bash recipes/bitdistiller.sh WizardLM/WizardCoder-Python-7B
#   LAUNCH="torchrun --nproc-per-node 8 -m" bash recipes/bitdistiller.sh MODEL     training on 8 GPUs
set -euo pipefail
# Waiting threads sleep: spinning ones save a quarter on an idle CPU and cost double on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
model=${1:-tiny-llama}
bits=${BITS:-2}
group=${GROUP:-128}
kind=${QUANT_TYPE:-int}                 # int, or nf3 / nf4 (dense files only)
out=${OUT:-out/bitdistiller/$(basename "$model")-w$bits-g$group}
if [ "${model#tiny-llama}" != "$model" ]; then
    here=(stdlib stdlib,stdlib-doc "1500,300" transformers
        "--max_new_tokens 128 --batch_size 32 --temperature 1"
        "--learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 20 --model_max_length 256
         --per_device_train_batch_size 8 --max_steps 1000 --eval_steps 200
         --max_eval_samples 64 --train_on_inputs --learn all"
        stdlib "--choice stdlib-quiz" "--limit 300" "--n_samples 64 --seqlen 512")
else
    here=(pileval wikitext2,alpaca "3000,5000" vllm "" "--num_train_epochs ${EPOCHS:-4}
        --gradient_checkpointing --eval_steps 100" wikitext2 "--mmlu" "" "")
fi
calibration=${CALIBRATION:-${here[0]}}  # text for clipping and GPTQ
datasets=${DATASETS:-${here[1]}}        # whose prompts the model answers
counts=${COUNTS:-${here[2]}}            # how many of each
engine=${ENGINE:-${here[3]}}
generate_flags=${GENERATE_FLAGS:-${here[4]}}
train_flags=${TRAIN_FLAGS:-${here[5]}}
texts=${TEXTS:-${here[6]}}              # perplexity texts
questions=${QUESTIONS-${here[7]}}
eval_flags=${EVAL_FLAGS:-${here[8]}}
clip_flags=${CLIP_FLAGS:-${here[9]}}
gptq_flags=${GPTQ_FLAGS:-}              # e.g. "--nsamples 16"
launch=${LAUNCH:-python -m}
format=compressed-tensors
if [ "$kind" != int ]; then             # normal-float grids are not packed, and have none to learn
    format=dense train_flags=${train_flags/--learn all/}
fi
mkdir -p "$out"

# make NAME COMMAND...: unless it is there already. Several flags are split at spaces.
make() {
    local name=$1
    shift
    [ -e "$out/$name" ] || "$@" --out "$out/$name"
}

# 1. Ranges of the weights; the result is round-to-nearest within them.
make clipped python -m bitdistiller.autoclip "$model" "$calibration" --w_bit "$bits" \
    --q_group_size "$group" --quant_type "$kind" --format "$format" $clip_flags
# 2. What the dense model says to the prompts, a file per set, then mixed.
parts=()
IFS=, read -ra names <<< "$datasets"
IFS=, read -ra numbers <<< "$counts"
for i in "${!names[@]}"; do
    part=${names[$i]//[\/.]/_}.jsonl
    make "$part" python -m bitdistiller.generate "$model" --dataset "${names[$i]}" \
        --max_sample "${numbers[$i]}" --engine "$engine" $generate_flags
    parts+=("$out/$part")
done
make mix.jsonl python -m bitdistiller.mix "${parts[@]}"
# 3. Training against the dense model, from the clipped weights.
make trained $launch bitdistiller.train "$model" --clip "$out/clipped" --data "$out/mix.jsonl" \
    --bits "$bits" --q_group_size "$group" --quant_type "$kind" $train_flags
# 4. The file is the model.
make bitdistiller python -m bitdistiller.export "$out/trained" --format "$format"

# The others.
make rtn python -m gptq "$model" --nearest --wbits "$bits" --groupsize "$group"
make gptq python -m gptq "$model" "$calibration" --wbits "$bits" --groupsize "$group" --act-order \
    --true-sequential $gptq_flags
results=()
measure() { # measure MODEL NAME
    harness eval "$1" --ppl $texts $questions --speed $eval_flags --out "$out/results/$2.json" \
        --overwrite
    results+=("$out/results/$2.json")
}
measure "$model" dense
for name in rtn clipped gptq bitdistiller; do measure "$out/$name" "$name"; done

echo
harness compare "${results[@]}" --plot "$out/frontier.png" | tee "$out/table.md"
echo "table: $out/table.md"
