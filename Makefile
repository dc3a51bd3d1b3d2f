# Everything sets itself up: `make quickstart` and `make test` work on a fresh machine.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
OUT := samples/quickstart
QUICKSTART_PER_CLASS ?= 300
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null && echo cuda || echo cpu)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint format bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

setup: $(VENV)/.stamp-base  ## create .venv with everything that training and sampling need

$(VENV)/.stamp-base: pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh $(VENV) base

$(VENV)/.stamp-test: $(VENV)/.stamp-base
	tools/setup.sh $(VENV) test

quickstart: $(VENV)/.stamp-base  ## meshes -> train -> sample -> .obj files and pictures, in a quarter of an hour on 2 cores
	@mkdir -p $(OUT)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/quickstart.sh $(RUN) $(OUT) $(QUICKSTART_PER_CLASS)

test: $(VENV)/.stamp-test lint  ## every check and test
	$(BIN)/python -m pytest

lint: $(VENV)/.stamp-test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-test  ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-base  ## run the benchmarks that need no meshes and no other library
	@for script in benchmarks/{dataset,utilisation,distributed}.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove what was built; your data, runs and samples stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
