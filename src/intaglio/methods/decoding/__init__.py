"""Decoding methods: which next tokens are allowed, and how many model passes they cost.

Decoders are callables for stock `generate(custom_generate=...)`. Those that draft run through the speculative loop
(`intaglio.speculative`), which keeps their output the target's own; their baselines (prompt lookup, an n-gram store, a
smaller model) are in `intaglio.speculative.drafters`.
"""
