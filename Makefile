# make demo: install into .venv and segment the embedded example.  make test: all checks and tests.
# make docs: build the documentation as a site, into site/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-oldest lint docs clean

demo: .venv/installed
	$(BIN)/tilepipe demo --output demo

test: .venv/installed-test lint
	$(BIN)/python -m pytest

test-long: .venv/installed-test
	$(BIN)/python -m pytest -m long

# The same tests with the oldest releases that are allowed, in an environment of its own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Every warning fails the build: a link that leads nowhere, a page that no other names.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt -e '.[test]'
	touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@ .venv/installed

clean:
	rm -rf .venv .venv-oldest demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis
