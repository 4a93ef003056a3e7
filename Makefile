# Two commands matter: `make demo` and `make test`. Each installs what it needs.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# A process that spins for OpenMP work costs 20x on shared cores.
export OMP_WAIT_POLICY = passive

.PHONY: install install-dev demo test check format protos clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 with venv, or name another with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml deploy/constraints.txt | $(VENV)/bin/python
	@echo "Installing pinned dependencies into $(VENV) (about two minutes the first time) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[sidecar,triton,offline,cpu,local-llm]'
	@touch $@

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[sidecar,triton,offline,cpu,local-llm,ray,dev]'
	@touch $@

demo: install
	$(BIN)/kar demo

test: install-dev
	$(BIN)/pytest -q -n 2 --dist loadfile tests/kernels
	$(BIN)/pytest -q --ignore tests/kernels

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .mypy_cache/import-linter
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python protos/generate.py --check

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install-dev
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) var .mypy_cache .ruff_cache .pytest_cache .hypothesis
