"""Masks over units: which units of a layer fire, for which token.

What lives here:

- `r_sparse`: the columns of a weight that matter to a token, and a low rank for the rest; with TEAL and CATS beside it.
"""
