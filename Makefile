# Everything a newcomer needs: `make demo` trains a goal-conditioned policy, `make test` runs every check.
# Both set up the virtual environment first; nothing else has to be typed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One worker for each core, at most 8 (each needs up to 1.5 GB). A worker that has no tests left takes over another's.
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test slow check setup oldest newest wheel clean help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.ready ## create the virtual environment

# torch is asked for in the same call, so that pip never picks another build first, and within a narrower range than
# pyproject.toml's: 2.13 is the release that the tests run with every day. make TORCH="torch<2.16" newest tries the rest.
TORCH ?= torch>=2.6,<2.14

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" "$(TORCH)"
	@touch $@

# The run that was begun last, of an arm's folder.
newest = $$(ls -td runs/$(1)/version_* | head -1)
evaluate = $(BIN)/rap-lightning evaluate --model $(1) --source runs/world --judge Function \
	--judge.function rap_lightning.world.rule.score --temperature 0.7

# On matrices this small, threads wait for each other longer than they work.
demo: export OMP_NUM_THREADS := 1
demo: setup ## train plain DPO and goals as text and as strength on the embedded world, measure how they steer, write a report (3 minutes)
	$(BIN)/rap-lightning fit -c configs/quickstart.yaml -c configs/plain-dpo.yaml --trainer.default_root_dir runs/plain-dpo
	$(BIN)/rap-lightning fit -c configs/quickstart.yaml -c configs/paper.yaml --trainer.default_root_dir runs/goal-as-text
	$(BIN)/rap-lightning fit -c configs/quickstart.yaml --trainer.callbacks.beside runs/plain-dpo --trainer.default_root_dir runs/goal-as-strength
	@$(call evaluate,runs/world/base) --goal_from $(call newest,goal-as-text)/hf --output runs/base
	@$(call evaluate,$(call newest,plain-dpo)/hf)
	@$(call evaluate,$(call newest,goal-as-text)/hf)
	@$(call evaluate,$(call newest,goal-as-strength)/hf)
	@$(BIN)/rap-lightning report goal-as-strength=$(call newest,goal-as-strength) goal-as-text=$(call newest,goal-as-text) \
		plain-dpo=$(call newest,plain-dpo) base=runs/base --output runs/report --overwrite

check: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## ruff, mypy and the fast tests
	$(BIN)/python $(PYTEST) -m "not slow"

slow: setup ## the tests that take minutes
	$(BIN)/python $(PYTEST) -m slow

# uv, for it can ask for the lowest version of each dependency. What tests need comes afterwards, and as new as it fits.
oldest: ## the tests on the lowest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct -e .
	.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python -e ".[test]"
	.venv-oldest/bin/python $(PYTEST) -m "not slow"

newest: ## the tests on the newest versions that pyproject.toml allows, in .venv-newest
	$(MAKE) setup VENV=.venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]" "$(TORCH)"
	.venv-newest/bin/python $(PYTEST) -m "not slow"

wheel: setup ## wheel and sdist in dist/, each installed into an empty environment and used there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build
	PYTHON=$(PYTHON) tests/smoke.sh dist/*.whl
	PYTHON=$(PYTHON) tests/smoke.sh dist/*.tar.gz

clean: ## remove the virtual environments, packages and run folders
	rm -rf $(VENV) .venv-oldest .venv-newest dist build runs
