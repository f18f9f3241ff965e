# The whole project from here: `make quickstart` needs python3 (3.11 or newer), make and git, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart
# The quickstart trains data-parallel, one virtual device per core: XLA's own threads use several cores less well.
DEVICES ?= $(shell $(PYTHON) experiments/cores.py)
# PARITY=1 installs PyTorch as well, for the tests that compare with it (several GB where its package carries CUDA).
PARITY ?=
comma := ,
EXTRAS := dev$(if $(PARITY),$(comma)parity)
# Each worker has its own processes and compilations: two fit two cores.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
# For arrays of a few numbers nearly all time goes into compiling. `make test-all` optimises all but the smallest models.
COMPILE_QUICKLY := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

.PHONY: help venv quickstart test test-all test-aot kernels aot-golden lint format clean

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.core  ## make .venv with what a run needs

quickstart: $(VENV)/.core  ## train a tiny DeepSeek-V3 on real text, evaluate it, generate, write a report
	@if [ -e $(QUICKSTART) ]; then \
	  n=1; while [ -e $(QUICKSTART).$$n ]; do n=$$((n + 1)); done; \
	  mv $(QUICKSTART) $(QUICKSTART).$$n && echo "moved the last quickstart to $(QUICKSTART).$$n"; \
	fi
	$(BIN)/python -m experiments.run tiny.pretrain --workdir $(QUICKSTART) --virtual_devices $(DEVICES)

test: $(VENV)/.test$(PARITY)  ## the tests that end in minutes; PARITY=1 adds those against PyTorch
	XLA_FLAGS="$(COMPILE_QUICKLY) $$XLA_FLAGS" $(PYTEST) -m "not slow and not aot" $(ARGS)

test-all: $(VENV)/.test$(PARITY)  ## every test
	$(PYTEST) $(ARGS)

# On the CPU platform: nothing looks for a GPU.
test-aot: $(VENV)/.cuda  ## the kernels, compiled for Hopper without a GPU; installs jax's CUDA wheels (GBs)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m aot $(ARGS)

kernels: $(VENV)/.cuda  ## print what the compiler makes of every kernel at every size, without a GPU
	@for tool in kernels_aot "kernels_aot --out_dtype=float32" kernels_aot_grouped kernels_aot_quantize kernels_aot_experts; do \
	  JAX_PLATFORMS=cpu $(BIN)/python -m tools.$$tool || exit 1; echo; \
	done

aot-golden: $(VENV)/.cuda  ## train steps compiled for 16 to 2048 GPUs, against the kept ones; 20 minutes
	JAX_PLATFORMS=cpu $(BIN)/python -m tools.aot_golden $(ARGS)

lint: $(VENV)/.test$(PARITY)  ## ruff's checks and format, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy deepseek_jax pallas_kernels

format: $(VENV)/.test$(PARITY)  ## rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of packages, so that nothing is installed twice. The exact versions of constraints.txt are those of
# Python 3.11; another Python takes the newest that setup.py allows.
$(VENV)/.core: setup.py constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/.test$(PARITY): setup.py constraints.txt
	$(call install,.[$(EXTRAS)])
	@touch $(VENV)/.core $@

$(VENV)/.cuda: setup.py constraints.txt
	$(call install,.[dev$(comma)cuda])
	@touch $(VENV)/.core $(VENV)/.test $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "deepseek_jax needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not make $(VENV) with $(PYTHON); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '$(1)' \
	  `$(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")'`
endef
