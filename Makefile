PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-gguf study study-smoke real-model real-model-gpu families reference docs check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,hub,bench,deepspeed,qlora]"
	touch $@

quickstart: $(STAMP)
	$(BIN)/skipwise quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test-gguf: $(STAMP) # builds llama.cpp once, about ten minutes on two cores
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf,llama-cpp]"
	$(BIN)/python tools/fetch_converter.py
	LLAMA_CPP_TESTS=1 $(BIN)/python -m pytest tests/test_gguf.py tests/test_gguf_llama_cpp.py

study: $(STAMP) # hours on two cores; type it again to go on
	$(BIN)/python research/study/run.py
	$(BIN)/python research/study/run.py --collect
	$(BIN)/python research/study/efficiency.py
	$(BIN)/python research/study/figures.py

study-smoke: $(STAMP) # six minutes on two cores: every table in small, into runs/study-smoke
	$(BIN)/python research/study/run.py --smoke

real-model: $(STAMP) # three hours on two cores; type it again to go on
	$(BIN)/python research/real_model/run.py --hours 3

real-model-gpu: $(STAMP) # eight minutes on one GPU; type it again to go on
	$(BIN)/python research/real_model/run.py --gpu --minutes 8

families: $(STAMP)
	$(BIN)/python tools/make_config_defaults.py
	WRITE_FAMILIES=1 $(BIN)/python -m pytest tests/test_families.py

reference: $(STAMP) # docs/recipe.md, docs/cli.md, docs/combinations.md
	$(BIN)/python tools/make_reference.py
	$(BIN)/python tools/make_combinations.py

docs: $(STAMP) # the documentation site, into site/
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist site src/*.egg-info
