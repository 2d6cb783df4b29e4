# Everything from nothing: each target makes .venv and installs what it needs; the second time that takes no time.
PYTHON ?= python3
VENV ?= .venv
PROGRAMS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(PROGRAMS)

.PHONY: demo test slow oldest docs arviz bench lint release-check coverage clean

demo: $(VENV)/installed  ## train on the digits that ship offline, compare the bounds, draw the pictures
	$(BIN)/pyro-vae train digits --out runs/digits
	$(BIN)/pyro-vae compare runs/digits

test: $(VENV)/installed-dev  ## the whole quick suite, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(VENV)/installed-dev  ## the tests too long for the quick suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

oldest:  ## the quick suite with the oldest versions that pyproject.toml allows; the oldest NumPy is not for newer Pythons
	PIP_CONSTRAINT=tests/oldest.txt $(MAKE) test PYTHON=python3.11 VENV=.venv-oldest

docs: $(VENV)/installed-docs  ## the pages' code and the gallery's scripts, run; then the site, in docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m docs tests/test_docs.py
	rm -rf docs/story docs/api/generated docs/api/backreferences docs/_build  # pages of names that are gone would stay
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html

arviz: $(VENV)/installed-dev  ## what depends on ArviZ's version: make arviz PYTHON=python3.13 VENV=.venv-3.13 has 1.x
	$(BIN)/python -m pytest tests/test_arviz_io.py tests/evaluation/test_diagnostics.py

bench: .venv-bench/installed  ## a step beside Pyro's, PyTorch's, NumPyro's and pythae's, in an environment of their own: tables, runs/bench
	.venv-bench/bin/python -m pytest -q -m docs tests/test_docs.py -k coming-from
	.venv-bench/bin/python benchmarks/peers/run.py --out runs/bench

lint: $(VENV)/installed-dev  ## what CI asks of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(VENV)/installed-dev  ## the share of lines that the quick suite runs, and of expressions with a known type
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov pyro_vae --cov-report term:skip-covered
	$(BIN)/mypy --any-exprs-report runs/types
	@tail -n 1 runs/types/any-exprs.txt

release-check:  ## builds wheel and sdist into dist; installs the wheel in an empty environment, and runs it there
	rm -rf dist
	$(PYTHON) -m venv .venv-release
	.venv-release/$(PROGRAMS)/pip install --quiet build twine
	.venv-release/$(PROGRAMS)/python -m build
	.venv-release/$(PROGRAMS)/python -m twine check --strict dist/*
	.venv-release/$(PROGRAMS)/python tests/installed/check.py dist

clean:  ## everything that make made
	rm -rf .venv .venv-* runs docs/_build docs/story docs/api/generated docs/api/backreferences docs/sg_execution_times.rst

$(VENV)/installed: pyproject.toml
	@echo "Installing the packages into $(VENV) (some minutes the first time: torch is large) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --editable ".[all]"
	@touch $@

.venv-bench/installed: pyproject.toml benchmarks/peers/requirements.txt
	@echo "Installing the peers into .venv-bench (some minutes the first time) ..."
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/pip install --quiet --editable ".[all]" --requirement benchmarks/peers/requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV) ..."
	@$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed-dev
	@echo "Installing what the docs need into $(VENV) ..."
	@$(BIN)/pip install --quiet --editable ".[docs]"
	@touch $@
