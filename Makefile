# Everything a developer runs. `make help` lists the targets, with the comment behind each.
.DEFAULT_GOAL := help
.PHONY: docs ready help demo test test-quick test-firecracker chaos bench bench-readme bench-engine bench-gateway simulate check format install uninstall clean

BIN := .venv/bin
# The image cache, shared by all checkouts on this machine; images are named by content.
IMAGES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/swarm/images
PYTEST := $(BIN)/python -m pytest
# Large built-in agents whose layers are built for tests; those of the others are skipped. mini-swe: 2 GB, some minutes.
AGENTS := claude-code

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo:  ## set up, then run one ticket in a microVM and show where its time went
	@tools/bootstrap
	@tools/demo

# Fetched before the sandbox cuts off the network: packages, the guest image, what only tests use (Firecracker, …).
ready:
	@tools/bootstrap dev
	@# Tests start thousands of commands: a third of a command's time is compiling, where Python may not keep the result.
	@$(BIN)/python -m compileall -q -x /builtin/ src
	@SWARM_CONFIG=/dev/null SWARM_IMAGES_DIR="$(IMAGES)" $(BIN)/swarm image build
	@SWARM_CONFIG=/dev/null SWARM_IMAGES_DIR="$(IMAGES)" $(BIN)/swarm agent build src/swarm/builtin/agents/claude
	@# For this host and for VMs at the same time.
	-@SWARM_CONFIG=/dev/null; SWARM_IMAGES_DIR="$(IMAGES)"; export SWARM_CONFIG SWARM_IMAGES_DIR; \
	for name in $(AGENTS); do SWARM_DRIVER=process $(BIN)/swarm agent build src/swarm/builtin/agents/$$name; done & \
	for name in $(AGENTS); do $(BIN)/swarm agent build src/swarm/builtin/agents/$$name; done; wait
	-@$(BIN)/python tools/fetch-firecracker
	-@$(BIN)/python -m tests.clients_here
	-@$(BIN)/python -m tests.prometheus_here
	-@$(BIN)/python -m tests.postgres_here
	-@$(BIN)/python -m tests.oci_here
	-@$(BIN)/python -m tests.containers_here
	-@$(BIN)/python -m tests.pgbouncer_here

test: ready  ## set up, then run all tests in network namespaces of their own (ARGS='-k echo' runs some)
	@$(BIN)/python $(if $(ARGS),tools/sandbox.py,tools/parallel_tests.py) $(PYTEST) $(ARGS)

test-quick:  ## set up without VMs, then run the tests that need neither VMs nor root, without slow ones (under a minute)
	@tools/bootstrap dev
	@$(PYTEST) -q -n auto -m "not needs and not slow" $(ARGS)

bench: ready  ## measure tickets on this host, beside what the bare parts need (ARGS='--tickets 1,5')
	@$(BIN)/python tools/sandbox.py $(BIN)/python tools/bench.py $(ARGS)

bench-readme: ready  ## write docs/benchmarks.md and docs/bench.svg: 1, 5, 25 and 100 tickets; on a quiet machine (10 minutes)
	@$(BIN)/python tools/sandbox.py $(BIN)/python tools/bench.py --write-docs --tickets 1,5,25,100 $(ARGS)

bench-engine:  ## measure the engine without VMs: wake-up, no-op tickets per second, growth, cost while idle
	@tools/bootstrap dev
	@$(BIN)/python -m tests.engine.bench $(ARGS)

simulate:  ## 1 to 50 engines on one PostgreSQL (ARGS='--engines 1,4', ARGS='rows listeners connections'; --write-docs: docs/scale.md)
	@tools/bootstrap dev
	@$(BIN)/python -m tests.engine.simulate $(ARGS)

bench-gateway:  ## measure model calls through the gateway beside a bare relay: chunks, calls a second (ARGS=--write-docs)
	@tools/bootstrap dev
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.gateway.bench $(ARGS)

chaos: ready  ## run the kill campaign: 300 tickets on plain processes, 20 in real VMs, sandboxes (ARGS='--seed 7' repeats a run)
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.chaos.campaign --tickets 300 --kills 30 --guilty 1 $(ARGS)
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.chaos.campaign --tickets 20 --driver qemu --max-vms 1 $(ARGS)
	@$(BIN)/python tools/sandbox.py $(BIN)/python -m tests.chaos.sandboxes $(ARGS)

test-firecracker: ready  ## run only the tests with real Firecracker guests (docs/testing.md says what they need)
	@$(BIN)/python tools/sandbox.py $(PYTEST) tests/vm -k firecracker $(ARGS)

check:  ## check style, format, types, which package imports which, and that docs/openapi.json is the server's
	@tools/bootstrap dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q tests/test_imports.py tests/api/test_openapi.py::test_it_is_the_committed_one

docs:  ## write what is generated from code: parts of the pages, the SDK's synchronous client
	@tools/bootstrap dev
	$(BIN)/python -m tests.layers
	$(BIN)/python -m tests.api.described
	$(BIN)/python -m tests.client.made

format:  ## fix what ruff can fix, and format the code
	@tools/bootstrap dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

install:  ## install on this host: commands on PATH, database, agents, guest image (needs root)
	@tools/install

uninstall:  ## remove what `make install` installed; tickets and images stay (PURGE=1 removes them too)
	@tools/uninstall

clean:  ## remove what was built in this checkout (not the image cache)
	rm -rf .venv .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
