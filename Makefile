# Thin names for pip and CLI calls; the README gives the plain commands for Windows.
#   PYTHON    the Python the environment is made with
#   PIP_ARGS  more arguments for pip, for example an index with CPU builds of torch
#   RUN_ARGS  more arguments for `qlora-nb run`, for example RUN_ARGS="--only 03 -p blocksize 128"
#   TEST_ARGS more arguments for pytest
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: setup run test lab verify notebooks check pins clean

# Everything is installed once; only a change of what is asked for installs again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11, 3.12 or 3.13 is needed, this is %d.%d: make PYTHON=..." % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[lab,smollm2,test]"
	@touch $@

setup: $(READY)

run: $(READY)
	$(BIN)/qlora-nb run $(RUN_ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(TEST_ARGS)

lab: $(READY)
	$(BIN)/qlora-nb lab

verify: $(READY)
	$(BIN)/python tools/verify.py

notebooks: $(READY)
	$(BIN)/python tools/build_notebooks.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/build_notebooks.py --check-format

pins: $(READY)
	$(BIN)/python tools/pin.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
