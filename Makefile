PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras

.PHONY: install quickstart test test-all test-gguf torture study study-smoke real-model real-model-gpu families reference docs check clean

install: $(STAMP) # what `make quickstart` and `make test` need

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[test]"
	touch $@

$(EXTRAS): $(STAMP) # engines, QLoRA, lm-eval, TRL, GGUF, and the tools of `make check`
	$(PIP) -e ".[dev,hub,bench,deepspeed,qlora,trl,gguf,tensorboard]"
	touch $@

quickstart: $(STAMP)
	$(BIN)/skipwise quickstart

test: $(STAMP) # what convinces, without any extra
	$(PYTEST) -m "not extended"

test-all: $(EXTRAS) # everything that `make test` leaves out
	$(PYTEST) -m extended

test-gguf: $(STAMP) # builds llama.cpp once, about ten minutes on two cores
	$(PIP) -e ".[gguf,llama-cpp]"
	$(BIN)/python tools/fetch_converter.py
	LLAMA_CPP_TESTS=1 $(BIN)/python -m pytest tests/test_gguf.py tests/test_gguf_llama_cpp.py

torture: $(STAMP) # up to four hours: kills, full disks, damaged files; benchmarks/results/
	$(BIN)/python benchmarks/torture.py

study: $(STAMP) # days on two cores; type it again to go on
	$(BIN)/python research/study/run.py
	$(BIN)/python research/study/run.py --collect
	$(BIN)/python research/study/efficiency.py
	$(BIN)/python research/study/figures.py

study-smoke: $(STAMP) # six minutes on two cores: every group of settings in small, into runs/study-smoke
	$(BIN)/python research/study/run.py --smoke

real-model: $(STAMP) # three hours on two cores; type it again to go on
	$(BIN)/python research/real_model/run.py --hours 3

real-model-gpu: $(STAMP) # eight minutes on one GPU; type it again to go on
	$(BIN)/python research/real_model/run.py --gpu --minutes 8

families: $(STAMP)
	$(BIN)/python tools/make_config_defaults.py
	WRITE_FAMILIES=1 $(BIN)/python -m pytest tests/test_families.py

reference: $(EXTRAS) # docs/recipe.md, docs/cli.md, docs/combinations.md
	$(BIN)/python tools/make_reference.py
	$(BIN)/python tools/make_combinations.py

docs: $(STAMP) # the documentation site, into site/
	$(PIP) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
