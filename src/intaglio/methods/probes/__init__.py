"""Methods that read a model: evaluations and diagnostics.

- `markov_lm`: entropies, information surplus, Fisher metric and spectral alignment of a language model's steps.
"""
