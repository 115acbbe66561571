# SPDX-License-Identifier: MIT
# Everything runs in .venv and build/; a second run does only what changed. Variables: PYTHON (makes .venv), JOBS,
# PYTEST_ARGS, CTEST_ARGS, DEMO_ARGS, BENCH_ARGS, FUZZ_SECONDS, NATTEN_CUDA (1 or 0: with the CUDA engines or
# without; default: with them where there is a GPU).
PYTHON ?= python3
JOBS ?= $(shell nproc 2> /dev/null || echo 2)
PYTEST_ARGS ?=
CTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 120

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
# Tests and demo use the installed package and its own library, never one from the caller's environment.
unexport NATTEN_LIBRARY PYTHONPATH PYTHONHOME

PY := .venv/bin/python
DONE := .venv/.done
SOURCES := $(shell find CMakeLists.txt cmake include src bindings python -type f -not -name '*.pyc' 2> /dev/null)
PIP := $(PY) -m pip --disable-pip-version-check
NATTEN_CUDA ?= $(if $(wildcard /dev/nvidia[0-9]* /dev/dxg),1,0)
export NATTEN_CUDA
NVCC := $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2> /dev/null)
FETCHED_NVCC := $(if $(strip $(NVCC)),,$(DONE)/nvcc)
NEEDED_NVCC := $(if $(filter 1,$(NATTEN_CUDA)),$(FETCHED_NVCC))
say = @printf '\n==> %s\n' "$(1)"

.PHONY: help demo test test-slow test-cpp test-python asan emulated bench compat gpu-pack mutate abi symbols
.PHONY: format format-check ruff lint budgets clean
help:
	@echo 'make demo       install what is missing, build, train a small network to segment photographs (demo.png)'
	@echo 'make test       the same, then all tests except the slow ones'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make asan       C++ tests and a bounded fuzz under AddressSanitizer and UBSan'
	@echo 'make compat     every name of older releases of the original: called and compared'
	@echo 'make emulated   C++ tests of the CUDA engines where there is no GPU: their kernels as C++, on fibers'
	@echo 'make mutate     break the operator on purpose: the tests must notice'
	@echo 'make abi        one built library under the oldest and the newest torch'
	@echo 'make gpu-pack   what tools/gpu_check.sh needs, built and copied into build/gpu, for a machine with a GPU'
	@echo 'make bench      CPU speed, beside other implementations: bench/results/cpu.json'
	@echo 'make format     rewrite sources in the house format;  make lint  check them, and the budgets'
	@echo 'make clean      remove build/ (and, with ALL=1, .venv)'

# --- what is installed ------------------------------------------------------------------------------------------------
$(DONE)/system-%:
	$(call say,System packages for: $*)
	PYTHON=$(PYTHON) bash tools/system_packages.sh $*
	@[ ! -d .venv ] || { mkdir -p $(DONE) && touch $@; }

$(DONE)/venv: requirements/build.txt | $(DONE)/system-demo
	$(call say,Python environment in .venv)
	[ -x $(PY) ] || $(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	$(PIP) install -r requirements/build.txt
	@mkdir -p $(DONE) && touch $(DONE)/system-demo $@

$(DONE)/dependencies-%: pyproject.toml tools/dependencies.py | $(DONE)/venv
	$(call say,Python packages for: $* (torch alone is gigabytes: the first time takes minutes))
	$(PY) tools/dependencies.py $* | sed '/^$$/d' > $(DONE)/$*.txt
	$(PIP) install -r $(DONE)/$*.txt
	@touch $@

$(DONE)/dev: requirements/dev.txt | $(DONE)/venv
	$(call say,Formatter and linter)
	$(PIP) install -r requirements/dev.txt
	@touch $@

# Not into .venv proper: the CUDA runtime that comes along is not the one that torch wants there.
$(DONE)/nvcc: requirements/cuda.txt | $(DONE)/venv
	$(call say,CUDA compiler from PyPI (300 MB))
	$(PIP) install --upgrade --target .venv/nvcc -r requirements/cuda.txt
	@touch $@

# Built in build/dev, which the C++ tests share; the wheel takes the library from there.
$(DONE)/natten: $(SOURCES) pyproject.toml | $(DONE)/venv $(DONE)/dependencies-demo $(NEEDED_NVCC)
	$(call say,Building and installing natten)
	$(PIP) install -v --no-build-isolation --no-deps --force-reinstall -C build-dir=build/dev .
	@touch $@

build/dev/.tests: FORCE | $(DONE)/system-test $(DONE)/natten
	$(call say,Building the C++ tests)
	cmake --preset dev > build/dev/configure.log || { cat build/dev/configure.log; exit 1; }
	cmake --build --preset dev

.PHONY: FORCE
FORCE:

# --- what is run ------------------------------------------------------------------------------------------------------
demo: $(DONE)/natten
	$(call say,Training the demo)
	$(PY) examples/segmentation/train.py $(DEMO_ARGS)

test-cpp: build/dev/.tests
	$(call say,C++ tests)
	ctest --preset dev --no-tests=error -j $(JOBS) $(CTEST_ARGS)

test-python: $(DONE)/natten $(DONE)/dependencies-test
	$(call say,Python tests)
	$(PY) -m pytest -rs -m "not slow" $(PYTEST_ARGS)

# The Python tests run even if the C++ tests fail: one run shows all that is wrong.
test: build/dev/.tests $(DONE)/natten $(DONE)/dependencies-test
	@status=0; \
	$(MAKE) --no-print-directory test-cpp || status=1; \
	$(MAKE) --no-print-directory test-python || status=1; \
	exit $$status

test-slow: $(DONE)/natten $(DONE)/dependencies-test
	$(call say,Slow Python tests)
	$(PY) -m pytest -rs -m slow $(PYTEST_ARGS)

# Without the tests that repeat a problem many times, which take long under sanitizers.
asan: | $(DONE)/system-test $(DONE)/venv
	$(call say,C++ tests and fuzz under ASan and UBSan)
	mkdir -p build/asan
	cmake --preset asan > build/asan/configure.log || { cat build/asan/configure.log; exit 1; }
	cmake --build --preset asan
	NATTEN_FUZZ_SECONDS=$(FUZZ_SECONDS) GTEST_FILTER='-*Determinism*:*Containment.Backward*' \
	  ctest --preset asan -R 'natten_(tests|fuzz)' --no-tests=error -j $(JOBS) $(CTEST_ARGS)

emulated: | $(DONE)/system-test $(DONE)/venv
	$(call say,C++ tests and fuzz of the CUDA engines on an emulated GPU)
	mkdir -p build/emulation
	cmake --preset emulation > build/emulation/configure.log || { cat build/emulation/configure.log; exit 1; }
	cmake --build --preset emulation
	NATTEN_FUZZ_SECONDS=$(FUZZ_SECONDS) ctest --preset emulation --no-tests=error -j $(JOBS) $(CTEST_ARGS)

bench: build/dev/.tests $(DONE)/natten $(DONE)/dependencies-test
	$(call say,CPU benchmark)
	$(PY) bench/cpu.py $(BENCH_ARGS)

compat: $(DONE)/natten $(DONE)/dependencies-test
	$(PY) -W ignore tools/compat_report.py

gpu-pack: | $(DONE)/venv $(FETCHED_NVCC)
	bash tools/gpu_pack.sh build/gpu

mutate: build/dev/.tests $(DONE)/dependencies-test
	bash tools/mutate.sh

abi: $(DONE)/natten
	bash tools/abi_matrix.sh

symbols: $(DONE)/natten
	bash tools/check_symbols.sh

format: $(DONE)/dev
	bash tools/check_format.sh --fix

format-check: $(DONE)/dev
	bash tools/check_format.sh

budgets: $(DONE)/venv
	$(PY) tools/check_budgets.py

ruff: $(DONE)/dev
	ruff check .

lint: format-check ruff budgets

clean:
	rm -rf build $(if $(ALL),.venv)
	rm -f $(DONE)/natten
