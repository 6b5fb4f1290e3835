# Two commands: `make demo` (the main job on a real model) and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers of one thread each are as fast as one of two, and sums are the same everywhere.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install assets demo lint format test test-slow readme docs docs-serve bench-pruning bench-decoding bench-training bench-attention bench-nm bench-ternary bench-bip bench-lost bench-bitnet bench-transplant bench-recovery bench-blockffn bench-r-sparse bench-r-sparse-decode clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Intaglio needs Python 3.11 or later; say which with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/installed  ## a virtual environment with everything

assets: install  ## fetch the bundled models and texts into the user's cache, once
	$(BIN)/intaglio assets

demo: install  ## prune a real 135M model four ways and look at the report
	$(BIN)/intaglio demo

lint: install  ## style, types, and which layer imports which
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## put the style right
	$(BIN)/ruff check --fix src tests benchmarks docs
	$(BIN)/ruff format src tests benchmarks docs

test: lint  ## lint and the fast tests
	$(TEST) -m "not slow"
	@$(BIN)/python docs/stale.py

test-slow: assets  ## the tests that need the bundled models or more time
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow --durations=10

readme: install  ## write the generated parts of the README anew
	$(BIN)/python docs/readme.py

docs: install  ## build the site into site/; a broken link fails
	$(BIN)/python -m mkdocs build --strict

docs-serve: install  ## show the site on this machine, anew after each change
	$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000

bench-pruning: assets  ## against llm-compressor, in an environment of its own
	$(BIN)/python benchmarks/pruning/run.py

bench-decoding: assets  ## speculative decoding against the modes of transformers
	$(BIN)/python benchmarks/decoding/run.py

bench-training: install  ## what the training loop costs beside a bare one and Trainer
	$(BIN)/python benchmarks/training/run.py

bench-bip: install  ## masks and steps of BiP against torch.nn.utils.prune
	$(BIN)/python benchmarks/bip/run.py

bench-attention: assets  ## visibility rules against the stock model, llm2vec and billm
	$(BIN)/python benchmarks/attention/run.py

bench-nm: install  ## what N:M training costs a step beside plain SR-STE
	$(BIN)/python benchmarks/nm/run.py

bench-ternary: install  ## products from two-bit weights against torch's dense ones and the byte bound
	$(BIN)/python benchmarks/ternary/run.py

bench-lost: install  ## a training step of LOST beside SLTrain's formulation
	$(BIN)/python benchmarks/lost/run.py

bench-bitnet: install  ## training with rounded weights beside bitlinear and torchao (they must be installed)
	$(BIN)/python benchmarks/bitnet/run.py

bench-transplant: assets  ## tokenizer transplants against mergekit, in an environment of its own
	$(BIN)/python benchmarks/transplant/run.py

bench-recovery: assets  ## what a pruned model wins back a token, by what is chosen to train on
	$(BIN)/python benchmarks/recovery/run.py

bench-blockffn: install  ## layers of experts beside the dense product and the byte bound, decoding and drafting
	$(BIN)/python benchmarks/blockffn/run.py

bench-r-sparse: install  ## gathered columns against torch's dense products and the byte bound
	$(BIN)/python benchmarks/r_sparse/run.py

bench-r-sparse-decode: assets  ## SmolLM2 decoding with half of its weights: R-Sparse, TEAL, CATS and Wanda beside the dense model
	$(BIN)/python benchmarks/r_sparse/run.py --decode

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
