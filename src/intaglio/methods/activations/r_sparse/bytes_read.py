"""Bytes of the blocks' projections that a token reads: dense, by R-Sparse, by TEAL and by CATS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from intaglio.checkpoint import Checkpoint
from intaglio.methods.activations.r_sparse.layers import SparseLinear, ThresholdedActivation
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.replacement import module_names


@dataclass(frozen=True)
class BytesRead:
    """Bytes of the projections of each block.

    Args:
        read: bytes that a token reads, low-rank factors included; one number a block.
        dense: bytes of the weights.
    """

    read: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def share(self) -> float:
        """Bytes read over bytes of the weights, all blocks together."""
        return sum(self.read) / sum(self.dense)


def measure_bytes_read(checkpoint: Checkpoint, left_out: Mapping[str, float] | None = None) -> BytesRead:
    """Return the bytes that a token reads of the weights of each block's projections.

    Args:
        checkpoint: with sparse layers, or without: then everything is read.
        left_out: by module name, the share of the inputs that each leaves out on some text, from
            `measures.units.counted`: it differs from the share that was calibrated. Default: none.
    """
    parts, names, left_out = anatomy(checkpoint.model), module_names(checkpoint.model), left_out or {}
    all_read, all_dense = [], []
    for index, block in enumerate(parts.blocks):
        size = {
            linear.role: float(linear.shape[0] * linear.shape[1] * linear.read().element_size())
            for linear in parts.linears(index)
        }
        read = dense = sum(size.values())
        for module in block.modules():
            if isinstance(module, SparseLinear):
                element = module.weight.element_size()
                whole = float(module.in_features * module.out_features * element)
                dense += whole
                read += (1 - left_out.get(names[id(module)], 0.0)) * whole
                read += module.rank * (module.in_features + module.out_features) * element
            elif isinstance(module, ThresholdedActivation):
                # A unit that is off needs no row of `up`; its column of `down` is counted there.
                read -= left_out.get(names[id(module)], 0.0) * size["up"]
        all_read.append(read)
        all_dense.append(dense)
    return BytesRead(tuple(all_read), tuple(all_dense))
