# Every target sets itself up: a virtual environment in .venv, torch first, then the package and its extras.
PYTHON ?= python3
VENV ?= .venv
# Pinned, and installed alone and first: nothing that follows replaces it.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Busy-waiting threads cost more than they gain when cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo demo-short test test-all lint types docs clean

help:
	@echo "make demo       align the emoji generator with a reward: about 5 minutes on two cores, pictures in runs/demo"
	@echo "make test       linter, type checker, tests (no GPU needed)"
	@echo "make test-all   the same with the slow tests"
	@echo "make demo-short the demo cut to a minute: shows that it works, not what it can do"
	@echo "make docs       the documentation as a site in site/"
	@echo "make setup      only the virtual environment"

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/emoji/demo.py --out runs/demo

demo-short: $(READY)
	$(BIN)/python examples/emoji/demo.py --out runs/demo-short --short

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -m "not slow"

test-all: lint types
	$(BIN)/pytest

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
