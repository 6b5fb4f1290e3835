"""Masks over units: which units of a layer fire, for which token.

What lives here:

- `blockffn`: experts behind a ReLU router, trained so that few fire, and for runs of tokens the same.
"""
