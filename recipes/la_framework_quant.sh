#!/usr/bin/env bash
# The quantization rows of LA-Framework's table: every model dense, then with GPTQ at 4 bits (one
# asymmetric grid per row, calibrated on c4), by perplexity on c4 and wikitext2 and by MMLU with
# LLMCBench's prompt.
#   bash recipes/la_framework_quant.sh                    gpt2, opt-350m and opt-125m from the hub
#   bash recipes/la_framework_quant.sh MODEL...           others: hub ids or folders
# Without the hub, on texts of your own (a folder with train* and test* files):
#   DATA=texts/ TEXTS=texts/ MMLU=mmlu/ bash recipes/la_framework_quant.sh my-model/
set -euo pipefail
out=${OUT:-out/la_framework_quant}
data=${DATA:-c4}                # calibration text
texts=${TEXTS:-c4 wikitext2}    # perplexity texts
mmlu=${MMLU:-}                  # folder with dev/ and test/ CSV files; none: from the hub
gptq_flags=${GPTQ_FLAGS:-}      # e.g. "--nsamples 16"
eval_flags=${EVAL_FLAGS:-}      # e.g. "--limit 200 --device cpu"
[ $# -gt 0 ] || set -- gpt2 facebook/opt-350m facebook/opt-125m
mkdir -p "$out"

measure() { # several texts and flags are split at spaces: no quotes around them
    harness eval "$1" --ppl $texts --mmlu ${mmlu:+"$mmlu"} --mmlu-prompt llmcbench \
        $eval_flags --out "$2"
}

results=()
for model; do
    name=$(basename "$model")
    measure "$model" "$out/$name.json"
    python -m gptq "$model" "$data" --wbits 4 $gptq_flags --out "$out/$name-w4" --overwrite
    measure "$out/$name-w4" "$out/$name-w4/results.json"
    results+=("$out/$name.json" "$out/$name-w4/results.json")
done

echo
echo "Measured here:"
harness compare "${results[@]}"
cat <<'TABLE'

Published by LA-Framework:
| model       | PPL c4 | PPL wikitext2 | MMLU % |
|-------------|-------:|--------------:|-------:|
| gpt2        | 29.706 |        29.951 |  22.99 |
| gpt2-w4     | 32.029 |        33.149 |  23.02 |
| opt-350m    | 20.929 |        22.005 |  24.18 |
| opt-350m-w4 | 22.846 |        24.022 |  23.84 |
| opt-125m    | 24.714 |        27.653 |  22.90 |
| opt-125m-w4 | 27.346 |        31.069 |  24.17 |
TABLE
