#!/usr/bin/env bash
# The whole house in one go, without a hub or a GPU: compress the embedded tiny-llama with
# round-to-nearest and with GPTQ at 4, 3 and 2 bits, measure every result, draw the frontier.
#   bash recipes/quickstart.sh [OUT]      results under OUT (default out/quickstart)
# Minutes on 2 CPU cores. Another model, other widths, less of everything; LIMIT=300 measures on the
# whole test split:
#   MODEL=tiny-llama-student BITS="4 3" NSAMPLES=16 LIMIT=50 bash recipes/quickstart.sh
set -euo pipefail
# Waiting threads sleep: spinning ones save a quarter on an idle CPU and cost double on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
out=${1:-out/quickstart}
model=${MODEL:-tiny-llama}
bits=${BITS:-4 3 2}
nsamples=${NSAMPLES:-128} # calibration windows of 512 tokens, the paper's number
limit=${LIMIT:-80}        # evaluation windows (the test split has 297) and quiz questions
mkdir -p "$out"

# Compress. A scale and a zero point per 128 weights, stored packed. GPTQ needs calibration text
# (a split of the standard library that the model was not trained on); round-to-nearest needs none.
results=("$out/$(basename "$model")-dense.json")
for w in $bits; do
    python -m gptq "$model" --nearest --wbits "$w" --groupsize 128 --out "$out/rtn-w$w" --overwrite
    python -m gptq "$model" stdlib --wbits "$w" --groupsize 128 --act-order --true-sequential \
        --nsamples "$nsamples" --out "$out/gptq-w$w" --overwrite
    results+=("$out/rtn-w$w/results.json" "$out/gptq-w$w/results.json")
done

# Measure: perplexity, multiple choice, speed; sizes are always measured. The numbers go to a JSON
# file, and into the model card of each result. Rounded to nearest, the same format runs as fast.
measure() {
    harness eval "$1" --ppl stdlib --choice stdlib-quiz --limit "$limit" --out "$2" --overwrite "${@:3}"
}
measure "$model" "${results[0]}" --speed
for w in $bits; do
    measure "$out/rtn-w$w" "$out/rtn-w$w/results.json"
    measure "$out/gptq-w$w" "$out/gptq-w$w/results.json" --speed
done

# Compare.
echo
harness compare "${results[@]}" --plot "$out/frontier.png" | tee "$out/table.md"
echo "table: $out/table.md"
