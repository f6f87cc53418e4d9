# make demo   train a small network to 95 % sparsity and write its report
# make test   the tests (make test-all: the slow ones too)
# make check  lint, format, types
# Each target makes .venv first and installs what it needs there; python3 is all that must be present.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check format clean

demo: $(VENV)/.installed-train
	$(BIN)/feather-kernels train --sparsity 0.95

test: $(VENV)/.installed-train-test-zoo
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/test_triton_compiled.py; \
	tests=$$?; $(BIN)/python tests/rings.py && exit $$tests

test-all: $(VENV)/.installed-train-test-zoo
	$(BIN)/python -m pytest --ignore=tests/test_triton_compiled.py
	$(BIN)/python tests/rings.py --all

check: $(VENV)/.installed-train-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-train-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# .installed-train-test-zoo installs the extras train, test and zoo; types are checked with what the recipe imports
$(VENV)/.installed-%: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install -e ".[$(subst -,$(comma),$*)]"
	touch $@

comma := ,
