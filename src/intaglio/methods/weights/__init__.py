"""Masks over weights: which parameters live; and surgery on them.

What lives here:

- `drop_blocks`: whole blocks go, by their measured influence or by name; the checkpoint is smaller (a shared step).
- `magnitude`: the smallest weights of each layer go; needs no data.
- `wanda`: |weight| times input norm, row by row.
- `sparsegpt`: column by column with compensation by the rest of the row.
- `bitnet`: few bits, ternary by default: training with the rounded weights, and packed storage.
- `dsnot`: refines the mask of any of the three without training.
- `progressive_nm`: N:M zeros that come by degrees while a model is trained.
- `bip`: learns the mask while the weights are trained; for any module, too.
- `lost`: a low-rank pair and a few whole columns in the place of each projection, trained from scratch.
- `omp_transplant`: another model's tokenizer, without training.
- `factors` (private): masks as numbers.
- `order` (private): the k-th smallest of many numbers, and masks of the largest.
- `amount` (private): `sparsity` or `pattern`, and the masks they ask for.
- `pruning` (private): what every pruning step does around its own rule.
"""
