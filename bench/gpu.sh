#!/bin/bash
# bench/gpu.sh OUTDIR: on a machine with a GPU, builds in place, runs the GPU tests, the kernel
# benchmarks and a short comparison; logs, JSON and results go to OUTDIR, a summary is printed last.
# At most 9 minutes: each step has its share, and what it leaves goes to the later ones.
#   PYTHON   the Python: torch, triton, pytest, pytest-benchmark, setuptools, pybind11, ninja; for the
#            comparison also typer, rich, matplotlib, torchvision, scipy, markdown-it-py
#   WHEELS   a folder of wheels of what it lacks: installed aside for as long as this runs
#   TAB_DATA what is trained on (tab compare --data); default: drawn pictures
#   MOST     no step takes longer than these seconds
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
trap 'failed=1; exit 1' INT TERM  # the summary comes last then too
# ninja must be on the PATH, be it beside this Python or of WHEELS: without it the build is serial.
export PYTHONPATH="$PWD" TAB_CUDA=1
export PATH="$work/site/bin:$(dirname "$(command -v "$python" || echo .)"):$PATH"
total=520 failed=0 summary=""  # and ten seconds each for what has to be killed

# beside NAME SECONDS COMMAND…: starts it, into OUTDIR/NAME.log; `together` waits for all of them and
# keeps what they say for the summary.
waiting=()
beside() {
    local name=$1 seconds=$2
    shift 2
    if [ -n "${DRY:-}" ]; then
        echo "$name, $seconds s: $*"
        return
    fi
    ((seconds > ${MOST:-seconds})) && seconds=$MOST
    if ((seconds < 1)); then
        summary+="$name: left out, no time left"$'\n' failed=1
        return
    fi
    # What bash starts in the background ignores SIGINT, which is to end it with its results.
    timeout -s INT -k 10 "$seconds" env --default-signal=INT "$@" >"$out/$name.log" 2>&1 &
    waiting+=("$name $! $SECONDS")
}
together() {
    local each name pid begin status
    for each in "${waiting[@]}"; do
        read -r name pid begin <<<"$each"
        wait "$pid"
        status=$?
        case $status in
            0) status=ok ;;
            124 | 137) status="CUT, out of time" failed=1 ;;
            *) status="FAILED ($status)" failed=1 ;;
        esac
        summary+="$name: $status, $((SECONDS - begin)) s"$'\n'
        summary+=$(grep -E '^(FAILED|ERROR|E  |error:)|passed|failed|ERROR SUMMARY' "$out/$name.log" |
            tail -20 | cut -c1-200)
        summary+=$'\n'
    done
    waiting=()
}
step() {
    beside "$@"
    together
}

# last: the table of the benchmark, as far as it came, and the summary
last() {
    for pid in $(jobs -p); do kill -KILL -- "$pid" 2>/dev/null; done
    [ -n "${DRY:-}" ] && return
    [ -f "$out/bench.log" ] && grep -E '^test_throughput|^Name' "$out/bench.log" | cut -c1-110
    tail -1 "$out/machine.log"
    printf '%s' "$summary"
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
trap 'last; rm -rf "$work"' EXIT
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
missing=$(lacks setuptools pybind11 pytest pytest_benchmark triton | tr '\n' ' ')
[ -n "$missing" ] && summary+="no ${missing}here: what needs it will fail"$'\n'
[ -n "${DRY:-}" ] || command -v ninja >/dev/null || summary+="no ninja here: a slow build"$'\n'
step build 150 "$python" setup.py build_ext --inplace
# Not installed, so the mapping kernels/ -> tab.kernels is a link for as long as this runs.
if [ ! -e tab/kernels ] && [ -z "${DRY:-}" ]; then
    ln -s ../kernels tab/kernels
    trap 'last; rm -rf "$work"; rm -f tab/kernels' EXIT
fi
# Test files that want hypothesis are left out, and named, where it is not installed.
mapfile -t files < <(grep -l 'mark\.gpu' tests/*/test_*.py)
if [ -n "$(lacks hypothesis)" ]; then
    mapfile -t without < <(grep -L 'hypothesis' "${files[@]}")
    summary+="no hypothesis here: $((${#files[@]} - ${#without[@]})) of ${#files[@]} files left out"$'\n'
    files=("${without[@]}")
fi
# A process for each file: most of the time goes into compiling kernels, on one core.
seconds=$(share 220 200)
for file in "${files[@]}"; do
    name=${file#tests/} name=${name%.py} name=${name/\/test_/_}
    pytest=(env TORCHINDUCTOR_COMPILE_THREADS=2 "$python" -m pytest -m gpu -p no:cacheprovider)
    if [ "$name" = ops_triton_gpu ]; then  # the longest
        beside "${name}_performer" "$seconds" "${pytest[@]}" -k performer "$file"
        beside "$name" "$seconds" "${pytest[@]}" -k "not performer" "$file"
    else
        beside "$name" "$seconds" "${pytest[@]}" "$file"
    fi
done
together
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer${DRY:-}" ]; then
    # Without the caching allocator each tensor has bounds of its own.
    step sanitizer 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" \
        --error-exitcode 9 "$python" -m pytest -q -x -m gpu -p no:cacheprovider \
        tests/ops/test_triton_gpu.py tests/cuda/test_ops.py \
        -k 33-64-dtype0
else
    summary+="no compute-sanitizer here"$'\n'
fi
missing=$(lacks typer rich matplotlib torchvision scipy markdown_it | tr '\n' ' ')
if [ -n "$missing" ]; then
    summary+="study left out: no ${missing}here; WHEELS=FOLDER names a folder of their wheels"$'\n'
else
    # Two epochs: the first compiles and captures, the last is what counts.
    step study "$(share 150 70)" "$python" -m tab compare \
        --recipe document --epochs 2 --data "$data" --device cuda --out "$work/study"
    if [ -f "$work/study/experiment_results.csv" ]; then
        summary+=$("$python" bench/images_per_second.py "$work/study")$'\n'
    fi
    [ -d "$work/study" ] && tar -C "$work" --exclude '*.pt' --exclude lock -czf "$out/study.tgz" study
fi
step bench "$(share 170 5)" "$python" -m pytest bench/bench_kernels.py -p no:cacheprovider --ops all \
    --sizes cifar,vision --budget 0.2 \
    --benchmark-json "$out/bench.json" --benchmark-columns=median,iqr,rounds
exit $failed
