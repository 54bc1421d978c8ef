# make demo: install into .venv and segment the embedded example.  make test: all checks and tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long lint clean

demo: .venv/installed
	$(BIN)/tilepipe demo --output demo

test: .venv/installed-test lint
	$(BIN)/python -m pytest

test-long: .venv/installed-test
	$(BIN)/python -m pytest -m long

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ .venv/installed

clean:
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
