"""Supervised dictionaries: a direction for each value of each attribute, the skyline of the evaluation.

    mean codes    u_iv = mean(a | attribute i = v) - mean(a)
    MSE codes     U = pinv(CᵀC) CᵀA, least squares of centred activations on one-hot attributes
    a^ = mean(a) + Σ_i u_i,v_i

Dimension letters: N prompts, D width, V values of all attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Attributes = Mapping[str, Tensor]
CodeKind = Literal["mean", "mse"]
CODE_KINDS: tuple[CodeKind, ...] = ("mean", "mse")


@dataclass(frozen=True, eq=False)
class SupervisedDictionary:
    """Codes of attribute values.

    Args:
        mean_D: mean activation.
        codes: `{attribute: [values, D]}`; rows of values without a training prompt are 0.
    """

    mean_D: Tensor
    codes: Mapping[str, Tensor]

    @classmethod
    def from_activations(
        cls, x_ND: Tensor, attributes: Attributes, sizes: Mapping[str, int], kind: CodeKind = "mean"
    ) -> SupervisedDictionary:
        """Fit the codes.

        Args:
            x_ND: activations.
            attributes: int64 [N] each.
            sizes: number of values of each attribute.
            kind: `mean` (default), or `mse`, which is better where attributes depend on each other.
        """
        mean_D = x_ND.double().mean(0)
        centred_ND = x_ND.double() - mean_D
        one_hots = {
            name: torch.nn.functional.one_hot(values.to(x_ND.device), sizes[name]).double()
            for name, values in attributes.items()
        }
        if kind == "mean":
            codes = {name: hot.T @ centred_ND / hot.sum(0).clamp_min(1)[:, None] for name, hot in one_hots.items()}
        else:
            hot_NV = torch.cat(list(one_hots.values()), 1)
            all_VD = torch.linalg.pinv(hot_NV.T @ hot_NV, hermitian=True) @ (hot_NV.T @ centred_ND)
            parts = all_VD.split([hot.shape[1] for hot in one_hots.values()])
            codes = dict(zip(one_hots, parts, strict=True))
        return cls(mean_D.float(), {name: code.float() for name, code in codes.items()})

    def reconstruct(self, attributes: Attributes) -> Tensor:
        """Return mean + Σ u [N, D] for the attributes of prompts."""
        parts = [self.codes[name][values.to(self.mean_D.device)] for name, values in attributes.items()]
        return self.mean_D + torch.stack(parts).sum(0)

    def edit(self, x_ND: Tensor, attribute: str, before: Tensor, after: Tensor, *, projection: bool = False) -> Tensor:
        """Return a - u_v + u_v' [N, D].

        Args:
            x_ND: activations.
            attribute: the attribute that changes.
            before: its values, int64 [N].
            after: its new values.
            projection: removes the activation's projection on u_v instead of u_v itself, a variant of the authors'
                code. Default false.
        """
        code = self.codes[attribute]
        old_ND, new_ND = code[before.to(code.device)], code[after.to(code.device)]
        if projection:
            shares_N = ((x_ND - self.mean_D) * old_ND).sum(1) / old_ND.square().sum(1).clamp_min(1e-12)
            old_ND = shares_N[:, None] * old_ND
        return x_ND - old_ND + new_ND

    def weight(self, attributes: Attributes, attribute: str) -> Tensor:
        """Return the share [N] of the reconstruction that an attribute's code carries; the shares sum to 1."""
        shift_ND = self.reconstruct(attributes) - self.mean_D
        code_ND = self.codes[attribute][attributes[attribute].to(shift_ND.device)]
        return (code_ND * shift_ND).sum(1) / shift_ND.square().sum(1).clamp_min(1e-12)
