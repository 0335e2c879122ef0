# jasr: `make quickstart` trains a recogniser in minutes, `make test` runs every test.
# Both make their own environment in .venv the first time and keep it until setup.py changes.
#
#   PYTHON=python3.12    the interpreter that makes the environment (3.11 to 3.13)
#   TORCH=torch==2.13.0  the PyTorch that the tests compare with; empty: whatever pip chooses
#   TORCH_INDEX=URL      where pip finds it: PyTorch publishes an index of CPU-only wheels (the
#                        address is on its "get started" page). Without it pip may choose a
#                        build that brings some 3 GB of CUDA with it
#   EXTRAS=hf,tts,tb,dev the extras of setup.py to install; this choice, with TORCH=, leaves PyTorch
#                        out: the tests that compare with it or with lhotse are skipped
#   PIP_FLAGS=...        for every pip call, e.g. --no-index --find-links=wheels
#   FAST=1               an answer in two minutes: the first test of every file
#   CONSTRAINTS=         the newest version of every package instead of those of constraints.txt,
#                        which were tested; `make test-newest` does so in .venv-newest, and
#                        `make constraints` writes the file anew
#   PYTEST_FLAGS=...     for pytest, e.g. "-x -k ctc"
#   XLA_FLAGS=--xla_backend_optimization_level=3
#                        programs of the tests compiled as a user's are, in two to three times the
#                        time (tests/conftest.py says what they leave out otherwise)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= all,dev
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist worksteal
CONSTRAINTS ?= constraints.txt
PYTHONS ?= python3.11 python3.12 python3.13
FAST ?=
RUN ?= runs/quickstart

BIN := $(VENV)/bin
INSTALL := -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
PIP := $(BIN)/python $(INSTALL) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SUM := $(shell cat setup.py $(CONSTRAINTS) | cksum | cut -d ' ' -f 1)
LIGHT := $(VENV)/.light-$(SUM)
FULL := $(VENV)/.full-$(SUM)

# Compiled programs are kept between runs and shared by the test processes, small ones too.
test: export JASR_CACHE := $(CURDIR)/.cache/xla
test: export JAX_COMPILATION_CACHE_DIR := $(JASR_CACHE)
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1

test: export JASR_FAST := $(FAST)

.PHONY: venv test test-newest constraints quickstart lint bench clean

venv: $(FULL)

test: $(FULL)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# Renews constraints.txt: the newest of everything for each of PYTHONS that is here. PyTorch, and
# lhotse, which needs it, go into the first environment alone. Run `make test` before you commit it.
constraints:
	rm -rf .cache/constraints
	extras=$(EXTRAS) torch=$(TORCH); for python in $(PYTHONS); do \
	  command -v $$python > /dev/null || continue; \
	  $(MAKE) venv PYTHON=$$python VENV=.cache/constraints/$$python CONSTRAINTS= \
	    EXTRAS=$$extras TORCH=$$torch || exit 1; \
	  extras=hf,tts,tb,dev torch=; \
	done
	$(PYTHON) .ci/renew_constraints.py .cache/constraints/*/bin/python > .cache/constraints.txt
	mv .cache/constraints.txt constraints.txt

# Resumes where it was stopped; `make clean` begins anew.
quickstart: $(LIGHT)
	$(BIN)/python -m experiments.prepare_data synth --out_dir=$(RUN)/corpus
	@echo
	$(BIN)/python -m experiments.train --config=configs/quickstart.py --workdir=$(RUN)/model \
	  --config.data.train=$(RUN)/corpus/train.jsonl --config.data.valid=$(RUN)/corpus/valid.jsonl
	@echo
	$(BIN)/python -m experiments.transcribe --checkpoint=$(RUN)/model \
	  $(RUN)/corpus/accents/accents-00000.flac
	@echo
	$(BIN)/python -m experiments.evaluate --checkpoint=$(RUN)/model \
	  --manifest=$(RUN)/corpus/accents.jsonl --label="unseen accents" --output=$(RUN)/accents.json
	@echo
	$(BIN)/python -m experiments.evaluate --checkpoint=$(RUN)/model \
	  --manifest=$(RUN)/corpus/valid.jsonl --label="unseen voices" --output=$(RUN)/valid.json

lint: $(FULL)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

bench: $(FULL)
	$(BIN)/python -m experiments.benchmark all

# Everything, for tests and development. PyTorch first and alone, so that lhotse and
# transformers take the build chosen here.
$(FULL):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)")
	$(PIP) -e ".[$(EXTRAS)]"
	rm -f $(VENV)/.light-* $(VENV)/.full-*
	touch $(FULL) $(LIGHT)

# What a recogniser and a synthetic corpus need: no PyTorch.
$(LIGHT):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[tts]"
	rm -f $(VENV)/.light-* $(VENV)/.full-*
	touch $(LIGHT)

clean:
	rm -rf $(VENV) .venv-newest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info $(RUN)
	find jasr experiments configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
