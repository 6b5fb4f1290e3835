"""Masks over attention: who sees whom.

- `layerwise_unmasking`: takes the causal mask off groups of layers of a decoder that labels tokens.

What rules are, and how they get into stock models, is in `intaglio.masks`.
"""
