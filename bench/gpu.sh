#!/bin/bash
# bench/gpu.sh OUTDIR: on a machine with a GPU, builds in place, runs the GPU tests and the kernel
# benchmarks. Writes logs and JSON into OUTDIR and prints a summary last. PYTHON names the Python
# (torch, triton, pytest, pytest-benchmark, setuptools, pybind11, ninja); at most about 9 minutes.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUTDIR}")
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
failed=0

# step NAME SECONDS COMMAND…: runs it into OUTDIR/NAME.log; a failure is kept for the summary
step() {
    local name=$1 seconds=$2 begin=$SECONDS status=ok
    shift 2
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
    summary+="$name: $status, $((SECONDS - begin)) s"$'\n'
    summary+="$(grep -E '^(FAILED|ERROR)|passed|failed|no tests ran' "$out/$name.log" | tail -15)"$'\n'
}

summary=""
{ nvidia-smi; "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)'; } \
    >"$out/machine.log" 2>&1
# Only the architecture that is here: the build is not to be shipped.
arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
TAB_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch step build 180 "$python" setup.py build_ext --inplace
step tests 200 "$python" -m pytest -m gpu -p no:cacheprovider tests
if [ -f bench/bench_kernels.py ]; then
    step bench 150 "$python" -m pytest bench/bench_kernels.py -p no:cacheprovider \
        --benchmark-json "$out/bench.json" --benchmark-columns=median,iqr,rounds
fi
tail -2 "$out/machine.log"
[ -f "$out/bench.log" ] && grep -E '^(test|bench)_|^Name' "$out/bench.log" | cut -c1-110
printf '%s' "$summary"
exit $failed
