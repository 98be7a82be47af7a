# Every target sets up what it needs in .venv and touches nothing else on the machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Prepared text and what libraries keep stay inside this folder too.
export VWN_CACHE := $(CURDIR)/.cache/vwn
export HF_HOME := $(CURDIR)/.cache/huggingface

.PHONY: help quickstart test test-faults test-versions test-install check fast bench docs lint format clean

# One seed of the five in results/quickstart.
QUICKSTART := --data stdlib --tokenizer bpe:2048 --backbone micro --arms plain 1x4 --seeds 0 --steps 1500 --batch-size 8 \
	--learning-rates plain=1.2e-2 1x4=1.2e-2 --window 256 --eval-every 250 --max-valid-tokens 131072

help:
	@echo "make quickstart  train a small model plain and with virtual width x4, and compare them (about ten minutes)"
	@echo "make test        the whole test suite"
	@echo "make test-faults over 200 injected faults (kills, damage, full disks), up to half an hour"
	@echo "make test-versions the model with the oldest and the newest supported transformers"
	@echo "make test-install the README's way to install, in a fresh environment (downloads torch)"
	@echo "make check       lint, types and the fast tests"
	@echo "make bench       speed, memory and accuracy of the connections on this machine"
	@echo "make docs        the documentation site, into build/site"
	@echo "make .venv       the virtual environment alone"

PINNED := $(shell sed -n 's/^transformers==//p' constraints.txt)

.venv: $(STAMP)

# torch first and pinned: on a machine without a GPU a local CPU build of that version is enough. Such a build comes
# without Triton, whose interpreter runs the GPU kernels in the tests.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vwn needs Python 3.11 or newer (make PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps triton \
		|| echo "no Triton for this machine: the tests of its kernels are skipped"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest .cache transformers==$(PINNED) \
		&& tar -xzf .cache/transformers-$(PINNED).tar.gz -C .cache transformers-$(PINNED)/tests \
		|| echo "no source of transformers $(PINNED) to be had: its model tests are skipped"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/vwn compare --out runs/quickstart --resume --recorded results/quickstart $(QUICKSTART)

# Each worker begins with half of the tests, in their order, so that few fixtures of a file are made twice.
PARALLEL := -n 2 --dist worksteal

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# Every injected fault; the table of docs/reliability.md comes from here.
test-faults: $(STAMP)
	mkdir -p build
	VWN_FAULTS_TABLE=build/faults.md $(BIN)/python -m pytest -m faults tests/training/test_faults.py

# The model's fast tests with the oldest and the newest supported transformers, each in front of the one in .venv.
TRANSFORMERS := 5.17.0 5.24.0
WIDEN_TESTS := the_new_weights_learn tables_tied_and_not \
	saved_and_loaded_and_built_anew other_dtypes with_multi_token_prediction
MODEL_TESTS := $(addprefix tests/hf/test_,versions.py model.py model_losses.py model_saving.py) \
	$(addprefix tests/hf/test_widen.py::test_,$(WIDEN_TESTS))

build/transformers-%/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) transformers==$*
	touch $@

test-versions: $(TRANSFORMERS:%=build/transformers-%/.installed)
	for version in $(TRANSFORMERS); do \
		echo "transformers $$version"; \
		PYTHONPATH=build/transformers-$$version $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not install" $(MODEL_TESTS) \
			|| exit 1; \
	done

test-install: $(STAMP)
	$(BIN)/python -m pytest -m install tests/hf/test_versions.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy would leave a core idle.
check: $(STAMP)
	$(MAKE) -j 2 lint fast

fast: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not faults and not install"

# Leave the machine alone meanwhile. On a machine with a GPU each measures that.
bench: $(STAMP)
	for name in accuracy memory connections decoding training_step; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# A warning is an error. The site takes nothing from the network, nor does its reader's browser.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs build dist src/*.egg-info
