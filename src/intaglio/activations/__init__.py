"""Masks over units: which units of a layer fire, for which token.

What lives here:

- `moe_x`: experts of ReLU units, and a router without weights that picks those expected to be sparsest.
"""
