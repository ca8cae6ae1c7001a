# Everything runs in .venv, which tools/bootstrap.sh makes from requirements.lock when it is missing or out of date.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." is passed on to what a target runs.

PY := .venv/bin/python
SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help venv demo test serve bench minilm lint format lock proto clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:
	@bash tools/bootstrap.sh

demo: venv ## start the daemon, send it real inputs over every transport, check the answers
	@$(PY) tools/demo.py $(ARGS)

test: lint ## lint, types, tests
	@$(PY) -m pytest $(ARGS)

serve: venv ## run the daemon here with the sample models; Ctrl-C ends it
	@$(PY) tools/serve.py $(ARGS)

bench: venv ## measure the daemon; ARGS=--json for JSON
	@$(PY) -m benchmarks $(ARGS)

minilm: ## export the sentence encoder for budget 9 (an environment with PyTorch in build/)
	@bash tools/minilm.sh

lint: venv ## ruff (check and format) and mypy
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "run 'make format'" >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary

format: venv ## let ruff format the code and correct what it can
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lock: ## write requirements.lock anew from pyproject.toml, newest versions (needs uv)
	@command -v uv >/dev/null || { echo "cannot lock: uv is missing; install it, for example: pip install uv" >&2; exit 1; }
	@uv pip compile pyproject.toml --quiet --upgrade --extra dev --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock

proto: venv ## generate the messages from proto/
	@$(PY) -m grpc_tools.protoc --proto_path=proto --python_out=daemon/appliance/wire --pyi_out=daemon/appliance/wire \
		proto/open_inference.proto proto/worker.proto
	@$(PY) -m grpc_tools.protoc --proto_path=proto --python_out=daemon/appliance_client/wire \
		--pyi_out=daemon/appliance_client/wire proto/open_inference.proto

clean: ## remove .venv and everything generated
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
