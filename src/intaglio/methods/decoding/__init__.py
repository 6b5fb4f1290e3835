"""The room of masks over next tokens: what may be said, and how many passes it takes to say it.

Decoders are callables for stock `generate(custom_generate=...)`. Those that draft run through the verify loop
(`intaglio.speculative`), which keeps their output the target's own; the plain drafters they are measured against (prompt
lookup, an n-gram store, a smaller model) live beside it in `intaglio.speculative.drafters`.
"""
