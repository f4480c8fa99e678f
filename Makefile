# Needs only Python >= 3.10 and make. Everything is installed into .venv.
# PIP_FLAGS goes to every pip install, e.g. an index with a smaller build of torch.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
# how the tests are spread over processes; PARALLEL= runs them in one
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal
INTERPRETED := tests/kernels tests/adapters/test_every_*.py
# the oldest Triton that is claimed and one between; `test` runs the newest, the one in $(VENV)
TRITON_VERSIONS ?= 3.4.0 3.6.0
# one target of NVIDIA, and AMD for the kernels that compile in a second; `test-triton-all` has the rest
TRITON_CASES ?= not (sm_80 or sm_100 or (gfx942 and layers))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo tutorials docs test test-slow test-triton test-triton-all test-torch-sparse test-upstream lint format typecheck bench dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## train on real digits, sparse and dense, and compare (ARGS="--epochs 3 …")
	$(BIN)/snn-sparse demo $(ARGS)

tutorials: $(VENV)/.test  ## run every tutorial, upstream and sparse, and compare (ARGS="--root FOLDER" for N-MNIST)
	$(BIN)/python examples/tutorials/run_all.py $(ARGS)

docs: $(VENV)/.docs  ## build the documentation into build/site and check its links (ARGS=serve to read it while writing)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

# Triton's interpreter is switched on by the environment, for a whole process
test: $(VENV)/.test  ## run the tests but for the exhaustive sweeps (ARGS="-k data …" goes to the main run)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(PARALLEL) $(INTERPRETED) -m 'triton_interpreter and not slow'
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.test  ## run the exhaustive sweeps that `test` leaves out (ARGS="-k compile …")
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(PARALLEL) $(INTERPRETED) -m 'triton_interpreter and slow'
	$(BIN)/python -m pytest -m slow $(ARGS)

test-triton: $(VENV)/.test $(TRITON_VERSIONS:%=$(VENV)/triton-%/.installed)  ## compile every kernel under older Tritons (TRITON_VERSIONS="3.5.1 …")
	@for version in $(TRITON_VERSIONS); do \
		export PYTHONPATH=$(abspath $(VENV))/triton-$$version TRITON_CACHE_DIR=$(abspath $(VENV))/triton-$$version/.cache; \
		$(BIN)/python -c 'import triton; print("Triton", triton.__version__, "in", *triton.__path__)'; \
		$(BIN)/python -m pytest -q -p no:cacheprovider $(PARALLEL) tests/kernels/test_ahead_of_time.py \
			-k '$(TRITON_CASES)' $(ARGS) || exit 1; \
	done

test-triton-all:  ## the same for every minor version and every target
	$(MAKE) test-triton TRITON_VERSIONS="3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0" TRITON_CASES=test ARGS="-m 'slow or not slow'"

test-torch-sparse: $(VENV)/.torch-sparse  ## build the real torch_sparse, minutes with a C++ compiler, and run its backend's tests
	$(BIN)/python -c 'import torch_sparse; print("torch_sparse", torch_sparse.__version__)'
	$(BIN)/python -m pytest -q tests/backends/test_torch_sparse.py $(ARGS)

test-upstream: $(VENV)/.upstream  ## run Norse's own test suite, without and with sparse mode (ARGS=auto for another mode)
	$(BIN)/python tests/upstream/run_norse_suite.py $(ARGS)

lint: $(VENV)/.lint typecheck  ## check style, types and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.lint  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.lint  ## check types
	$(BIN)/mypy

bench: $(VENV)/.dev  ## compare with snnTorch, Norse and SpikingJelly (ARGS="--sweep density …")
	$(BIN)/snn-sparse bench $(ARGS)

dist: $(VENV)/.test  ## build the source distribution and the wheel into dist/ and check them
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache demo.png
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -maxdepth 1 -name '*.egg-info' -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, found " + sys.version.split()[0] + "; say PYTHON=…" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of packages, so that the demo does not wait for the test tools.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), a few minutes the first time"
	$(PIP) -e '.[snntorch,plot]' scikit-learn
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), a few minutes the first time"
	$(PIP) -e '.[test]'
	@touch $@

# Only Triton itself: everything else is the main environment's.
$(VENV)/triton-%/.installed: | $(BIN)/python
	$(PIP) --no-deps --target $(@D) triton==$*
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) 'ruff>=0.12' 'mypy>=1.14' 'import-linter>=2.6'
	@touch $@

$(VENV)/.upstream: $(VENV)/.test
	$(PIP) -e '.[upstream-tests]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@

# Its extensions are compiled against the torch that is here, so it cannot be built in isolation.
$(VENV)/.torch-sparse: $(VENV)/.test
	@command -v $${CXX:-c++} >/dev/null || { echo 'torch_sparse is compiled here: a C++ compiler is needed (CXX=...)'; exit 1; }
	$(PIP) wheel ninja 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[torch-sparse]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@
