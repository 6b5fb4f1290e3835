"""Numbers about a checkpoint; each measure takes a checkpoint and data and returns plain values.

What lives here:

- `quality`: perplexity, bits per byte, agreement with the original (an encoder: cosine of its embeddings).
- `zeros`: the share of zeros of every projection.
- `speed`: prefill and decode tokens per second.
- `memory`: peak memory of a piece of work.
- `board`: how much of a known state single neurons tell.
- `side`: the others together, one side of a before/after report.
"""
