# make demo   record, train, evaluate and report on this machine: the whole of Tutti in one command
# make test   every test          make lint   style, types, floors          make clean   removes .venv and stamps
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

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.simulation
	$(BIN)/tutti demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)

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

$(VENV)/.dev: $(VENV)/.simulation
	@echo "Installing the developers' tools ..."
	$(PIP) install -c constraints.txt -e '.[simulation,dev]'
	@touch $@
