# Everything a newcomer needs: `make demo` and `make test` do their own set-up.
#
#   make setup                     what pip chooses; on Linux that is torch with CUDA, 3 GB
#   make setup TORCH=cpu           the CPU build of torch, 0.7 GB with the rest
#   make setup SYSTEM=1            the torch that PYTHON has
#   make setup PYTHON=python3.13   another Python than python3
#
# A choice holds until another is made (TORCH=default is the first), which starts .venv anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Only what was written in the command: other programs may have variables of these names.
given = $(if $(filter command,$(origin $(1))),$($(1)))
CHOICE := $(if $(call given,TORCH),--torch $(TORCH)) $(if $(filter-out 0,$(call given,SYSTEM)),--system) \
	$(if $(filter-out file,$(origin PYTHON)),--this-python)

.PHONY: setup demo test test-slow test-all test-tasks test-ray test-plugins lint docs bench sass gpu wheels clean FORCE

setup: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; print("ready: Python", sys.version.split()[0] + ", torch", torch.__version__)'
	@echo 'to use it: source $(BIN)/activate'

# Changes the file only if there was something to do.
$(VENV)/.packages: FORCE
	@$(PYTHON) tools/set_up.py $(CHOICE) $(VENV)

$(INSTALLED): $(VENV)/.packages setup.py $(wildcard csrc/* csrc/*/*)
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[hf,trl,triton,test,bench,dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/zo-fused finetune

test: $(INSTALLED)
	$(BIN)/pytest -q -n auto --dist worksteal -m "not slow"

# What is marked `slow`: planted faults, machine code, long matrices, killed runs. All of it takes
# half an hour on two cores; PART=parity, or another of PARTS, is what CI does in turn.
PARTS := parity benches compiled steps replays runs trainers
parity := tests/sweeps/test_parity.py tests/noise tests/directions tests/methods
benches := tests/project tests/bench
compiled := tests/ptx tests/sweeps --deselect tests/sweeps/test_parity.py
steps := --dist worksteal tests/step tests/fuzzing
replays := --dist worksteal tests/replaying tests/task tests/integrations
runs := tests/command_line tests/hostile
trainers := tests/hf tests/parallel
test-slow: $(INSTALLED)
	$(BIN)/pytest -q -n auto --dist loadfile -m slow $(if $(PART),$($(PART)))

test-all: test test-slow

# What needs packages that `make setup` does not install: lm_eval, as some of its own have no
# wheels, and trackio, which brings a web server.
test-tasks: $(INSTALLED)
	$(PIP) install -q -c $(VENV)/constraints.txt lm_eval trackio
	$(BIN)/pytest -q -n auto --dist loadfile tests/task/test_lm_tasks.py tests/task/test_evaluating.py tests/task/test_docs.py
	$(BIN)/pytest -q tests/hf/test_features.py -k trackio

# A cluster of two workers on this machine, with Ray, which `make setup` does not install (0.3 GB).
test-ray: $(INSTALLED)
	$(PIP) install -q -c $(VENV)/constraints.txt ray
	$(BIN)/pytest -q tests/integrations/test_ray.py

# axolotl and ms-swift, each in an environment of its own: 5 GB on disk. One alone: PLUGINS=ms-swift==4.6.0
PLUGINS := axolotl==0.19.0 ms-swift==4.6.0
test-plugins: $(INSTALLED)
	tools/set_up_plugins.sh $(BIN)/uv $(BIN)/python $(PLUGINS)
	$(BIN)/pytest -q tests/integrations/test_plugins.py

# The readers of files, so many seconds each. atheris has wheels for Linux.
FUZZ := 3
fuzz: $(INSTALLED)
	$(PIP) install -q -c $(VENV)/constraints.txt --only-binary :all: atheris
	$(BIN)/python tests/fuzzing/fuzz.py $(FUZZ)

# The C++ extension with AddressSanitizer and UBSan, which takes GCC some minutes to compile.
sanitize: $(INSTALLED)
	$(BIN)/python tools/sanitize.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site, with what `make setup` does not install. A warning is an error.
docs: $(INSTALLED)
	$(PIP) install -q -c $(VENV)/constraints.txt mkdocs-material mkdocstrings-python
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

bench: $(INSTALLED)
	$(BIN)/pytest -q bench/cpu --benchmark-disable-gc --benchmark-json=bench/results/latest.json --table bench/results/latest.md $(BENCH)

sass: $(INSTALLED)
	$(BIN)/python -m bench.gpu.sass $(SASS)

# Uses the Python, torch and Triton that are there, and no network.
gpu:
	bench/gpu/gpu.sh $(GPU)

# A source archive, a wheel from it that any Linux of torch's and any torch >= 2.11 loads, and its
# tests with the versions of torch in TORCHES (each is fetched).
wheels: $(INSTALLED)
	rm -rf build/wheel dist
	ZO_FUSED_NATIVE=cpu $(BIN)/uv build --no-build-isolation --python $(BIN)/python --out-dir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist/
	$(BIN)/python tools/check_wheel.py dist/*.whl $(TORCHES)

clean:
	rm -rf $(VENV) build dist zo_fused/*.so *.egg-info
