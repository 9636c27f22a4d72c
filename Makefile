# Thin names for pip and CLI calls; docs/install.md gives the plain commands for Windows.
#   PYTHON    the Python the environment is made with; naming another version makes the environment anew
#   PIP_ARGS  more arguments for pip, for example an index with CPU builds of torch
#   RUN_ARGS  more arguments for `qlora-nb run`, for example RUN_ARGS="--only 03 -p blocksize 128"
#   TEST_ARGS more arguments for pytest; TEST_ARGS="-n 0" runs the tests one after another, in one process
#   SITE_ARGS more arguments for tools/build_site.py, for example SITE_ARGS="--serve"
#   VERIFY_ARGS more arguments for tools/verify.py, for example VERIFY_ARGS="--only colab"
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
SITE_READY := .venv/.installed-site

.PHONY: setup run test lab verify site notebooks parameters check pins clean again

# A PYTHON that is named counts, also where there is an environment already: one of another version is not kept.
ifneq ($(origin PYTHON),file)
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
WANTED := $(shell $(PYTHON) $(VERSION))
FOUND := $(shell $(BIN)/python $(VERSION))
AGAIN := $(if $(FOUND),$(filter-out $(FOUND),$(or $(WANTED),none)))
endif

# Everything is installed once; only a change of what is asked for installs again. A set-up that was cut short begins anew.
$(READY): pyproject.toml constraints.txt $(if $(AGAIN),again)
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c '' 2>/dev/null || { echo "qlora-nb: there is no $(PYTHON) here. Install Python 3.11, 3.12 or 3.13, or name yours: make run PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("qlora-nb: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %d.%d. Name another one: make run PYTHON=python3.12" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "qlora-nb: $(PYTHON) comes without venv. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@test -z "$(AGAIN)" || echo "qlora-nb: .venv has Python $(FOUND), $(PYTHON) is $(WANTED): making .venv anew"
	@test -z "$(AGAIN)" && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "qlora-nb: installing into .venv, once (some minutes; torch alone is large: PIP_ARGS in docs/install.md)"
	@$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[lab,smollm2,sweep,test]" || { echo "qlora-nb: pip could not install what the kit needs; its reason stands above. The first set-up needs pip's network; behind a proxy or a mirror name it in pip's configuration or in PIP_ARGS." >&2; exit 1; }
	@touch $@

setup: $(READY)

run: $(READY)
	$(BIN)/qlora-nb run $(RUN_ARGS)

# Two processes share the files of tests, the longest begin (tests/conftest.py).
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lab: $(READY)
	$(BIN)/qlora-nb lab

verify: $(SITE_READY)
	PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tools/verify.py $(VERIFY_ARGS)
	$(BIN)/python tools/claims_page.py

# What only the site needs is installed when it is first asked for.
$(SITE_READY): $(READY)
	@$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[site]" || { echo "qlora-nb: pip could not install what the site is built with; its reason stands above." >&2; exit 1; }
	@touch $@

site: $(SITE_READY)
	$(BIN)/python tools/build_site.py $(SITE_ARGS)

notebooks: $(READY)
	$(BIN)/python tools/build_notebooks.py
	$(BIN)/python tools/claims_page.py

parameters: $(READY)
	$(BIN)/python tools/parameters_page.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/build_notebooks.py --check-format

pins: $(READY)
	$(BIN)/python tools/pin.py

# One wheel with all that the notebooks need, to be uploaded to Colab.
.PHONY: dist
dist: $(READY)
	$(BIN)/python tools/build_wheel.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
