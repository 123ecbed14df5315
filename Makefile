# Everything here runs inside $(VENV), which is made on first use; nothing else on the machine is touched.
# Plain enough for GNU make 3.81, the one that macOS has.

VENV ?= .venv
# The interpreter that $(VENV) is made with. Empty: the first of these that will do.
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTEST_ARGS ?=
# Empty, both: all benchmarks as they are, and benchmarks/RESULTS.md is written anew.
BENCH ?=
BENCH_ARGS ?=
SOAK_ARGS ?=

# What a shell may have set for other projects must not reach ours.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV __PYVENV_LAUNCHER__
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test style types coverage bench soak clean help same-python

python := $(VENV)/bin/python
pip := "$(python)" -m pip --disable-pip-version-check install --quiet --editable

demo: $(VENV)/.run  ## run the echo gate against callers of its own
	@"$(python)" examples/echo_gate.py --demo

test: $(VENV)/.test  ## run the tests; PYTEST_ARGS="-k defer" chooses some
	@"$(python)" -m pytest $(PYTEST_ARGS)

style: $(VENV)/.dev  ## check lint and format
	@"$(python)" -m ruff check
	@"$(python)" -m ruff format --check

types: $(VENV)/.dev  ## check types
	@"$(python)" -m mypy

coverage: $(VENV)/.test  ## run the tests and report the branches they miss
	@"$(python)" -m coverage run -m pytest $(PYTEST_ARGS)
	@"$(python)" -m coverage report

bench: $(VENV)/.plot  ## measure everything and rewrite the results; BENCH=stream, BENCH_ARGS="--loop uvloop" only print
	@"$(python)" benchmarks/run_all.py --only "$(BENCH)" $(BENCH_ARGS)

soak: $(VENV)/.test  ## let callers and faults come at random, for two minutes; SOAK_ARGS="--seconds 20"
	@"$(python)" -X dev -W error -m tests.soak $(SOAK_ARGS)

# Fixed names only: whoever chose another VENV also removes it.
clean:  ## remove the virtual environments and everything that was built
	rm -rf .venv .venv-3.* build dist htmlcov .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this
	@echo 'make TARGET [PYTHON=python3.12] [VENV=.venv]'
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  \1:\2/p' Makefile | awk -F: '{ printf "%-12s%s\n", $$1, $$2 }'

# Four stages, each holding the one before it. pyproject.toml is all that an editable install depends on.

$(VENV)/.run: pyproject.toml $(python) | same-python
	@echo 'Installing condaccept into $(VENV)'
	@$(pip) .
	@touch $@

$(VENV)/.plot: pyproject.toml $(python) | same-python
	@echo 'Installing condaccept and what draws the benchmarks into $(VENV)'
	@$(pip) '.[plot]'
	@touch $(VENV)/.run $@

$(VENV)/.test: pyproject.toml $(python) | same-python
	@echo 'Installing condaccept and what its tests need into $(VENV)'
	@$(pip) '.[test]'
	@touch $(VENV)/.run $(VENV)/.plot $@

$(VENV)/.dev: pyproject.toml $(python) | same-python
	@echo 'Installing condaccept and the tools of its developers into $(VENV)'
	@$(pip) '.[dev]'
	@touch $(VENV)/.run $(VENV)/.plot $(VENV)/.test $@

# When the interpreter behind the environment is gone, it is made again, and make has to be told that what was
# installed went with it: the new interpreter may be older than the stamps that make remembers.
ifeq ($(realpath $(python)),)
$(VENV)/.run $(VENV)/.plot $(VENV)/.test $(VENV)/.dev: FORCE
FORCE:
endif

# Only a folder that is a virtual environment is ever removed. Asking for ensurepip matters on Debian, whose
# python3 has the venv module and can't make one before python3-venv is installed.
$(python):
	@for candidate in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
	    "$$candidate" -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	        >/dev/null 2>&1 || continue; \
	    if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi; \
	    echo "Making $(VENV) with $$("$$candidate" -I -V)"; \
	    "$$candidate" -I -m venv "$(VENV)"; \
	    exit; \
	done; \
	{ \
	    echo 'condaccept needs Python 3.11 or later with its venv module. Tried: $(or $(PYTHON),$(CANDIDATES)).'; \
	    echo 'Install one (on Debian and Ubuntu: python3 and python3-venv), or name one that you have:'; \
	    echo '    make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)'; \
	} >&2; \
	exit 1

# An environment outlives the PYTHON it was made with; say so rather than run on another one than was asked for.
same-python: $(python)
ifneq ($(PYTHON),)
	@version='import sys; print("%d.%d" % sys.version_info[:2])'; \
	wanted=$$("$(PYTHON)" -I -c "$$version") && found=$$("$(python)" -I -c "$$version") || exit 1; \
	if [ "$$wanted" != "$$found" ]; then \
	    echo "$(VENV) holds Python $$found, and PYTHON is $$wanted: add VENV=.venv-$$wanted, or remove $(VENV)." >&2; \
	    exit 1; \
	fi
endif
