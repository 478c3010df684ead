# Everything a person does here. `make help` lists it; a line's text is the comment behind its target.
.DEFAULT_GOAL := help
.PHONY: docs ready help demo test test-firecracker chaos bench bench-readme bench-engine bench-gateway check format install uninstall clean

BIN := .venv/bin
# Shared by all checkouts of this machine; named by content.
IMAGES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/swarm/images
PYTEST := $(BIN)/python -m pytest

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## set up, then run one ticket by one agent in one microVM and show where its time went
	@tools/bootstrap
	@tools/demo

# What needs a package registry is made before the sandbox closes: packages, the guest image, a Firecracker to test with.
ready:
	@tools/bootstrap dev
	@SWARM_CONFIG=/dev/null SWARM_IMAGES_DIR="$(IMAGES)" $(BIN)/swarm image build
	@SWARM_CONFIG=/dev/null SWARM_IMAGES_DIR="$(IMAGES)" $(BIN)/swarm agent build src/swarm/builtin/agents/claude
	-@$(BIN)/python tools/fetch-firecracker

test: ready  ## set up, then run all tests in a network namespace of their own (ARGS='-k echo' for a part)
	@$(BIN)/python $(if $(ARGS),tools/sandbox.py,tools/parallel_tests.py) $(PYTEST) $(ARGS)

bench: ready  ## measure tickets on this host beside the bare parts, in a network namespace of its own (ARGS='--tickets 1,5')
	@$(BIN)/python tools/sandbox.py $(BIN)/python tools/bench.py $(ARGS)

bench-readme: ready  ## the same with 1, 5, 25 and 100 tickets, into docs/benchmarks.md and docs/bench.svg; on a quiet machine (10 minutes)
	@$(BIN)/python tools/sandbox.py $(BIN)/python tools/bench.py --readme --tickets 1,5,25,100 $(ARGS)

bench-engine:  ## measure the engine without VMs: wake-up, no-op tickets per second, growth, idle cost
	@tools/bootstrap dev
	@$(BIN)/python -m tests.engine.bench $(ARGS)

bench-gateway:  ## measure model calls through the gateway beside direct ones: per call, per streamed chunk, 100 at once
	@tools/bootstrap dev
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.gateway.bench $(ARGS)

chaos: ready  ## the kill campaign: 300 tickets on plain processes, 20 in real VMs (ARGS='--seed 7' repeats one)
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.chaos.campaign --tickets 300 $(ARGS)
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.chaos.campaign --tickets 20 --driver qemu --max-vms 1 $(ARGS)

test-firecracker: ready  ## the tests with real Firecracker guests alone (docs/testing.md says what they need)
	@$(BIN)/python tools/sandbox.py $(PYTEST) tests/vm -k firecracker $(ARGS)

check:  ## style, format, types, who imports whom
	@tools/bootstrap dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q tests/test_imports.py

docs:  ## write the parts of the pages that are made from code
	@tools/bootstrap dev
	$(BIN)/python -m tests.layers

format:  ## put the code into the project's format
	@tools/bootstrap dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install:  ## install on this host: commands on PATH, databases, the echo agent, the guest image (needs root)
	@tools/install

uninstall:  ## remove what `make install` put here; tickets and images stay (PURGE=1 removes them too)
	@tools/uninstall

clean:  ## remove what was built in this checkout (not the image cache)
	rm -rf .venv .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
