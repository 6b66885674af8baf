# Each target does all its own set-up: `make compare` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# The tests start hundreds of processes: each would compile all of TAB's Python anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup compare test lint docs bench kernels oldest two-torch sanitize installs aarch64 clean

# What the tests need beside TAB itself, Ray among it; compiled is only what they import.
setup: $(READY)

# torch comes first, so that the extensions are built against the one that runs them.
$(BUILT): $(SOURCES)
	@echo "Setting up .venv, once: PyTorch (6 GB), then the CPU kernels; about 4 minutes on two cores."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11" "torchvision>=0.26" "setuptools>=77" wheel pybind11 ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(READY): $(BUILT)
	@echo "What the tests need: a minute."
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	    print(*extras['optional-dependencies']['test'], sep='\n')" > $(VENV)/test.txt
	$(BIN)/python -m pip install --quiet --no-compile --requirement $(VENV)/test.txt
	touch $@

# The main job: twelve mechanisms × two models, trained, compared and reported.
compare: $(BUILT)
	$(BIN)/tab compare --recipe quick --data shapes

# Two at a time, each on one thread; who has done his half takes from the other's.
test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m pytest -m "not compiles" --numprocesses 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*/*.* tests/support/*.h tests/support/*.cpp tests/support/ptx/*.h tests/support/ptx/*.cpp)

# The documentation as a site, in build/site; a dead link or an unknown name is an error.
docs: $(BUILT)
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	    print(*extras['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Throughput of the ops against what you could run instead; SIZES and OPS as in bench/conftest.py.
bench: setup
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# Compiles every Triton kernel for sm_80, sm_90, sm_100, prints what each needs, and holds it to the
# limits; runs the PTX of sm_80 on the CPU and reads the machine code of sm_90; no GPU needed. The
# tests find in Triton's cache what was compiled for the report: of each kernel the launch that asks
# for most. TAB_EVERY_LAUNCH=1 takes all that its file names, before a release.
PTX := tests/ops/test_ptx*.py tests/ops/test_assembled.py

kernels: setup
	$(BIN)/tab doctor --kernels --arch all $(if $(TAB_EVERY_LAUNCH),--every-launch)
	$(BIN)/python -m pytest -m compiles tests/ops/test_triton.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m pytest -m compiles --numprocesses 2 --dist worksteal $(PTX)

# One wheel, built on the installed torch, must pass the op tests on the oldest torch it is for; the
# Triton that came with that one (3.6) must interpret and compile every kernel. Its interpreter turns
# arrays into numbers in a way that NumPy has since dropped.
OLD := .venv-oldest
OPS := tests/ops tests/layers/test_masks.py tests/layers/test_state.py tests/train/test_step.py

oldest: $(OLD)/.ready

$(OLD)/.ready: Makefile
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --upgrade pip
	$(OLD)/bin/python -m pip install --quiet --no-compile "torch==2.11.*" "torchvision==0.26.*" \
	    "numpy<2.3" pytest pytest-xdist hypothesis expecttest
	touch $@

# PYTHONSAFEPATH: it is the installed wheel that is tested, not the folder where this runs. Both
# variables also reach the tests that run in processes of their own. What a kernel computes, the tests
# marked each_isa, no torch decides: that the op of each backend is called right, test_features.py says.
# Of each form of a Triton kernel one launch is compiled: what its launches differ in beside is sizes,
# and which arguments are None.
two-torch: setup oldest
	rm -rf dist build/lib*
	TAB_CPP=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(OLD)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(OLD)/bin/python -m pip install --quiet dist/*.whl
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1 \
	    PYTEST_ADDOPTS='-m "not any_torch and not each_isa and not compiles"' \
	    $(OLD)/bin/python -m pytest --numprocesses 2 --dist worksteal $(OPS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1 TAB_FORMS=1 \
	    $(OLD)/bin/python -m pytest --numprocesses 2 --dist worksteal -m compiles \
	    tests/ops/test_triton.py

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
# Python is not built with them, so their libraries come first; what Python never frees is no leak.
# The instruction sets run side by side, each with two threads: who waits must leave the core free.
sanitize: setup
	TAB_SANITIZE=1 TAB_CPP=1 TAB_CUDA=0 $(BIN)/python setup.py --quiet build --build-lib build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	PYTHONPATH=build/sanitize $(BIN)/python tests/support/sanitized.py

# Every way to install TAB, each in a fresh environment; WAYS="wheel clang" for some of them.
installs: setup
	$(BIN)/python tests/support/installs.py $(WAYS)

# The C++ kernels, cross-compiled for aarch64, run under qemu against the references in float64.
aarch64: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/foreign.py

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info tab/*.so
