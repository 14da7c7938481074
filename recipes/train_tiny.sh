#!/usr/bin/env bash
# Makes the embedded models from the running Python's standard library, and measures them.
#   bash recipes/train_tiny.sh [cpu|cuda] [WORK]        about 1 hour on 2 free CPU cores
# Copy WORK/tiny-llama and WORK/tiny-llama-student to harness/src/harness/assets/ to ship them.
set -euo pipefail
# Waiting threads sleep: spinning ones save a quarter on an idle CPU and cost double on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
device=${1:-cpu}
work=${2:-out/train}
here=$(dirname "$0")

# glibc hands large buffers back to the system after each use; keeping them saves a third of the time.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
export MALLOC_TOP_PAD_=536870912

python "$here/train_tiny.py" prepare "$work"
python "$here/train_tiny.py" train "$work" tiny-llama --device "$device" --epochs 4.5 --dropout 0.1
python "$here/train_tiny.py" train "$work" tiny-llama-student --device "$device" --epochs 3 \
    --lr 0.01 --dropout 0
python "$here/train_tiny.py" evaluate "$work" tiny-llama --device "$device"
python "$here/train_tiny.py" evaluate "$work" tiny-llama-student --device "$device"
