"""Masks over weights: which parameters live; and surgery on them.

What lives here:

- `magnitude`: the smallest weights of each layer go; needs no data.
- `wanda`: |weight| times input norm, row by row.
- `sparsegpt`: column by column with compensation by the rest of the row.
- `dsnot`: refines the mask of any of the three without training.
- `omp_transplant`: another model's tokenizer, without training.
- `amount` (private): `sparsity` or `pattern`, and the masks they ask for.
- `pruning` (private): what every pruning step does around its own rule.
"""
