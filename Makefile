# One virtual environment in .venv, made on first use and reused until the project's requirements change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow conform docs notebooks lint format types clean

help: ## Tell every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.12 picks the interpreter, VENV=DIR where it is installed, ARGS='...' adds arguments."

setup: $(STAMP) ## Install the project and its tools into .venv

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "floral-peft needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train FLoRAL against FedAvg on the embedded digits (about two minutes with the installation)
	$(BIN)/floral-peft train $(ARGS)

test: $(STAMP) ## Run the tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## Run the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

conform: $(STAMP) ## Run PEFT's own tests on FloralConfig, and on LoraConfig as the control
	PYTHONPATH=tests $(BIN)/python -m conformance $(ARGS)

docs: $(STAMP) ## Write docs/reference from the docstrings
	$(BIN)/python docs/make_reference.py

notebooks: $(STAMP) ## Run the notebooks and keep their outputs (FLORAL_ASSETS=DIR: models and data; ARGS: which)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks]'
	$(BIN)/python notebooks/run.py $(ARGS)

lint: $(STAMP) ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## Mend style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## Check the types of package and tests
	$(BIN)/mypy

clean: ## Remove the environment, caches and build products
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find floral_peft tests -name __pycache__ -type d -prune -exec rm -rf {} +
