# Start with `make demo` (prune a real model) or `make test`; both set up the environment they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers with one thread each: as fast as one with two, and with the same sums on every machine.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help install assets demo lint format test test-slow mutants pins catalogue new-method readme docs docs-serve wheel wheel-test guard bench-pruning bench-decoding bench-training bench-attention bench-nm bench-ternary bench-bip bench-lost bench-bitnet bench-transplant bench-recovery bench-search bench-recommend bench-retrieval bench-blockffn bench-r-sparse bench-r-sparse-decode bench-control bench-features bench-latents bench-long-context bench-combiner clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Intaglio needs Python 3.11 or later; choose one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/installed  ## create .venv with the package and the development dependencies

assets: install  ## download the bundled models and texts into the user's cache, once
	$(BIN)/intaglio assets

demo: install  ## prune a real 135M-parameter model and compare the results
	$(BIN)/intaglio demo

lint: install  ## check style, types and import layers
	$(BIN)/ruff format --check src tests benchmarks docs tools
	$(BIN)/ruff check src tests benchmarks docs tools
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## fix style
	$(BIN)/ruff check --fix src tests benchmarks docs tools
	$(BIN)/ruff format src tests benchmarks docs tools

test: lint  ## lint and the fast tests
	$(TEST) -m "not slow"
	@$(BIN)/python docs/stale.py

test-slow: assets  ## tests that need the bundled models or more time
	$(TEST) -m slow --durations=10

mutants: install  ## change one thing at a time in the methods and see whether their tests notice (an hour)
	$(BIN)/python tools/mutants.py

pins: install  ## write the pinned defaults, presets and estimates of all methods
	$(BIN)/python tools/pins.py

catalogue: install  ## write the table of methods from their classes
	$(BIN)/python tools/catalogue.py

new-method: install  ## write the skeleton of a method and its tests: SLUG=row_norm AREA=weights
	$(BIN)/python tools/new_method.py "$(SLUG)" "$(AREA)"

readme: install  ## write the generated parts of the README
	$(BIN)/python docs/readme.py

docs: install  ## build the site into site/, with broken links as errors
	$(BIN)/python -m mkdocs build --strict

wheel: install  ## build dist/intaglio-*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

wheel-test: wheel  ## run the wheel's commands in an empty environment
	$(BIN)/python tools/check_wheel.py dist

docs-serve: install  ## serve the site locally and rebuild on changes
	$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000

bench-pruning: assets  ## pruning against llm-compressor, in its own environment
	$(BIN)/python benchmarks/pruning/run.py

guard: assets  ## compare every fast path with stock on this machine; fails if one is slower by more than 3 %
	$(BIN)/python benchmarks/guard.py

bench-decoding: assets  ## speculative decoding against the modes of transformers
	$(BIN)/python benchmarks/decoding/run.py

bench-training: install  ## the training loop against a bare loop and Trainer
	$(BIN)/python benchmarks/training/run.py

bench-bip: install  ## BiP against torch.nn.utils.prune
	$(BIN)/python benchmarks/bip/run.py

bench-attention: assets  ## visibility rules against the stock model, llm2vec and billm
	$(BIN)/python benchmarks/attention/run.py

bench-nm: install  ## N:M training against plain SR-STE
	$(BIN)/python benchmarks/nm/run.py

bench-ternary: install  ## products from two-bit weights against dense products and the bandwidth bound
	$(BIN)/python benchmarks/ternary/run.py

bench-lost: install  ## a LOST training step against SLTrain's formulation
	$(BIN)/python benchmarks/lost/run.py

bench-bitnet: install  ## training with rounded weights against bitlinear and torchao (must be installed)
	$(BIN)/python benchmarks/bitnet/run.py

bench-transplant: assets  ## tokenizer transplants against mergekit, in its own environment
	$(BIN)/python benchmarks/transplant/run.py

bench-features: assets  ## sparse autoencoders against sae_lens, in its own environment
	$(BIN)/python benchmarks/features/run.py

bench-latents: install  ## latents and key-value bottlenecks against lucidrains' libraries, in their own environment
	$(BIN)/python benchmarks/latents/run.py

bench-search: install  ## search against scipy, bm25s, numpy, Seismic and milvus-lite
	$(BIN)/python benchmarks/search/run.py

bench-recovery: assets  ## recovery of a pruned model by data selection, per training token
	$(BIN)/python benchmarks/recovery/run.py

bench-blockffn: install  ## expert layers against the dense product and the bandwidth bound
	$(BIN)/python benchmarks/blockffn/run.py

bench-retrieval: assets  ## encoders against sentence-transformers: equal losses, training speed, quality, throughput
	$(BIN)/python benchmarks/retrieval/run.py

bench-recommend: assets  ## BERT4Rec on MovieLens-100K against RecTools
	$(BIN)/python benchmarks/recommend/run.py

bench-r-sparse: install  ## gathered columns against dense products and the bandwidth bound
	$(BIN)/python benchmarks/r_sparse/run.py

bench-r-sparse-decode: assets  ## SmolLM2 decoding with R-Sparse, TEAL, CATS and Wanda against the dense model
	$(BIN)/python benchmarks/r_sparse/run.py --decode

bench-control: assets  ## constrained sampling against masking, genlm-control and xgrammar, in their own environment
	$(BIN)/python benchmarks/control/run.py

bench-long-context: assets  ## sparse attention against dense SDPA with SmolLM2 at 2k to 7.5k tokens
	$(BIN)/python benchmarks/long_context/run.py
	$(BIN)/python benchmarks/long_context/run.py --prefill --rounds 1

bench-combiner: install  ## time and memory of Combiner's attention by length, against SDPA
	$(BIN)/python benchmarks/long_context/combiner.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
