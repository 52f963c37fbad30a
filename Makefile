# Names the commands. What they do is in e2e/ (the cluster, the demo, the tests) and in the crates themselves.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/strata/target
BIN := $(CARGO_TARGET_DIR)/debug
CACHE := $(or $(STRATA_CACHE),$(HOME)/.cache/strata)
CARGO_DENY := 0.20.2
# The cluster of the demo: empty for one on this machine, `current` for that of the kubectl context, which then needs
# a registry that it can pull from.
CLUSTER ?=
REGISTRY ?=
# With several nodes: the storage class of volumes that pods of several nodes can share.
STORAGE_CLASS ?=
WHERE := --cluster "$(CLUSTER)" --registry "$(REGISTRY)" --storage-class "$(STORAGE_CLASS)"
# The slot of the tests' cluster; the demo has slot 0, so that both can run at once. The longest test has a cluster of its own.
SLOT ?= 1
STORY_SLOT ?= 2
RESOURCES ?= 10000
NODES ?= 1000
# Always the whole workspace, filtered by target: with `-p`, cargo would choose other features and compile all anew.
E2E := bed health manifests chart bad_input plugin release autoscale monitoring placement endpoint story
# What answers chats, and so needs processors for itself: after the others.
CHATS := autoscale endpoint

.DEFAULT_GOAL := help
.PHONY: help demo demo-down test preflight lint lint-cuda deny generate generated test-unit test-e2e test-e2e-most test-e2e-story test-gang test-argocd test-interop test-clients bench-serve bench-autoscale bench-operator test-parity performance-page soak-serve fuzz programs bed bed-down

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: preflight programs ## A real model life on a real cluster: from raw text to a chat (CLUSTER=current REGISTRY=… for your own)
	$(BIN)/demo $(WHERE)

demo-down: programs ## Remove all that the demo made
	$(BIN)/demo --down $(WHERE)

test: preflight lint lint-cuda deny generated test-unit test-e2e ## All tests

# What cannot be installed is named before anything is compiled.
preflight:
	@test "$(CLUSTER)" = current || test "$$(id -u)" = 0 || { echo "needs root: it starts a Kubernetes in namespaces of its own"; exit 1; }
	@command -v cargo >/dev/null || { echo "needs Rust: install it with rustup"; exit 1; }
	@command -v go >/dev/null || { echo "needs Go 1.21 or later: it compiles Kubernetes' programs"; exit 1; }
	@command -v cc >/dev/null || { apt-get update --quiet && apt-get install --yes --quiet gcc libc6-dev; }
	@test -x $(BIN)/bed || echo "compiling Strata: about 8 minutes on 2 cores the first time"

lint: ## Format and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

lint-cuda: ## Type-check the CUDA build; needs neither a GPU nor NVIDIA's compiler
	NVCC="$(CURDIR)/.ci/nvcc" CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000 \
		cargo clippy --workspace --features strata-runtime/cuda -- -D warnings

deny: ## Licences, sources and bans of the dependencies, as deny.toml says
	test -x $(CACHE)/cargo-deny/bin/cargo-deny || cargo install --quiet --locked --root $(CACHE)/cargo-deny cargo-deny@$(CARGO_DENY)
	PATH=$(CACHE)/cargo-deny/bin:$$PATH cargo deny --log-level error check bans licenses sources

generate: programs ## Write the CRDs and the reference anew
	$(BIN)/crdgen .

generated: programs ## Check that the generated files are in step with the code
	@new=$$(mktemp -d) && trap 'rm -r "$$new"' EXIT \
	&& $(BIN)/crdgen "$$new" \
	&& for file in $$(cd "$$new" && find . -type f); do diff -u "$$file" "$$new/$$file" || exit 1; done \
	|| { echo "generated files are out of step: run 'make generate' and commit"; exit 1; }

test-unit: programs ## Unit, property and mock-server tests
	$(BIN)/bed model >/dev/null
	cargo test --workspace --lib --bins
	cargo test --workspace --exclude strata-e2e --test '*'

# Test programs by name; without a name, cargo would run all that there are.
tests = $(if $(1),cargo test --workspace $(1:%=--test %),true)

# A command on the cluster of a slot, which stays up when it fails: $(call on-bed,SLOT,COMMAND).
define on-bed
$(BIN)/bed up --slot $(1)
	$(BIN)/bed images --slot $(1)
	eval "$$($(BIN)/bed env --slot $(1))" && $(2)
	$(BIN)/bed down --slot $(1)
endef

# Side by side, as the story computes for minutes while most of the others wait for Kubernetes.
test-e2e: programs ## Tests on two real clusters; one stays up when a test fails
	$(BIN)/bed build --tools
	cargo test --workspace $(E2E:%=--test %) --no-run
	@echo "the tests run on two clusters; each prints its part when it ends, after up to 8 minutes"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target \
		$(if $(filter-out story,$(E2E)),test-e2e-most) $(if $(filter story,$(E2E)),test-e2e-story)

test-e2e-most:
	$(call on-bed,$(SLOT),$(call tests,$(filter-out story $(CHATS),$(E2E))) && $(call tests,$(filter $(CHATS),$(E2E))))

test-e2e-story:
	$(call on-bed,$(STORY_SLOT),$(call tests,story))

test-gang: programs ## Kueue's queues, JobSet and several nodes, with the real Kueue and JobSet (+5 minutes the first time)
	$(BIN)/bed build --tools --queues
	$(call on-bed,$(SLOT),$(call tests,gang))

test-argocd: programs ## The real Argo CD on the tests' cluster: health, sync, self-heal, prune, no drift (+15 minutes the first time)
	$(BIN)/bed build --tools --argo-cd
	$(call on-bed,$(SLOT),$(call tests,argocd))

test-interop: programs ## transformers, PEFT, datasets and openai against what is published and served (3 GB of Python packages)
	cargo build --workspace --examples
	e2e/interop/run $(BIN)

test-clients: programs ## Clients of OpenAI and Azure OpenAI, at their newest versions, against the real server (1.5 GB of packages)
	e2e/clients/run $(BIN)

bench-serve: programs ## Speed beside a llama.cpp compiled here (BENCH_QUICK=1: 3 minutes instead of 15; the first time +20 to compile it)
	cargo build --workspace --examples
	python3 -B e2e/bench/serve.py $(BIN) $(CARGO_TARGET_DIR)/bench-serve.json

bench-autoscale: ## The scaling policy beside HPA, KEDA, llm-d's rule and fixed fleets, on a recorded load (5 minutes); writes its page
	cargo build -p strata-replay
	$(BIN)/bench-autoscale operator/replay/data/azure-llm-trace-2023-conv.csv.gz $(CARGO_TARGET_DIR)/bench-autoscale.json > $(CARGO_TARGET_DIR)/bench-autoscale.txt
	python3 -B e2e/bench/autoscale.py $(CARGO_TARGET_DIR)/bench-autoscale.json
	@cat $(CARGO_TARGET_DIR)/bench-autoscale.txt

test-parity: programs ## The same numbers and texts as transformers, llama.cpp and Jinja2 (3 GB of Python packages)
	cargo build --workspace --examples
	e2e/bench/parity $(BIN) $(CARGO_TARGET_DIR)/parity.json $(wildcard ../shared/data/gsm8k-test.jsonl)

bench-operator: programs ## RESOURCES (10000) on NODES (1000) that are not there, beside Kubernetes' own Job controller (35 minutes)
	$(BIN)/bed build --tools
	$(BIN)/bench-operator --slot $(SLOT) --resources $(RESOURCES) --nodes $(NODES)

performance-page: ## Write what the two above measured into docs/performance.md
	python3 -B e2e/bench/page.py $(CARGO_TARGET_DIR)/bench-serve.json $(CARGO_TARGET_DIR)/parity.json

soak-serve: programs ## MINUTES (10) of 64 clients that behave badly
	cargo build --workspace --examples
	$(BIN)/examples/soak $(BIN)/strata-runtime $(MINUTES)

fuzz: ## FUZZ_SECONDS (60) of damaged input for each of requests, GGUF, folders and chat templates
	e2e/fuzz/run

programs:
	cargo build --workspace --bins

bed: programs ## Bring up the tests' cluster with the images and tools of the tests
	$(BIN)/bed build --tools
	$(BIN)/bed up --slot $(SLOT)
	$(BIN)/bed images --slot $(SLOT)

bed-down: programs ## Take the tests' cluster down
	$(BIN)/bed down --slot $(SLOT)
