# UniRecon. `make help` lists every target.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

METHOD ?= uniad
PROFILE ?= demo
export PROFILE DATASET DATA_ROOT CATEGORIES BACKBONE WEIGHTS WANDB

.DEFAULT_GOAL := help

help:  ## List every target with one line.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

# A copy of requirements.txt inside the environment marks it as complete; it is written last.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "UniRecon needs Python 3.10 or newer, found %s. Set PYTHON=/path/to/python3.10" % sys.version.split()[0])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	@cp requirements.txt $@

setup: $(VENV)/.installed  ## Make the virtual environment and install requirements.txt.

test: setup  ## Run every test.
	$(PY) -m pytest

lint: setup  ## Check style with ruff.
	$(PY) -m ruff check .

.PHONY: help setup test lint
