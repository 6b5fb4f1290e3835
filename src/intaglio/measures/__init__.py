"""Metrics of a checkpoint; each takes a checkpoint and data and returns plain values.

- `quality`: perplexity, bits per byte, agreement with the original (for an encoder: cosine of embeddings).
- `zeros`: weight sparsity of every projection.
- `firing`, `units`: activation sparsity; share of skipped inputs.
- `speed`: prefill and decode tokens per second.
- `memory`: peak memory of a block of code.
- `labels`: token-classification metrics.
- `board`: how well single neurons predict a known state.
- `side`: all of them, for one side of a before/after report.
"""
