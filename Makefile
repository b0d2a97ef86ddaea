# The two commands of this project are `make demo` and `make test`. Both make .venv on their first run.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo studies test lint format ui debian-packages native clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5000
DEBIAN_PACKAGES := dataset-fashion-mnist slurm-wlm munge gcc libjpeg62-turbo-dev python3-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the commands
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 15

demo: $(VENV)/.installed  ## train, fine-tune and export a ViT on real images (DATA=folder of images by class, SMOKE=1: a few steps)
	@$(BIN)/python -m pretrain.demo $(if $(DATA),--data "$$DATA") $(if $(SMOKE),--smoke)

studies: $(VENV)/.installed  ## measure the answers of docs/vit-questions.md, within an hour on two cores (ARGS="--study order")
	@$(BIN)/python -m pretrain.studies $(ARGS)

test: debian-packages $(VENV)/.installed-dev native  ## run the test suite (ARGS="-k name" to choose)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev  ## check format, style and types
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

format: $(VENV)/.installed-dev  ## bring every file into the one format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

ui: $(VENV)/.installed  ## open the runs in MLflow (PORT=5000)
	@test -f runs/mlflow.db || { echo "There are no runs yet: start with 'make demo'." >&2; exit 1; }
	@echo "MLflow answers at http://127.0.0.1:$(PORT) until Ctrl-C"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
		exec $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(PORT)

clean:  ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# --- set-up -----------------------------------------------------------------------------------------------------------
# Debian's packages come first where `make test` may install them: with a compiler and libjpeg-turbo's header, pip builds
# the native part of the decoder too. A stamp is renewed when pyproject.toml changes. pip's own words are hundreds of
# lines: what is shown of them is the large downloads, and every error.

SHOW_DOWNLOADS := sed -unE \
	-e 's/^ *Downloading ([^ -]+-[^ -]+)[^ ]* \(([0-9.]+ [MG]B)\).*/    \1 \2/p' \
	-e 's/^Installing collected packages.*/    unpacking/p'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment here. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time (torch is large)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --editable . | $(SHOW_DOWNLOADS)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	@echo "Installing what the tests need"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --editable '.[test,dev]' | $(SHOW_DOWNLOADS)
	@touch $@

native: $(VENV)/.installed-dev
	@ls pretrain/data/_jpegbox*.so >/dev/null 2>&1 || \
		$(BIN)/python -m pip install --quiet --no-deps --editable .  # there was no compiler when it was installed first

debian-packages:
	@missing=$$(for name in $(DEBIAN_PACKAGES); do dpkg -s $$name >/dev/null 2>&1 || echo $$name; done); \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing Debian packages:" $$missing; \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; } \
				>/dev/null || echo "  not possible here: the tests go on without them" >&2; \
		else \
			echo "Not installed (needs root and apt):" $$missing; \
		fi; \
	fi
