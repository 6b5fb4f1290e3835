"""Orthogonal matching pursuit for many targets at a time, and matching pursuit with a rotation for each atom.

For a target y, atoms A (N rows), a support S (empty) and the residual r = y, k times:

    j* = argmax over j not in S of |<r, A_j>|       S += j*       c = argmin ||y - A_S^T c||       r = y - A_S^T c

Atoms are not normalised: those of a large norm are favoured. The selected atoms are kept as Q R, one more column a
step.

Dimension letters: T targets, B targets at a time, N atoms, D width of atoms and targets, K atoms of a support, t atoms
selected so far, E width of what atoms are turned into, H heads, F frequencies of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = 512
GRAM_BYTES = 2 << 30
"""Inner products of all atoms are kept where they take no more than this."""
GRAM_WORTH = 16
"""Reading a support's rows of them is worth it up to a support of width / 16 atoms: from there on a product with all
atoms, which is compute bound, is faster than so many rows of memory."""
DEPENDENT = {torch.float32: 1e-4, torch.float64: 1e-8}
"""An atom of which less than this share lies outside the span of those before it adds nothing but noise."""
AGAIN = 0.7
"""An atom that loses more than the rest of its norm to the span is orthogonalised twice, which is enough (Kahan)."""
NOTHING = {torch.float32: 1e-6, torch.float64: 1e-14}
"""A residual below this share of its target is rounding."""


@dataclass(frozen=True)
class Sparse:
    """Targets as combinations of few atoms.

    Args:
        support_TK: which atoms, int64, distinct in a row.
        weight_TK: their coefficients.
    """

    support_TK: Tensor
    weight_TK: Tensor

    def of(self, atoms_NE: Tensor) -> Tensor:
        """The same combinations of other atoms [T, E].

        Args:
            atoms_NE: one for each of the atoms, of any width.
        """
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
) -> Sparse:
    """Code targets by k atoms each.

    The support and the coefficients are those of the plain algorithm. Where the atoms' inner products fit into memory,
    a support of few atoms is held against all of them by A r = A y - (A A^T)_S c, without a product with every atom.

    Args:
        y_TD: targets, float32 or float64.
        atoms_ND: the dictionary, likewise.
        k: atoms of each target, at most N.
        batch: targets at a time; it changes no result but by rounding.
        gram_bytes: see `GRAM_BYTES`; 0 keeps none.
        progress: called with the targets done.

    Raises:
        ValueError: k is not from 1 to N.
    """
    atoms, width = atoms_ND.shape
    if not 1 <= k <= atoms:
        raise ValueError(f"k is {k}; from 1 to {atoms} atoms can be selected")
    worth = k > 1 and width >= GRAM_WORTH and len(y_TD) * min(k, width // GRAM_WORTH) > atoms
    fits = atoms * atoms * atoms_ND.element_size() <= gram_bytes
    gram_NN = atoms_ND @ atoms_ND.T if worth and fits else None
    found = []
    for start in range(0, len(y_TD), batch):
        found.append(_omp(y_TD[start : start + batch], atoms_ND, k, gram_NN))
        progress(min(start + batch, len(y_TD)))
    if not found:
        return Sparse(y_TD.new_zeros((0, k), dtype=torch.int64), y_TD.new_zeros((0, k)))
    return Sparse(torch.cat([part.support_TK for part in found]), torch.cat([part.weight_TK for part in found]))


def _omp(y_BD: Tensor, atoms_ND: Tensor, k: int, gram_NN: Tensor | None) -> Sparse:
    count, width = y_BD.shape
    rows_B = torch.arange(count, device=y_BD.device)
    support_BK = torch.zeros((count, k), dtype=torch.int64, device=y_BD.device)
    q_BKD, r_BKK, z_BK = y_BD.new_zeros((count, k, width)), y_BD.new_zeros((count, k, k)), y_BD.new_zeros((count, k))
    residual_BD = y_BD.clone()
    least_B = NOTHING[y_BD.dtype] * y_BD.norm(dim=1)
    first_BN = y_BD @ atoms_ND.T
    for t in range(k):
        if t == 0:
            score_BN = first_BN if gram_NN is None else first_BN.clone()
        elif gram_NN is not None and t * GRAM_WORTH <= width:
            own = Sparse(support_BK[:, :t], _solve(r_BKK[:, :t, :t], z_BK[:, :t]))
            score_BN = torch.sub(first_BN, own.of(gram_NN), out=score_BN)
        else:
            score_BN = torch.mm(residual_BD, atoms_ND.T, out=score_BN)
        score_BN.abs_().scatter_(1, support_BK[:, :t], -1.0)
        chosen_B = score_BN.argmax(dim=1)
        support_BK[:, t] = chosen_B
        atom_BD = atoms_ND[chosen_B]
        rest_BD = atom_BD
        whole_B = norm_B = atom_BD.norm(dim=1)
        if t:
            rest_BD, r_BKK[:, :t, t] = _outside(atom_BD, q_BKD[:, :t])
            norm_B = rest_BD.norm(dim=1)
            again = (norm_B < AGAIN * whole_B).nonzero().squeeze(1)
            if len(again):
                rest_BD[again], more = _outside(rest_BD[again], q_BKD[again, :t])
                r_BKK[again, :t, t] += more
                norm_B = rest_BD.norm(dim=1)
        adds_B = (norm_B > DEPENDENT[y_BD.dtype] * whole_B) & (residual_BD.norm(dim=1) > least_B)
        q_BKD[:, t] = torch.where(adds_B[:, None], rest_BD / norm_B.clamp(min=torch.finfo(y_BD.dtype).tiny)[:, None], 0)
        r_BKK[rows_B, t, t] = torch.where(adds_B, norm_B, 1)
        z_BK[:, t] = (q_BKD[:, t] * residual_BD).sum(1)
        residual_BD = residual_BD - z_BK[:, t, None] * q_BKD[:, t]
    return Sparse(support_BK, _solve(r_BKK, z_BK))


def _outside(x_BD: Tensor, q_BtD: Tensor) -> tuple[Tensor, Tensor]:
    """What lies outside of the span of orthonormal rows, and the coefficients [B, t] of what lies in it."""
    share_Bt1 = q_BtD @ x_BD[:, :, None]
    return x_BD - (share_Bt1.mT @ q_BtD).squeeze(1), share_Bt1.squeeze(2)


def _solve(r_Btt: Tensor, z_Bt: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(r_Btt, z_Bt[:, :, None], upper=True).squeeze(2)


@dataclass(frozen=True)
class Rope:
    """How a model's attention rotates its heads; the rotation that `mp_rope` lends its atoms.

    Args:
        heads: H; they divide the width into heads of an even size.
        base: of the frequencies base^(-2 f / head size).
    """

    heads: int
    base: float

    def fits(self, width: int) -> bool:
        """Whether a row of this width is cut into heads of an even size.

        Args:
            width: of an embedding.
        """
        return width % (2 * self.heads) == 0

    def frequencies_F(self, x_BD: Tensor) -> Tensor:
        """The angle of each pair of a head at position 1, float [F].

        Args:
            x_BD: rows; give width, dtype and device.
        """
        pairs = x_BD.shape[-1] // self.heads // 2
        power_F = torch.arange(pairs, device=x_BD.device, dtype=x_BD.dtype) / pairs
        return torch.as_tensor(self.base, dtype=x_BD.dtype, device=x_BD.device) ** -power_F

    def turn(self, x_BD: Tensor, position_B: Tensor) -> Tensor:
        """Rows rotated to a position, as the attention rotates its heads: first half with second half.

        Args:
            x_BD: rows; leading dimensions are the positions'.
            position_B: of each; any real number.
        """
        angle_B1F = (position_B[..., None] * self.frequencies_F(x_BD)).unsqueeze(-2)
        left_BHF, right_BHF = x_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        cos, sin = angle_B1F.cos(), angle_B1F.sin()
        turned = torch.cat([left_BHF * cos - right_BHF * sin, right_BHF * cos + left_BHF * sin], dim=-1)
        return turned.flatten(-2)

    def position(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """The position that turns rows nearest to others: the least-squares slope of all pairs' angles, float [B].

        Args:
            x_BD: rows that are turned.
            y_BD: rows that they should come near to.
        """
        a, b = x_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        c, d = y_BD.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)
        angle_BHF = torch.atan2(a * d - b * c, a * c + b * d)
        frequency_F = self.frequencies_F(x_BD)
        return (angle_BHF * frequency_F).sum((-2, -1)) / (self.heads * frequency_F.square().sum())


@dataclass(frozen=True)
class Turned:
    """Targets as combinations of few atoms, each rotated to a position.

    Args:
        sparse: atoms and coefficients.
        position_TK: of each.
    """

    sparse: Sparse
    position_TK: Tensor

    def of(self, atoms_NE: Tensor, rope: Rope) -> Tensor:
        """The same combinations of other atoms, rotated to the same positions by another model's rule [T, E].

        Args:
            atoms_NE: one for each of the atoms.
            rope: of the model that they belong to.
        """
        turned_TKE = rope.turn(atoms_NE[self.sparse.support_TK], self.position_TK.to(atoms_NE.dtype))
        return (self.sparse.weight_TK[:, :, None].to(atoms_NE.dtype) * turned_TKE).sum(1)


def mp_rope(y_BD: Tensor, atoms_ND: Tensor, k: int, rope: Rope) -> Turned:
    """Matching pursuit whose atoms are turned: each selected atom is rotated towards the residual (or its negative,
    whichever is the smaller turn), takes its share of it, and at the end all coefficients are fitted anew.

    Args:
        y_BD: targets.
        atoms_ND: the dictionary.
        k: atoms of each target, at most N.
        rope: of the model that the atoms belong to.
    """
    support_BK = torch.zeros((len(y_BD), k), dtype=torch.int64, device=y_BD.device)
    position_BK = y_BD.new_zeros((len(y_BD), k))
    residual_BD = y_BD.clone()
    for t in range(k):
        score_BN = (residual_BD @ atoms_ND.T).abs_().scatter_(1, support_BK[:, :t], -1.0)
        support_BK[:, t] = score_BN.argmax(dim=1)
        atom_BD = atoms_ND[support_BK[:, t]]
        there_B, back_B = rope.position(atom_BD, residual_BD), rope.position(atom_BD, -residual_BD)
        position_BK[:, t] = torch.where(there_B.abs() < back_B.abs(), there_B, back_B)
        turned_BD = rope.turn(atom_BD, position_BK[:, t])
        square_B = turned_BD.square().sum(1).clamp(min=torch.finfo(y_BD.dtype).tiny)
        weight_B = (residual_BD * turned_BD).sum(1) / square_B
        residual_BD = residual_BD - weight_B[:, None] * turned_BD
    turned_BKD = rope.turn(atoms_ND[support_BK], position_BK)
    return Turned(Sparse(support_BK, least_squares(turned_BKD, y_BD)), position_BK)


def least_squares(points_BKD: Tensor, y_BD: Tensor) -> Tensor:
    """The coefficients [B, K] of least norm by which points come nearest to targets.

    Args:
        points_BKD: of each target.
        y_BD: targets.
    """
    found: Tensor = torch.linalg.lstsq(points_BKD.mT.cpu(), y_BD[:, :, None].cpu(), driver="gelsd").solution
    return found.squeeze(2).to(y_BD.device)
