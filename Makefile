# `make demo` and `make test` each set up what they need, in .venv of this folder, and do it once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# The CPU build of PyTorch where there is no GPU; on a machine with GPUs, pip's own choice, the CUDA build.
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	nvidia-smi -L >/dev/null 2>&1 || $(BIN)/pip install --quiet --no-deps --retries 0 --extra-index-url $(CPU_INDEX) $(CPU_TORCH)
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

.PHONY: setup
setup: $(READY) ## Make .venv with hft in it

.PHONY: demo
demo: $(READY) ## Fine-tune the built-in model and show what it learned and forgot
	$(BIN)/hft sft --output runs/demo-$$(date +%Y%m%d-%H%M%S)

.PHONY: test
test: $(READY) lint ## Run the tests that take less than ten minutes, on all cores
	$(BIN)/pytest -n auto --dist loadfile -m 'not slow'

.PHONY: test-slow
test-slow: $(READY) ## Run the longer tests
	$(BIN)/pytest -m slow

.PHONY: test-faults
test-faults: $(READY) ## Kill, stop, starve and damage runs, dozens of times
	$(BIN)/pytest -s tests/training/test_steps.py $(addprefix tests/end_to_end/,test_faults.py test_signals.py test_many_faults.py)

.PHONY: check-gpu
check-gpu: $(READY) ## Check this machine's GPU in eight minutes; ARGS=--rehearse on a CPU, ARGS="--steps a,d" a part
	$(BIN)/python scripts/check_gpu.py $(ARGS)

.PHONY: lint
lint: $(READY) ## Check style and types
	$(BIN)/ruff check hftcli tests scripts
	$(BIN)/ruff format --check hftcli tests scripts
	$(BIN)/mypy

.PHONY: clean
clean: ## Remove .venv and caches; runs are kept
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache
