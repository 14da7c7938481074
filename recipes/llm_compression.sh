#!/usr/bin/env bash
# The whole of the project LLM_Compression: structured pruning at block and channel level,
# unstructured pruning at nine ratios, pruning twice, recovery, NF4 with double quantization after
# pruning; every point measured, plotted and, at the end, asked to write something.
#   bash recipes/llm_compression.sh                       the embedded tiny-llama, about 15 minutes
#   bash recipes/llm_compression.sh MODEL                 a hub id or a folder: wikitext2, ptb and c4
# A run that was stopped goes on where it was. Other texts, fewer points, less of everything:
#   OUT=out/mine TEXTS="a.txt b/" DATA=b/ RATIOS="50 70" LIMIT=40 bash recipes/llm_compression.sh MODEL
set -euo pipefail
# Waiting threads sleep: spinning ones save a quarter on an idle CPU and cost double on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
model=${1:-tiny-llama}
out=${OUT:-out/llm_compression/$(basename "$model")}
if [ "${model#tiny-llama}" != "$model" ]; then
    # NF4 on a CPU wants inputs that are multiples of 64 wide; there are 256 hidden channels in all.
    here=(stdlib stdlib stdlib 64 16 1 "--limit 60")
else
    here=("wikitext2 ptb c4" c4 alpaca 8 8 0 "")
fi
texts=${TEXTS:-${here[0]}}        # perplexity texts
data=${DATA:-${here[1]}}          # calibration text
recover=${RECOVER:-${here[2]}}    # text or instructions to recover on
minutes=${MINUTES:-${here[5]}}    # of recovery per model; 0: as many epochs as LLM-Pruner takes
recover_flags=${RECOVER_FLAGS:-}
eval_flags=${EVAL_FLAGS:-${here[6]}}
nsamples=${NSAMPLES:-64}          # calibration windows of SparseGPT
ratios=${RATIOS:-10 20 30 40 50 60 70 80 90}
block=${BLOCK:-25 40 50 60}
channel=${CHANNEL:-20 30 40 50}
twice=${TWICE:-30-50 50-70}       # first ratio, second ratio
healed=${HEALED:-block-25 block-50 channel-20} # what is recovered; the last also with a teacher
nf4=${NF4:-block-25-recovered block-50-recovered sparsegpt-50}
mkdir -p "$out"

# make NAME COMMAND...: unless it is there already. Several texts and flags are split at spaces.
make() {
    local name=$1
    shift
    [ -f "$out/$name/config.json" ] || "$@" --out "$out/$name"
}

results=()
measure() { # measure MODEL NAME [FLAG...]
    harness eval "$1" --ppl $texts --speed $eval_flags "${@:3}" --out "$out/results/$2.json"
    results+=("$out/results/$2.json")
}

# Structured: whole heads and channels go; the model is smaller and faster on any engine.
for r in $block; do
    make "block-$r" python -m sparse.llm_pruner "$model" "$data" --pruning_ratio ".$r" \
        --block_wise --taylor param_first --multiple "${here[3]}"
done
for r in $channel; do
    make "channel-$r" python -m sparse.llm_pruner "$model" "$data" --pruning_ratio ".$r" \
        --channel_wise --taylor param_first --multiple "${here[4]}"
done

# Unstructured: single weights become zero; fewer bytes with --format bitmask, no time saved.
for r in $ratios; do
    make "sparsegpt-$r" python -m sparse.sparsegpt "$model" "$data" --sparsity ".$r" \
        --nsamples "$nsamples"
done
# Twice, at rising ratios (at the same ratio the second time changes nothing).
for pair in $twice; do
    first=${pair%-*} second=${pair#*-}
    make "sparsegpt-$first" python -m sparse.sparsegpt "$model" "$data" --sparsity ".$first" \
        --nsamples "$nsamples"
    make "twice-$pair" python -m sparse.sparsegpt "$out/sparsegpt-$first" "$data" \
        --sparsity ".$second" --nsamples "$nsamples"
done

# Recovery: LoRA on the pruned model, merged; and once with the dense model as the teacher.
limit=()
[ "$minutes" = 0 ] || limit=(--max_minutes "$minutes")
for name in $healed; do
    make "$name-recovered" python -m sparse.recover "$out/$name" --dataset "$recover" \
        "${limit[@]}" $recover_flags
done
last=${healed##* }
make "$last-distilled" python -m sparse.recover "$out/$last" --dataset "$recover" \
    --teacher "$model" "${limit[@]}" $recover_flags

# Measure every point: perplexity, MACs, parameters, memory, generation latency.
measure "$model" dense
for r in $block; do measure "$out/block-$r" "block-$r"; done
for r in $channel; do measure "$out/channel-$r" "channel-$r"; done
for r in $ratios; do measure "$out/sparsegpt-$r" "sparsegpt-$r"; done
for pair in $twice; do measure "$out/twice-$pair" "twice-$pair"; done
for name in $healed; do measure "$out/$name-recovered" "$name-recovered"; done
measure "$out/$last-distilled" "$last-distilled"
# And quantized after pruning.
measure "$model" dense-nf4 --load nf4-dq
for name in $nf4; do measure "$out/$name" "$name-nf4" --load nf4-dq; done

echo
harness compare "${results[@]}" --plot "$out/frontier.png" --curve "$out/ratio.png" \
    --bubble "$out/bubble.png" | tee "$out/table.md"
echo "table: $out/table.md"

# The demo: dense and pruned models, side by side.
some=($ratios)
harness generate "$model" "$out/sparsegpt-${some[${#some[@]} / 2]}" "$out/$last" \
    "$out/$last-recovered" --max_new_tokens 48
