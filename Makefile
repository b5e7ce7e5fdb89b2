# `make` alone lists what there is.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
EXTRAS ?= langchain,dev
PIP_FLAGS ?=
ARGS ?=
WORKERS ?= auto --maxprocesses 4

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all check format packaging clean

help: ## List these targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Settings, given as \`make venv NAME=value\`:"
	@echo "  PYTHON       interpreter for the environment, 3.11 or newer (python3)"
	@echo "  CONSTRAINTS  file of versions to install (constraints.txt); empty: the newest that pyproject.toml allows"
	@echo "  EXTRAS       extras to install ($(EXTRAS))"
	@echo "  PIP_FLAGS    more flags for pip, such as an extra index with another PyTorch build"
	@echo "  WORKERS      processes that run tests side by side ($(WORKERS)); 0 for none but pytest's own"
	@echo "  ARGS         more arguments for pytest, such as ARGS='-k retrieval'"
	@echo
	@echo "torch is whatever build pip finds; PyPI's one for Linux runs on CUDA GPUs. For PyTorch's CPU build or"
	@echo "another CUDA version, look up the index on pytorch.org's install page and pass it in PIP_FLAGS as"
	@echo "--extra-index-url, or install that torch into .venv first: a version that fits is left alone."

venv: $(STAMP) ## Create .venv and install the package in it, editable, with the tested versions

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$(EXTRAS)]"
	touch $@

demo: venv ## Run the examples: the main job in two processes, a conversation, a life of three processes
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/conversation_chain.py sqlite://
	$(BIN)/python examples/lifelong_agent.py

test: venv ## Run the tests, but for the slow ones and those for a GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: venv ## Run every test, slow and GPU ones too
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not packaging" $(ARGS)

check: venv ## Look for lint, formatting, type and layering errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

packaging: venv ## Build the distributions, and test them installed
	$(BIN)/python -m pytest -m packaging tests/packaging $(ARGS)

clean: ## Remove .venv, build output and the tools' caches
	rm -rf $(VENV) build dist .benchmarks .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mplus_agents integrations tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
