#!/bin/bash
# bench/gpu.sh OUTDIR: everything that only a GPU can say, within 9 minutes; see bench/gpu_steps.py.
# PYTHON names the Python, which needs torch, triton and what `pip install .[test]` brings.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_steps.py" "$@"
