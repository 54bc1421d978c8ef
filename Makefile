# make demo: install into .venv and segment the embedded example.  make test: all checks and tests.
# make docs: build the documentation as a site, into site/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-oldest coverage lint docs hooks clean

demo: .venv/installed
	$(BIN)/tilepipe demo --output demo

test: .venv/installed-test lint
	$(BIN)/python -m pytest

test-long: .venv/installed-test
	$(BIN)/python -m pytest -m long

# The same tests with the oldest releases that are allowed, in an environment of its own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest

# Which lines the tests run, also those of workers; takes twice as long as the tests.
coverage: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--group coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

# Every warning fails the build: a link that leads nowhere, a page that no other names.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The checks before each commit.
hooks: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev
	$(BIN)/pre-commit install

# pip 25.1 is the first that knows groups; what comes with Python may be older.
.venv/bin/python:
	$(PYTHON) -m venv .venv
	$@ -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade 'pip>=25.1'
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oldest.txt -e . --group test
	touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . --group test --group lint
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . --group docs
	touch $@ .venv/installed

clean:
	rm -rf .venv .venv-oldest demo site .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.coverage .coverage.*
