"""Masks over tokens: what the model must predict.

- `meap`: hides a small share of the input tokens, then ordinary next-token prediction.
"""
