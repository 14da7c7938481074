#!/usr/bin/env bash
# LA-Framework's whole table: every model dense and with GPTQ at 4 bits (one asymmetric grid per
# row, calibrated on c4), and a student distilled from a teacher (SFT, then MiniLLM on dolly); by
# perplexity on c4 and wikitext2 and by MMLU with LLMCBench's prompt.
#   bash recipes/la_framework.sh               gpt2, opt-350m and opt-125m from the hub
#   bash recipes/la_framework.sh MODEL...      others: hub ids or folders
#   bash recipes/la_framework.sh --embedded    tiny-llama and its student, without the hub: 10 minutes
# Another pair, or none; on texts of your own (a folder with train* and test* files):
#   DISTIL="gpt2-xl gpt2" bash recipes/la_framework.sh gpt2
#   DISTIL= DATA=texts/ TEXTS=texts/ MMLU=mmlu/ bash recipes/la_framework.sh my-model/
# Distillation that was stopped goes on where it was.
set -euo pipefail
# Waiting threads sleep: spinning ones save a quarter on an idle CPU and cost double on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
out=${OUT:-out/la_framework}
if [ "${1:-}" = --embedded ]; then
    shift
    [ $# -gt 0 ] || set -- tiny-llama tiny-llama-student
    here=(stdlib stdlib "--choice stdlib-quiz" "tiny-llama tiny-llama-student" stdlib-doc stdlib
        "--enable-sft-teacher")
else
    [ $# -gt 0 ] || set -- gpt2 facebook/opt-350m facebook/opt-125m
    here=(c4 "c4 wikitext2" "--mmlu ${MMLU:-} --mmlu-prompt llmcbench"
        "facebook/opt-350m facebook/opt-125m" dolly wikitext2 "")
fi
data=${DATA:-${here[0]}}                # calibration text
texts=${TEXTS:-${here[1]}}              # perplexity texts
pair=(${DISTIL-${here[3]}})             # teacher and student
instructions=${INSTRUCTIONS:-${here[4]}} # what the student is distilled on
plain=${PLAIN:-${here[5]}}              # plain text for MiniLLM's language-modelling part
gptq_flags=${GPTQ_FLAGS:-}              # e.g. "--nsamples 16"
eval "distil_flags=(${DISTIL_FLAGS:-${here[6]}})" # quotes count: "--sft '--epochs 3 --lr 5e-5'"
eval_flags=${EVAL_FLAGS:-}              # e.g. "--limit 200 --device cpu"
mkdir -p "$out"

results=()
measure() { # several texts and flags are split at spaces: no quotes around them
    harness eval "$1" --ppl $texts ${here[2]} $eval_flags --out "$2"
    results+=("$2")
}

for model; do
    name=$(basename "$model")
    measure "$model" "$out/$name.json"
    python -m gptq "$model" "$data" --wbits 4 $gptq_flags --out "$out/$name-w4" --overwrite
    measure "$out/$name-w4" "$out/$name-w4/results.json"
done
if [ ${#pair[@]} -gt 0 ]; then
    name=$(basename "${pair[0]}")-to-$(basename "${pair[1]}")
    python -m minillm.distill "${pair[@]}" --data "$instructions" --lm-data "$plain" \
        "${distil_flags[@]}" --out "$out/distilled"
    measure "$out/distilled/minillm" "$out/$name.json"
fi

echo
echo "Measured here:"
harness compare "${results[@]}"
cat <<'TABLE'

Published by LA-Framework:
| model                | PPL c4 | PPL wikitext2 | MMLU % |
|----------------------|-------:|--------------:|-------:|
| gpt2                 | 29.706 |        29.951 |  22.99 |
| gpt2-w4              | 32.029 |        33.149 |  23.02 |
| opt-350m             | 20.929 |        22.005 |  24.18 |
| opt-350m-w4          | 22.846 |        24.022 |  23.84 |
| opt-125m             | 24.714 |        27.653 |  22.90 |
| opt-350m-to-opt-125m | 25.556 |        29.919 |  22.96 |
| opt-125m-w4          | 27.346 |        31.069 |  24.17 |
TABLE
