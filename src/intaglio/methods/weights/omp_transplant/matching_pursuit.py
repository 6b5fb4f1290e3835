"""Batched orthogonal matching pursuit, and matching pursuit with a rotation for each atom.

For a target y, atoms A (N rows), a support S (empty) and the residual r = y, k times:

    j* = argmax over j not in S of |<r, A_j>|       S += j*       c = argmin ||y - A_S^T c||       r = y - A_S^T c

Atoms are not normalised, which favours those of a large norm. The selected atoms are kept as Q R, one column per step.

Dimension letters: T targets, B targets at a time, N atoms, D width of atoms and targets, K atoms of a support, t atoms
selected so far, E width of other atoms, H heads, F frequencies of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 512
GRAM_BYTES = 2 << 30
"""Memory limit of the atoms' Gram matrix."""
GRAM_WORTH = 16
"""The Gram matrix pays up to a support of width / 16 atoms: beyond that a product with all atoms is faster
than reading so many of its rows."""
DEPENDENT = {torch.float32: 1e-4, torch.float64: 1e-8}
"""An atom with less than this share of its norm outside the span of the selected ones adds only noise."""
REORTHOGONALISE = 0.7
"""An atom left with less than this share of its norm is orthogonalised again, which suffices (Kahan)."""
ZERO_RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-14}
"""A residual below this share of its target's norm is rounding error."""


@dataclass(frozen=True)
class SparseCode:
    """Targets as combinations of few atoms: distinct indices (int64) and their coefficients."""

    support_TK: Tensor
    weight_TK: Tensor

    def combine(self, atoms_NE: Tensor) -> Tensor:
        """Return the same combinations of other atoms [T, E]."""
        return F.embedding_bag(
            self.support_TK, atoms_NE.contiguous(), mode="sum", per_sample_weights=self.weight_TK.to(atoms_NE.dtype)
        )


def omp(
    y_TD: Tensor,
    atoms_ND: Tensor,
    k: int,
    *,
    batch: int = BATCH,
    gram_bytes: int = GRAM_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> SparseCode:
    """Code targets by k atoms each.

    The result is that of the plain algorithm. Where the atoms' Gram matrix fits into memory, small supports are scored
    against all atoms by A r = A y - (A A^T)_S c, without a product with every atom.

    Args:
        y_TD: targets, float32 or float64.
        atoms_ND: the dictionary, likewise.
        k: atoms of each target, at most N.
        batch: targets at a time; affects results only by rounding. Default 512.
        gram_bytes: memory limit of the Gram matrix; 0 disables it. Default 2 GiB.
        progress: called with the number of targets done.

    Raises:
        ValueError: k is not from 1 to N.
    """
    atoms, width = atoms_ND.shape
    if not 1 <= k <= atoms:
        raise ValueError(f"k is {k}; from 1 to {atoms} atoms can be selected")
    gram_pays = k > 1 and width >= GRAM_WORTH and len(y_TD) * min(k, width // GRAM_WORTH) > atoms
    fits = atoms * atoms * atoms_ND.element_size() <= gram_bytes
    gram_NN = atoms_ND @ atoms_ND.T if gram_pays and fits else None
    codes = []
    for start in range(0, len(y_TD), batch):
        codes.append(_omp(y_TD[start : start + batch], atoms_ND, k, gram_NN))
        progress(min(start + batch, len(y_TD)))
    if not codes:
        return SparseCode(y_TD.new_zeros((0, k), dtype=torch.int64), y_TD.new_zeros((0, k)))
    return SparseCode(torch.cat([part.support_TK for part in codes]), torch.cat([part.weight_TK for part in codes]))


def _omp(y_BD: Tensor, atoms_ND: Tensor, k: int, gram_NN: Tensor | None) -> SparseCode:
    count, width = y_BD.shape
    rows_B = torch.arange(count, device=y_BD.device)
    support_BK = torch.zeros((count, k), dtype=torch.int64, device=y_BD.device)
    q_BKD, r_BKK, z_BK = y_BD.new_zeros((count, k, width)), y_BD.new_zeros((count, k, k)), y_BD.new_zeros((count, k))
    residual_BD = y_BD.clone()
    least_B = ZERO_RESIDUAL[y_BD.dtype] * y_BD.norm(dim=1)
    first_BN = y_BD @ atoms_ND.T
    for t in range(k):
        if t == 0:
            score_BN = first_BN if gram_NN is None else first_BN.clone()
        elif gram_NN is not None and t * GRAM_WORTH <= width:
            own = SparseCode(support_BK[:, :t], _solve(r_BKK[:, :t, :t], z_BK[:, :t]))
            score_BN = torch.sub(first_BN, own.combine(gram_NN), out=score_BN)
        else:
            score_BN = torch.mm(residual_BD, atoms_ND.T, out=score_BN)
        score_BN.abs_().scatter_(1, support_BK[:, :t], -1.0)
        chosen_B = score_BN.argmax(dim=1)
        support_BK[:, t] = chosen_B
        atom_BD = atoms_ND[chosen_B]
        outside_BD = atom_BD
        full_norm_B = norm_B = atom_BD.norm(dim=1)
        if t:
            outside_BD, r_BKK[:, :t, t] = _outside(atom_BD, q_BKD[:, :t])
            norm_B = outside_BD.norm(dim=1)
            again = (norm_B < REORTHOGONALISE * full_norm_B).nonzero().squeeze(1)
            if len(again):
                outside_BD[again], more = _outside(outside_BD[again], q_BKD[again, :t])
                r_BKK[again, :t, t] += more
                norm_B = outside_BD.norm(dim=1)
        adds_B = (norm_B > DEPENDENT[y_BD.dtype] * full_norm_B) & (residual_BD.norm(dim=1) > least_B)
        q_BKD[:, t] = torch.where(
            adds_B[:, None], outside_BD / norm_B.clamp(min=torch.finfo(y_BD.dtype).tiny)[:, None], 0
        )
        r_BKK[rows_B, t, t] = torch.where(adds_B, norm_B, 1)
        z_BK[:, t] = (q_BKD[:, t] * residual_BD).sum(1)
        residual_BD = residual_BD - z_BK[:, t, None] * q_BKD[:, t]
    return SparseCode(support_BK, _solve(r_BKK, z_BK))


def _outside(x_BD: Tensor, q_BtD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part outside the span of orthonormal rows, and the coefficients [B, t] of the part inside."""
    coefficient_Bt1 = q_BtD @ x_BD[:, :, None]
    return x_BD - (coefficient_Bt1.mT @ q_BtD).squeeze(1), coefficient_Bt1.squeeze(2)


def _solve(r_Btt: Tensor, z_Bt: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(r_Btt, z_Bt[:, :, None], upper=True).squeeze(2)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model's attention heads, with frequencies base^(-2 f / head size)."""

    heads: int
    base: float

    def fits(self, width: int) -> bool:
        """Return whether a row of this width divides into heads of an even size."""
        return width % (2 * self.heads) == 0

    def frequencies_F(self, x_BD: Tensor) -> Tensor:
        """Return the angle of each pair of a head at position 1, in the dtype of `x_BD` [F]."""
        pairs = x_BD.shape[-1] // self.heads // 2
        power_F = torch.arange(pairs, device=x_BD.device, dtype=x_BD.dtype) / pairs
        return torch.as_tensor(self.base, dtype=x_BD.dtype, device=x_BD.device) ** -power_F

    def rotate(self, x_BD: Tensor, position_B: Tensor) -> Tensor:
        """Rotate rows to (real-valued) positions, pairing the first half of each head with the second."""
        angle_B1F = (position_B[..., None] * self.frequencies_F(x_BD)).unsqueeze(-2)
        left_BHF, right_BHF = x_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        cos, sin = angle_B1F.cos(), angle_B1F.sin()
        rotated = torch.cat([left_BHF * cos - right_BHF * sin, right_BHF * cos + left_BHF * sin], dim=-1)
        return rotated.flatten(-2)

    def position(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """Return the position [B] that rotates `x_BD` nearest to `y_BD`, by the least-squares slope of the angles."""
        a, b = x_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        c, d = y_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        angle_BHF = torch.atan2(a * d - b * c, a * c + b * d)
        frequency_F = self.frequencies_F(x_BD)
        return (angle_BHF * frequency_F).sum((-2, -1)) / (self.heads * frequency_F.square().sum())


@dataclass(frozen=True)
class RotatedCode:
    """Targets as combinations of few atoms, each rotated to a position."""

    sparse: SparseCode
    position_TK: Tensor

    def combine(self, atoms_NE: Tensor, rope: Rope) -> Tensor:
        """Return the same combinations of other atoms, rotated to the same positions by another model's rule [T, E]."""
        rotated_TKE = rope.rotate(atoms_NE[self.sparse.support_TK], self.position_TK.to(atoms_NE.dtype))
        return (self.sparse.weight_TK[:, :, None].to(atoms_NE.dtype) * rotated_TKE).sum(1)


def mp_rope(y_BD: Tensor, atoms_ND: Tensor, k: int, rope: Rope) -> RotatedCode:
    """Run matching pursuit in which each selected atom is rotated towards the residual or its negative.

    The smaller of the two rotations is taken; all coefficients are refitted at the end.
    """
    support_BK = torch.zeros((len(y_BD), k), dtype=torch.int64, device=y_BD.device)
    position_BK = y_BD.new_zeros((len(y_BD), k))
    residual_BD = y_BD.clone()
    for t in range(k):
        score_BN = (residual_BD @ atoms_ND.T).abs_().scatter_(1, support_BK[:, :t], -1.0)
        support_BK[:, t] = score_BN.argmax(dim=1)
        atom_BD = atoms_ND[support_BK[:, t]]
        toward_B, away_B = rope.position(atom_BD, residual_BD), rope.position(atom_BD, -residual_BD)
        position_BK[:, t] = torch.where(toward_B.abs() < away_B.abs(), toward_B, away_B)
        rotated_BD = rope.rotate(atom_BD, position_BK[:, t])
        square_B = rotated_BD.square().sum(1).clamp(min=torch.finfo(y_BD.dtype).tiny)
        weight_B = (residual_BD * rotated_BD).sum(1) / square_B
        residual_BD = residual_BD - weight_B[:, None] * rotated_BD
    rotated_BKD = rope.rotate(atoms_ND[support_BK], position_BK)
    return RotatedCode(SparseCode(support_BK, least_squares(rotated_BKD, y_BD)), position_BK)


def least_squares(points_BKD: Tensor, y_BD: Tensor) -> Tensor:
    """Return the coefficients [B, K] of least norm by which points come nearest to targets."""
    solution: Tensor = torch.linalg.lstsq(points_BKD.mT.cpu(), y_BD[:, :, None].cpu(), driver="gelsd").solution
    return solution.squeeze(2).to(y_BD.device)
