PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test families check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,hub,bench,deepspeed,qlora]"
	touch $@

quickstart: $(STAMP)
	$(BIN)/skipwise quickstart

test: $(STAMP)
	$(BIN)/python -m pytest

families: $(STAMP)
	$(BIN)/python tools/make_config_defaults.py
	WRITE_FAMILIES=1 $(BIN)/python -m pytest tests/test_families.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info
