"""Methods that decide which units of a layer fire for a token.

- `blockffn`: experts with a ReLU router, trained so that few fire, and consecutive tokens share them.
- `moe_x`: experts of ReLU units, and a router without weights that picks those expected to be sparsest.
- `r_sparse`: the columns of a weight that matter to a token, and a low rank for the rest; TEAL and CATS as baselines.
"""
