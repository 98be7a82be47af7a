# Every target sets up what it needs in .venv and touches nothing else on the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help quickstart test check lint format clean

help:
	@echo "make quickstart  train a small model plain and with virtual width x4, and compare them (about 10 minutes)"
	@echo "make test        the whole test suite"
	@echo "make check       lint, types and the fast tests"
	@echo "make .venv       the virtual environment alone"

.venv: $(STAMP)

# torch first and pinned: on a machine without a GPU a local CPU build of that version is enough.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "vwn needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/vwn compare --preset quickstart --out runs/quickstart --resume

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
