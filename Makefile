# make demo   train a small network to 95 % sparsity and write its report
# make test   the tests (make test-all: the slow ones too)
# make check  lint, format, types (make format: apply the fixes)
# make check-native  the C++ kernels' own tests under AddressSanitizer, UBSan and ThreadSanitizer
# make bench  measures every case on the CPU (about 25 minutes) and checks the bars; see benchmarks/README.md
# make check-build   installs in scratch environments, with and without a compiler
# make experiments   feather, its rivals and dense training on the digits, in about ten minutes; see docs/experiments
# make mutants   mutation test of the GPU kernels and of csrc; see docs/gpu-mutants.md
# make gpu-check     everything that needs a GPU, into results/gpu-DATE-NAME; see docs/gpu-check.md
# Each target makes .venv first and installs what it needs there; python3 is all that must be present.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo experiments test test-all check check-native check-build bench mutants gpu-check format clean

demo: $(VENV)/.installed-train
	$(BIN)/feather-kernels train --sparsity 0.95

experiments: $(VENV)/.installed-train
	$(BIN)/feather-kernels compare docs/experiments/digits.toml --jobs 2

# these run as evidence of their own (compiled, sanitized source, shipped build), and in check-build
OWN_RUNS := $(addprefix --ignore=tests/,$(addprefix simulated_gpu/test_,triton_compiled.py sanitized_source.py shipped_build.py) repository/test_build.py)

test: $(VENV)/.installed-train-test-zoo-peers
	$(BIN)/python -m pytest -m "not slow" $(OWN_RUNS); \
	tests=$$?; $(BIN)/python -m tests.simulated_gpu.evidence && exit $$tests

test-all: $(VENV)/.installed-train-test-zoo-peers
	$(BIN)/python -m pytest $(OWN_RUNS)
	$(BIN)/python -m tests.simulated_gpu.evidence --all

check: $(VENV)/.installed-train-test-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks bars

mutants: $(VENV)/.installed-train-test-zoo-dev
	$(BIN)/python -m tests.mutation.runner

gpu-check: $(VENV)/.installed-train-test-zoo-bench
	$(BIN)/python -m tests.gpu.gpu_check $(if $(NAME),--name "$(NAME)")

check-native: build/check-address build/check-thread

# no Python and no torch: csrc/ and its tests (ctest)
build/check-address: SANITIZE := address,undefined
build/check-thread: SANITIZE := thread
.PHONY: build/check-address build/check-thread
build/check-address build/check-thread: $(VENV)/.installed-train-dev
	$(BIN)/cmake -S . -B $@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFEATHER_SANITIZE=$(SANITIZE) -DFEATHER_WERROR=ON
	$(BIN)/cmake --build $@
	$(BIN)/ctest --test-dir $@ --output-on-failure

check-build: $(VENV)/.installed-train-test-zoo-peers
	$(BIN)/python -m pytest tests/repository/test_build.py

format: $(VENV)/.installed-train-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# a module built from other sources than these is refused
NATIVE := CMakeLists.txt $(shell find csrc -type f)

# .installed-train-test-zoo-peers installs the extras train, test, zoo and peers; types are checked with what the code imports
$(VENV)/.installed-%: pyproject.toml setup.py $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install -e ".[$(subst -,$(comma),$*)]"
	touch $@

comma := ,
