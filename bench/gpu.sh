#!/bin/bash
# bench/gpu.sh OUTDIR: on a machine with a GPU, builds in place, runs the GPU tests, the kernel
# benchmarks and a short comparison; logs, JSON and results go to OUTDIR, a summary is printed last.
# At most 9 minutes: each step has its share, and what it leaves goes to the later ones.
#   PYTHON   the Python: torch, triton, pytest, pytest-benchmark, setuptools, pybind11, ninja; for the
#            comparison also typer, rich, matplotlib
#   WHEELS   a folder of wheels of what it lacks: installed aside for as long as this runs
#   TAB_DATA what is trained on (tab compare --data); default: drawn pictures
#   DRY=1    prints the steps and runs nothing
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUTDIR}")
python=${PYTHON:-python3}
data=${TAB_DATA:-shapes:20000/2000}
[ -e "$data" ] && data=$(realpath "$data")
mkdir -p "$out"
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD" TAB_CUDA=1
total=540 failed=0 summary=""

# step NAME SECONDS COMMAND…: runs it into OUTDIR/NAME.log; a failure is kept for the summary
step() {
    local name=$1 seconds=$2 begin=$SECONDS status=ok
    shift 2
    if [ -n "${DRY:-}" ]; then
        echo "$name, $seconds s: $*"
        return
    fi
    timeout -s INT -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1 || { status="FAILED ($?)"; failed=1; }
    summary+="$name: $status, $((SECONDS - begin)) s"$'\n'
    summary+=$(grep -E '^(FAILED|ERROR|E  |error:)|passed|failed|ERROR SUMMARY' "$out/$name.log" |
        tail -20 | cut -c1-200)
    summary+=$'\n'
}

# share SECONDS RESERVE: those seconds, or what is left but for the reserve of later steps
share() {
    local left=$((total - SECONDS - $2))
    echo $(($1 < left ? $1 : left))
}

# lacks MODULE…: names those that Python cannot import
lacks() {
    [ -n "${DRY:-}" ] && return
    for module in "$@"; do "$python" -c "import $module" 2>/dev/null || echo "$module"; done
}

[ -n "${DRY:-}" ] ||
    { nvidia-smi; "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)'; } \
        >"$out/machine.log" 2>&1
# Only the architecture that is here: this build is not to be shipped.
if [ -z "${TORCH_CUDA_ARCH_LIST:-}${DRY:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$python" -c \
        'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>>"$out/machine.log") ||
        { echo "no GPU: torch cannot name one (see $out/machine.log)"; exit 1; }
    export TORCH_CUDA_ARCH_LIST
fi
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl \
        >>"$out/machine.log" 2>&1 || summary+="WHEELS: pip failed (see $out/machine.log)"$'\n'
    export PYTHONPATH="$PWD:$work/site"
fi
step build 150 "$python" setup.py build_ext --inplace
# Not installed, so the mapping kernels/ -> tab.kernels is a link for as long as this runs.
if [ ! -e tab/kernels ] && [ -z "${DRY:-}" ]; then
    ln -s ../kernels tab/kernels
    trap 'rm -rf "$work"; rm -f tab/kernels' EXIT
fi
# Test files that want hypothesis are left out, and named, where it is not installed.
mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
if [ -n "$(lacks hypothesis)" ]; then
    mapfile -t without < <(grep -L 'hypothesis' "${files[@]}")
    summary+="no hypothesis here: $((${#files[@]} - ${#without[@]})) of ${#files[@]} files left out"$'\n'
    files=("${without[@]}")
fi
step tests "$(share 220 200)" "$python" -m pytest -m gpu -p no:cacheprovider "${files[@]}"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer${DRY:-}" ]; then
    # Without the caching allocator each tensor has bounds of its own.
    step sanitizer 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" \
        --error-exitcode 9 "$python" -m pytest -q -x -m gpu -p no:cacheprovider \
        tests/test_triton.py tests/test_cuda_small.py \
        -k 33-64-dtype0
else
    summary+="no compute-sanitizer here"$'\n'
fi
missing=$(lacks typer rich matplotlib torchvision | tr '\n' ' ')
if [ -n "$missing" ]; then
    summary+="study left out: no ${missing}here; WHEELS=FOLDER names a folder of their wheels"$'\n'
else
    # Two epochs: the first compiles and captures, the last is what counts.
    step study "$(share 150 70)" "$python" -m tab compare \
        --recipe document --epochs 2 --data "$data" --device cuda --out "$work/study"
    if [ -f "$work/study/experiment_results.csv" ]; then
        summary+=$("$python" bench/images_per_second.py "$work/study")$'\n'
        tar -C "$work" --exclude '*.pt' --exclude lock -czf "$out/study.tgz" study
    fi
fi
step bench "$(share 170 5)" "$python" -m pytest bench/bench_kernels.py -p no:cacheprovider --ops all \
    --sizes cifar,vision --budget 0.2 \
    --benchmark-json "$out/bench.json" --benchmark-columns=median,iqr,rounds
[ -f "$out/bench.log" ] && grep -E '^test_throughput|^Name' "$out/bench.log" | cut -c1-110
[ -n "${DRY:-}" ] || tail -1 "$out/machine.log"
printf '%s' "$summary"
exit $failed
