"""Kernels: products that stock torch has no fast form of, as machinery for methods.

Each has a slow form in plain torch, which says what it computes and runs wherever the fast one cannot.

What lives here:

- `grouped`: rows with a matrix each, as experts multiply: torch's own grouped product, or one a matrix.
- `ternary`: weights of -1, 0 and 1 in two bits each, and the matrix product from them.
  - `ternary_numba`, `ternary_simd`: it on a CPU, and the vector instructions under it.
  - `ternary_triton`: it on a GPU.
- `experts`: experts of which each token takes some, reading those alone that some token takes.
  - `experts_numba`: it on a CPU. `experts_triton`: it on a GPU.
- `gather`: a matrix product from the columns of some inputs, chosen by a threshold.
  - `gather_numba`: it on a CPU.
  - `gather_triton`: it on a GPU, for one token.
- `rows`: some rows of a weight against some vectors, as the two above multiply on a CPU.
- `addresses`, `vectors`: what those of a CPU share. `shared`: what all do.

Nothing is compiled, and neither numba nor triton imported, before a product is asked for.
"""
