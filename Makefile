# Two commands: `make demo` and `make test`. Both make their own environment, .venv, and install into it what constraints.txt pins.
#
#   PYTHON    the interpreter that makes the environment, 3.10 or newer
#   PIP_ARGS  more arguments for pip, such as --extra-index-url of an index with CPU builds of torch
#   JOBS      processes that run the tests
#   ARGS      more arguments for `nsa demo` or pytest
#
# `make test-gpu` runs the kernels' tests on the GPU of this machine, `make sanitize` its memory and race checkers, `make compile`
# compiles every kernel for every GPU, `make release` packs the sources of the last commit with the C library's kernels compiled.

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= auto
ARGS ?=
VENV := .venv
STAMP := $(VENV)/installed

SANITIZER := compute-sanitizer --error-exitcode 1

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/nsa/__init__.py)

.PHONY: demo test test-gpu sanitize compile release lint format clean

demo: $(STAMP)
	$(VENV)/bin/nsa demo $(ARGS)

test: $(STAMP)
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m interpreter -n $(JOBS) --dist loadgroup tests/kernels tests/aot
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: $(STAMP)
	$(VENV)/bin/python -m pytest -m gpu -n $(JOBS) --dist loadgroup --no-loadscope-reorder $(ARGS)

sanitize: $(STAMP)
	$(VENV)/bin/python tests/kernels/sanitize.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck $(VENV)/bin/python tests/kernels/sanitize.py
	$(SANITIZER) --tool racecheck $(VENV)/bin/python tests/kernels/sanitize.py --portable
	! PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) $(VENV)/bin/python tests/kernels/sanitize.py --plant

compile: $(STAMP)
	$(VENV)/bin/python tests/kernels/ahead_of_time.py
	$(VENV)/bin/python -m tests.kernels.decode_ahead_of_time

# With the compiled kernels the C library builds where there is no Python. ARGS: what `python -m nsa.aot` takes.
release: $(STAMP)
	$(VENV)/bin/python -m nsa.aot --output build/exported $(ARGS)
	mkdir -p dist
	git archive -o dist/nsa-$(VERSION).tar.gz \
		--prefix=nsa-$(VERSION)/native/exported/ --add-file=build/exported/kernels.c --add-file=build/exported/kernels.bin \
		--prefix=nsa-$(VERSION)/ HEAD

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# Written last, so that an interrupted installation is begun anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "nsa needs Python 3.10 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
