#!/bin/bash
# bench/gpu.sh OUTDIR: on a machine with a GPU, builds in place, runs the GPU tests and the kernel
# benchmarks; logs and JSON go to OUTDIR, a summary is printed last. At most about 9 minutes.
# PYTHON names the Python: torch, triton, pytest, pytest-benchmark, setuptools, pybind11, ninja.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUTDIR}")
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
failed=0 summary=""

# step NAME SECONDS COMMAND…: runs it into OUTDIR/NAME.log; a failure is kept for the summary
step() {
    local name=$1 seconds=$2 begin=$SECONDS status=ok
    shift 2
    timeout -s INT -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
    summary+="$name: $status, $((SECONDS - begin)) s"$'\n'
    summary+=$(grep -E '^(FAILED|ERROR|E  )|passed|failed' "$out/$name.log" | tail -20 | cut -c1-200)
    summary+=$'\n'
}

{ nvidia-smi; "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)'; } \
    >"$out/machine.log" 2>&1
# Only the architecture that is here: this build is not to be shipped.
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c \
        'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>>"$out/machine.log") ||
        { echo "no GPU: torch cannot name one (see $out/machine.log)"; exit 1; }
fi
export TAB_CUDA=1 TORCH_CUDA_ARCH_LIST
step build 150 "$python" setup.py build_ext --inplace
# Not installed, so the mapping kernels/ -> tab.kernels is a link for as long as this runs.
if [ ! -e tab/kernels ]; then
    ln -s ../kernels tab/kernels
    trap 'rm -f tab/kernels' EXIT
fi
# Test files that want hypothesis are left out, and named, where it is not installed.
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
if ! "$python" -c 'import hypothesis' 2>/dev/null; then
    mapfile -t without < <(grep -L 'hypothesis' "${files[@]}")
    summary+="no hypothesis here: $((${#files[@]} - ${#without[@]})) of ${#files[@]} files left out"$'\n'
    files=("${without[@]}")
fi
step tests 200 "$python" -m pytest -m gpu -p no:cacheprovider "${files[@]}"
if [ -f bench/bench_kernels.py ]; then
    step bench 170 "$python" -m pytest bench/bench_kernels.py -p no:cacheprovider --ops all \
        --sizes cifar,vision --budget 0.3 \
        --benchmark-json "$out/bench.json" --benchmark-columns=median,iqr,rounds
    grep -E '^test_throughput|^Name' "$out/bench.log" | cut -c1-110
fi
tail -1 "$out/machine.log"
printf '%s' "$summary"
exit $failed
