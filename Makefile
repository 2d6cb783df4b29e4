# Everything from nothing: each target makes .venv and installs what it needs; the second time that takes no time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint clean

demo: .venv/installed  ## train on the digits that ship offline, compare the bounds, draw the pictures
	$(BIN)/pyro-vae train digits --out runs/digits
	$(BIN)/pyro-vae compare runs/digits

test: .venv/installed-dev  ## the whole quick suite, doctests included
	$(BIN)/python -m pytest

slow: .venv/installed-dev  ## the tests too long for the quick suite
	$(BIN)/python -m pytest -m slow

lint: .venv/installed-dev  ## what CI asks of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## everything that make made
	rm -rf .venv runs

.venv/installed: pyproject.toml
	@echo "Installing the packages into .venv (some minutes the first time: torch is large) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what the tests need into .venv ..."
	@$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@
