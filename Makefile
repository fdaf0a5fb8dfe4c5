# Every target sets up what it needs (a virtual environment, pinned packages) and then does its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .bench/venv
PEERS_READY := $(PEERS)/.ready

.PHONY: help setup quickstart check test test-fast cluster-test chaos soak bench-data bench-train bench-commit bench-recovery bench-submit bench-promote bench-dashboard bench-outage bench-plan bench-quality bench-laws docs lock down clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## the virtual environment with pinned packages

$(READY): pyproject.toml constraints.txt
	@echo "== installing into $(VENV), a minute or two"
	$(PYTHON) -c 'import sys; sys.exit("vitscale needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

quickstart: $(READY)  ## the whole journey on this machine: images to report
	$(BIN)/vitscale quickstart

down: $(READY)  ## end the services that the quickstart left running
	$(BIN)/vitscale down

check: $(READY)  ## format, lint, types
	@echo "== ruff, mypy"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check  ## check, then all tests
	@echo "== pytest, in two lanes"
	$(BIN)/pytest -n 2

test-fast: check  ## check, then the tests that start no services: about a minute
	@echo "== pytest, without services"
	$(BIN)/pytest -m "not services"

lock: $(READY)  ## infra/image/*.txt: the image's packages with their digests, from constraints.txt
	$(PYTHON) -m venv --clear .lock
	.lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/python infra/image/lock.py .lock/bin/uv
	rm -rf .lock

docs: $(READY)  ## docs/reference.md from the code
	$(BIN)/python -m tests.reference_docs

cluster-test: $(READY)  ## several hosts on this machine (root), one cut off ten times: make cluster-test CUTS=3
	VITSCALE_CUTS=$(or $(CUTS),10) $(BIN)/pytest tests/test_hosts.py

chaos: $(READY)  ## kill, stop and starve runs in all ways; a table of promises, trials, violations
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(READY)  ## one row of it for long: make soak ROW=R1 MINUTES=120; adds a line to RESULTS.md
	$(BIN)/python -m tests.chaos --soak $(ROW) --minutes $(or $(MINUTES),120) $(ARGS)

bench-data: $(READY) $(PEERS_READY)  ## the data plane against its peers; needs Ceph: tests/benchmarks/README.md
	$(BIN)/python -m tests.benchmarks.data $(ARGS)
	$(BIN)/python -m tests.benchmarks.data_resume
	$(BIN)/python -m tests.benchmarks.data_memory
	$(BIN)/python -m tests.benchmarks.index_scale

bench-train: $(READY)  ## a training step on the CPU against timm's and Hugging Face's
	$(BIN)/python -m tests.benchmarks.train $(ARGS)

bench-commit: $(READY)  ## how long a commit holds training up, and how fast it gets to the store; needs Ceph, too
	$(BIN)/python -m tests.benchmarks.commit $(ARGS)

bench-recovery: $(READY)  ## how long after a worker's death a run goes on, beside Ray's own restart
	$(BIN)/python -m tests.benchmarks.recovery $(ARGS)

bench-submit: $(READY)  ## seconds from `vitscale submit` to the first step, beside an empty job of Ray Train
	$(BIN)/python -m tests.benchmarks.submit $(ARGS)

bench-promote: $(READY)  ## seconds of `vitscale promote` besides its restore test
	$(BIN)/python -m tests.benchmarks.promote $(ARGS)

bench-dashboard: $(READY)  ## what `vitscale status --watch` takes of a core
	$(BIN)/python -m tests.benchmarks.dashboard $(ARGS)

bench-outage: $(READY)  ## what MLflow's absence costs a training step
	$(BIN)/python -m tests.benchmarks.outage $(ARGS)

bench-plan: $(READY)  ## what plans foretell of memory and time, beside what runs took
	$(BIN)/python -m tests.benchmarks.plan $(ARGS)

bench-quality: $(READY)  ## what models learn: resolutions of fine-tuning, ViT from scratch; a GPU, or many hours
	$(BIN)/python -m tests.benchmarks.quality $(ARGS)

bench-laws: $(READY)  ## scaling laws against M4, broken power laws and others on real curves; a quarter of an hour
	$(BIN)/python -m tests.benchmarks.laws $(ARGS)

$(PEERS_READY): tests/benchmarks/peers.txt
	@$(BIN)/python -m tests.benchmarks.rgw --check
	@echo "== installing the peers into $(PEERS), two minutes and 2 GB"
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/peers.txt
	@touch $(PEERS_READY)

clean:  ## end the services and delete the virtual environment; data in .vitscale stays
	test ! -x $(BIN)/vitscale || $(BIN)/vitscale down
	rm -rf $(VENV)
