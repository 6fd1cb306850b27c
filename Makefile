# Everything runs in .venv, which `make setup` creates from the locked requirements.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SHELL := /bin/bash
PROTOS := $(shell cd protos && find tally -name '*.proto' | sort)
# Each process has stores of its own, and runs whole files, in which tests share what they started.
PARALLEL := --numprocesses $(or $(PROCESSES),2) --dist loadfile --no-loadscope-reorder
SERVICES := $(shell cd protos && find tally -name '*_service.proto' | sort)

# A .venv whose Python or packages are gone, as after an upgrade of Python, is made anew.
ifneq ($(wildcard $(VENV)/.ready),)
PROBE := import pip, asyncpg, grpc, nats, redis, typer, tally.poll.v1.poll_pb2
ifneq ($(shell $(BIN)/python -c '$(PROBE)' >/dev/null 2>&1 && echo whole),whole)
$(shell rm -f $(VENV)/.ready)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup up demo demo-dual-write test quickstarts check-wheel release-check fuzz bench bench-quick generate generate/verify verify format lint lock release-contract

help: ## list the targets
	@grep -hE '^[a-z/-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## create .venv with the locked dependencies

# Without its mark .ready, a .venv was left half-made by an interruption, whenever that was, and is not built upon.
$(VENV)/.ready: requirements.lock tools/generator.lock pyproject.toml gen/VERSION command_server/_ballots.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tally needs Python 3.11 or newer; set PYTHON=python3.x")'
	test -f $@ || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	rm -f $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target $(VENV)/generator -r tools/generator.lock
	touch $@

up: setup ## start everything on this machine: Postgres, NATS, Redis and the four services
	tally up

demo: setup ## count a real election of 80,101 ballots, end to end
	python examples/demo.py

demo-dual-write: setup ## kill a service between its write and its publish, without and with an outbox
	python -m examples.dual_write

test: setup ## unit, integration and contract tests against real servers, by PROCESSES (2)
	pytest $(PARALLEL)

test-unit: setup ## the tests that need no server
	pytest $(PARALLEL) tests/unit

quickstarts: setup ## run the quick starts in examples/ against a running Tally; needs node and npm
	python -m pytest examples

check-wheel: setup ## install Tally as a wheel with another Python, with and without a C compiler, and count votes
	python tools/check_wheel.py

release-check: setup ## build wheel and sdist into dist/, and count votes with each in an empty environment
	python -m tools.check_release

fuzz: setup ## fuzz the compiled code with sanitizers, for SECONDS (60)
	python tools/fuzz_ballots.py $(or $(SECONDS),60)

bench-quick: setup ## run every benchmark once and small, only to see that it runs
	python -m benchmarks --quick --output build/bench-quick.jsonl

bench: setup ## measure this machine against its own limits
	python -m benchmarks

generate: setup ## regenerate gen/ from protos/
	tools/generate.sh gen

generate/verify: setup
	tools/generate.sh --verify

format: setup ## format the code and the protos
	ruff format .
	ruff check --fix-only --quiet .
	buf format -w protos

verify: setup generate/verify ## format, lint, types, protos, and that gen/ is up to date
	ruff format --check .
	ruff check .
	mypy
	buf format --diff --exit-code protos
	buf lint
	buf breaking protos --against protos/released.binpb

release-contract: setup ## record the protos as the released contract that `buf breaking` compares with
	buf build protos --exclude-source-info -o protos/released.binpb

lock: setup ## resolve requirements.lock anew
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-header --no-emit-index-url \
		--upgrade pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --no-deps --generate-hashes --no-header --no-emit-index-url \
		tools/generator.in -o tools/generator.lock
