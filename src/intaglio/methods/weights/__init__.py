"""Methods that decide which weights stay, and methods that replace weights.

- `drop_blocks`: removes whole blocks, by measured influence or by name; the checkpoint is smaller (a shared step).
- `magnitude`: prunes the smallest weights of each layer; needs no data.
- `wanda`: prunes by |weight| times input norm, row by row.
- `sparsegpt`: prunes column by column and updates the remaining weights.
- `dsnot`: refines the mask of any of the three without training.
- `bitnet`: few bits, ternary by default: quantization-aware training and packed storage.
- `progressive_nm`: gradual N:M pruning during training.
- `bip`: learns the mask while the weights are trained.
- `lost`: low-rank plus column-sparse projections, trained from scratch.
- `omp_transplant`: another model's tokenizer, without training.
- `one_shot`, `sparsity_target`, `topk` (private): one-shot pruning base; sparsity targets and masks; fast selection.
"""
