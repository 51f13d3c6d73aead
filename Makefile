# Each target does its own set-up: a virtual environment in .venv, made once and reused when nothing changed.
PYTHON ?= python3
ACCELERATOR ?= auto
BIN := .venv/bin
# One process a core. What trains or starts an engine takes the whole machine, and runs after it, one at a time.
FAST := -m "not slow and not engine" -n auto --dist worksteal

.PHONY: help setup demo test test-fast compat soak check lint format bench bench-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## make .venv (ACCELERATOR=cpu|gpu to choose the build of vLLM)
	@$(PYTHON) scripts/setup_env.py --accelerator $(ACCELERATOR)

demo: setup  ## the main job on a real model: train, publish, serve two tenants, hot swap, export
	@$(BIN)/python examples/demo.py $(if $(BASE),--base $(BASE))

test: setup  ## all tests, with a real vLLM server
	@$(BIN)/python -m pytest -q $(FAST)
	@$(BIN)/python -m pytest -q -m "slow or engine"

test-fast: setup  ## the tests for every edit, under 90 s
	@$(BIN)/python -m pytest -q $(FAST)

# Packages that would burden everybody's set-up lie in a folder of their own, in versions that fit beside the others.
compat: setup  ## LangChain, LiteLLM and the OpenAI and Anthropic clients, against a real server
	@$(BIN)/uv pip install -q --python $(BIN)/python --target .compat/python --constraints constraints.txt langchain-openai litellm
	@if command -v npm >/dev/null; then npm install --silent --no-save --no-audit --no-fund --prefix .compat/node openai; fi
	@PYTHONPATH=.compat/python AH_NODE_MODULES=$(CURDIR)/.compat/node/node_modules $(BIN)/python -m pytest -q tests/e2e/test_clients.py

MINUTES ?= 60
soak: setup  ## mixed traffic, swaps and bad requests for MINUTES=60; nothing may be wrong at the end
	@$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

check: lint test  ## what CI wants: format, lint, types, imports, tests

lint: setup  ## format, lint, types, imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## put the code in shape
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup  ## all benchmarks, as a table in .bench/results.md
	@$(BIN)/python benchmarks/run_all.py

bench-gpu: setup  ## the benchmarks that need a GPU
	@$(BIN)/python benchmarks/run_all.py --gpu

clean:  ## remove what make made, but not the registry in your home
	rm -rf .venv .compat .demo .models .bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
