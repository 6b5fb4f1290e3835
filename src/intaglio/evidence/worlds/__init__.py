"""Worlds: a model and data that experiments share, seeded, split and sealed.

- `smollm2`: SmolLM2-135M-Instruct with Wikipedia, for what is carved without training.
"""
