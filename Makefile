# Two commands do everything on a fresh Debian machine with Rust:
#
#   make demo   three emulated hosts form a cluster, run a Linux guest, lose their leader
#   make test   every test, the lab's included
#
# What they need they install themselves (`make setup`): Debian packages, and cargo-nextest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
LAB := target/debug/lab
STAMP := target/.setup-done
SECONDS := 60
# Tests on taps need root and /dev/net/tun; where either is missing they are left out, and nextest counts them as skipped.
WITHOUT_TAPS := $(shell [ "$$(id -u)" = 0 ] && [ -w /dev/net/tun ] || echo "and not test(/with_tun/)")

.PHONY: help setup build demo test test-fast lint shows fuzz fuzz-planted clean-lab

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install what this project needs (Debian packages, cargo-nextest)

$(STAMP): lab/packages.txt lab/setup.sh
	@lab/setup.sh "$(SUDO)"
	@mkdir -p target && touch $@

build: setup ## Build every program
	cargo build --workspace --bins

demo: build ## The main job, shown on three emulated hosts
	$(SUDO) $(LAB) demo

test: setup build ## Every test; the lab's run in emulated hosts
	cargo nextest run --workspace -E 'all() $(WITHOUT_TAPS)'

test-fast: ## Tests that need no emulator
	cargo nextest run --workspace -E 'not binary(lab_stories) $(WITHOUT_TAPS)'

lint: ## Format, clippy
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

shows: build ## The long runs behind docs/operations/measured.md (about an hour)
	for story in demo join guest first-boot agent storage migrate plug suspend restart failover lease minority recover poweroff; do $(SUDO) $(LAB) show $$story; done

fuzz: setup ## Every fuzz target for SECONDS (60)
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	for target in $$(cargo fuzz list --fuzz-dir fuzz); do \
		RUSTC_BOOTSTRAP=1 RUSTFLAGS= cargo fuzz run --fuzz-dir fuzz $$target -- -max_total_time=$(SECONDS) -print_final_stats=1 || exit 1; \
	done

fuzz-planted: setup ## Has the fuzz targets of the vmm find faults that are planted for them
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	fuzz/planted/run

clean-lab: ## Stop the lab and forget its disks
	-$(SUDO) $(LAB) down
	rm -rf .lab
