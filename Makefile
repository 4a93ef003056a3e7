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

# Every part runs, also after one that failed; the exit code tells of all. Kernels are interpreted on a processor, which
# is decided when they are imported: they have a session of their own. docs/testing.md says how to run less.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
EXCLUSIVE = $(shell grep -rl --include='test_*.py' mark.exclusive tests)
# Tests start a hundred Python processes: each would compile our modules anew.
test: install-dev
	@unset PYTHONDONTWRITEBYTECODE; failed=""; \
	part() { echo "== $$1"; $(BIN)/pytest -q "$${@:2}" || failed="$$failed $$1"; }; \
	part kernels $(PARALLEL) tests/kernels; \
	part parallel $(PARALLEL) -m "not exclusive" --ignore tests/kernels; \
	$(if $(EXCLUSIVE),part exclusive -m exclusive $(EXCLUSIVE);) \
	[ -z "$$failed" ] || { echo "failed parts:$$failed" >&2; exit 1; }

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
