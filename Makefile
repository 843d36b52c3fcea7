# Everything a newcomer needs: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test lint bench sass gpu clean

setup: $(INSTALLED)

# torch first and pinned, or the packages that need it would fetch another build of it.
$(VENV)/.packages: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zo_fused needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt setuptools ninja
	touch $@

$(INSTALLED): $(VENV)/.packages setup.py $(wildcard csrc/* csrc/*/*)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[hf,triton,test,bench,dev]'
	touch $@

demo: setup
	$(BIN)/zo-fused finetune

test: setup
	$(BIN)/pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/pytest -q bench --benchmark-disable-gc --benchmark-json=bench/results/latest.json --table bench/results/latest.md $(BENCH)

sass: setup
	$(BIN)/python bench/sass.py $(SASS)

# Uses the Python, torch and Triton that are there, and no network.
gpu:
	bench/gpu.sh $(GPU)

clean:
	rm -rf $(VENV) build zo_fused/*.so *.egg-info
