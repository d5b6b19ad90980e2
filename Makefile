# Every target creates .venv if it does not exist. PYTHON=python3.12 chooses the interpreter; a
# .venv of another Python version is then replaced.
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
# pytest's -m expression; `make test MARK=` runs all tests, MARK=release
# those that run before a release only
MARK ?= not slow
WORKERS ?= 2

BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
STAMP := .venv/.installed-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help demo bench-quick test lint types format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STAMP)  ## the lynx and hare demonstration: figures and a netCDF file in demo/
	$(BIN)/python -m benchmarks demo

bench-quick: $(STAMP)  ## repeat one run of benchmarks/results (three minutes), and write its report
	$(BIN)/python -m benchmarks run --tasks two_moons --budgets 1000 --observations 10 --results results/quick
	$(BIN)/python -m benchmarks report --results results/quick

test: $(STAMP)  ## tests and doctests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m '$(MARK)' --durations=40 --durations-min=5

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyright
	$(BIN)/pyright

format: $(STAMP)  ## format the code, fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove environments, caches and builds
	rm -rf .venv .venv-newest .cache .hypothesis .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the stamp names the Python version: another PYTHON finds none and installs
$(STAMP): pyproject.toml
	@test -n '$(VERSION)' || { echo "no working Python at '$(PYTHON)'" >&2; exit 1; }
	@test "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = '$(VERSION)' \
		|| $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,test]'
	@touch $@
