# make smoke  the whole pipeline on a toy size, to see that it works here: a minute after the installation
# make demo   record, train, evaluate and report on this machine: the whole of Tutti in one command
# make test   every test          make lint   style, types, floors, docs    make clean   removes all that these make, but no run
# make docs   the site of docs/ -> site/index.html; a broken link or a missing page fails
#
# Needs Python 3.11-3.13, make and a C compiler. Each installation step leaves a stamp, so a repeat is instant.

PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

CURE = Tutti needs Python 3.11, 3.12 or 3.13. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11

# Idle worker threads spin for some microseconds, then sleep: always spinning starves two busy cores, sleeping
# at once halves the speed of a small model. (GOMP_SPINCOUNT wins over the policy where both are known.)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 20000

help: # what there is, from the first lines of this file
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(MAKEFILE_LIST)

.PHONY: help smoke demo test lint docs clean rendering
.DELETE_ON_ERROR:

NEXT = @printf '\nTo use the command tutti in this shell:\n  . $(BIN)/activate\n'

smoke: $(VENV)/.simulation rendering
	$(BIN)/tutti demo --config configs/smoke.yaml
	$(NEXT)

demo: $(VENV)/.simulation rendering
	$(BIN)/tutti demo
	$(NEXT)

# The tests start a hundred processes, which read the package's bytecode instead of compiling it each time.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.dev rendering
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Off-screen rendering needs two Debian packages. They are installed where root or sudo without a password allows;
# elsewhere tutti says what is missing when it first renders.
RENDERING := libegl1 libgl1-mesa-dri

rendering:
	@command -v dpkg-query >/dev/null 2>&1 || exit 0; missing=; \
	for package in $(RENDERING); do \
		dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'install ok installed' || missing="$$missing $$package"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo='sudo -n'; else \
		echo "Rendering needs the Debian packages$$missing, and installing them needs root. Ask for:"; \
		echo "  apt-get install --no-install-recommends$$missing"; exit 0; \
	fi; \
	echo "Installing the Debian packages$$missing, which off-screen rendering needs ..."; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $$missing >/dev/null \
		|| echo "apt-get failed; tutti will say what is missing when it renders."

$(VENV)/.made:
	@$(PYTHON) -c '' 2>/dev/null || { echo "error: there is no working '$(PYTHON)'. $(CURE)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1). $(CURE)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: asked for as somebody's dependency, pip would take the newest build.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "Installing PyTorch (the largest download) ..."
	$(PIP) install -c constraints.txt torch
	@touch $@

$(VENV)/.simulation: pyproject.toml $(VENV)/.torch
	@echo "Installing Tutti with the simulator ..."
	$(PIP) install -c constraints.txt -e '.[simulation]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	@echo "Installing the tools that build the site ..."
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.simulation $(VENV)/.docs
	@echo "Installing the developers' tools ..."
	$(PIP) install -c constraints.txt -e '.[simulation,dev]'
	@touch $@
