"""Kernels for products that stock torch has no fast form of.

Each has a reference form in plain torch, which runs wherever the fast one cannot.

- `grouped_mm`: grouped GEMM, rows with a matrix each.
- `ternary`: weights of -1, 0 and 1 in two bits each, and the matrix product (`ternary_numba` with `ternary_simd` on a
  CPU, `ternary_triton` on a GPU).
- `sparse_experts`: sparse non-gated MoE product (`sparse_experts_numba`, `sparse_experts_triton`).
- `gather`: a product from the columns of selected inputs (`gather_numba`; `gather_triton` for one token).
- `row_dot_llvm`: dot and axpy of some rows with some vectors, under the CPU kernels of `sparse_experts` and `gather`.
- `numba_pointers`, `llvm_emitter`: shared by the CPU kernels. `_utils`: shared by all.

Nothing is compiled, and neither numba nor triton imported, before a product is requested.
"""
