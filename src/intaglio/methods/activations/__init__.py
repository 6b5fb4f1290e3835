"""Masks over units: which units of a layer fire, for which token.

What lives here:

- `blockffn`: experts behind a ReLU router, trained so that few fire, and for runs of tokens the same.
- `moe_x`: experts of ReLU units, and a router without weights that picks those expected to be sparsest.
- `r_sparse`: the columns of a weight that matter to a token, and a low rank for the rest; with TEAL and CATS beside it.
"""
