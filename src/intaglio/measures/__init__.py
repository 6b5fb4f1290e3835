"""Metrics of a checkpoint; each takes a checkpoint and data and returns plain values.

- `language_modeling`: perplexity, bits per byte, agreement with the original (for an encoder: cosine of embeddings).
- `weight_sparsity`: weight sparsity of every projection.
- `activation_sparsity`, `input_sparsity`: activation sparsity; share of skipped inputs.
- `speed`: prefill and decode tokens per second.
- `memory`: peak memory of a block of code.
- `generated_text`: repetition, diversity and overlap of outputs, their log-probability, oracle score, entropy.
- `infilling`: filling holes in texts, and the middle lines by which it is measured.
- `token_classification`: token-classification metrics.
- `feature_coverage`: how well single neurons predict a known state.
- `lexical_invariance`: substitution ciphers and the recovery of their keys.
- `evaluate`: all of them, for one side of a before/after report.
"""
