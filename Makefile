# Every target sets up .venv by itself; it needs only make and a Python from 3.10 to 3.13.
#   make run                                  train the default model
#   make run ARGS="model.depth=12"            with Hydra overrides
#   make sweep                                experiment=depth_sweep: jobs that stop when sick, and their twins
#   make test, make test-slow, make check     the quick tests; the slow ones; formatting, lint, types and all quick tests
#   make bench                                what watching costs; ARGS=--quick for a smoke run
#   make run PYTHON=python3.12                with another interpreter

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# One stamp per interpreter and set of extras, so that asking for another one installs anew.
STAMP := $(VENV)/.$(subst /,_,$(PYTHON))-test
STAMP_CHECK := $(VENV)/.$(subst /,_,$(PYTHON))-check
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable

.PHONY: run sweep test test-slow bench check clean

run: $(STAMP)
	$(RUN) scripts/train.py $(ARGS)

sweep: $(STAMP)
	$(RUN) scripts/train.py experiment=depth_sweep $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest $(ARGS)

test-slow: $(STAMP)
	$(RUN) -m pytest -m slow $(ARGS)

bench: $(STAMP)
	$(RUN) scripts/bench.py $(ARGS)

check: $(STAMP_CHECK)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build dist

# The interpreter of an existing .venv is replaced only where it is another than the one asked for.
$(STAMP): pyproject.toml constraints.txt
	@test "`$(RUN) -VV 2>/dev/null`" = "`$(PYTHON) -VV`" || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time this takes a minute or more."
	@$(INSTALL) ".[test]"
	@touch $@

$(STAMP_CHECK): $(STAMP)
	@$(INSTALL) ".[test,check]"
	@touch $@
