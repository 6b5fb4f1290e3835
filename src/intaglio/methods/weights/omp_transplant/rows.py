"""The new matrix of one role: which rows are copied, which stay zero, and what the others are made of.

Dimension letters: R rows of the new matrix, V rows of the base's, D the donor's width, E the base's width (with the
head's bias as one more column, where it has one), T new tokens, N shared tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intaglio.errors import IntaglioError
from intaglio.methods.weights.omp_transplant.baselines import (
    Role,
    landmark_pca,
    linear_map,
    neighbours,
    normal,
    sparse_basis,
    subword,
    undertrained,
)
from intaglio.methods.weights.omp_transplant.pursuit import Rope, mp_rope, omp
from intaglio.methods.weights.omp_transplant.vocabulary import Joined
from intaglio.trainer.rng import generator

if TYPE_CHECKING:
    from intaglio.methods.weights.omp_transplant import OMPTransplant

UNUSED = ("unused_token", "reserved_special_token")
"""What names of tokens that nobody uses contain."""
MINE = ("omp", "common_interpolation", "mp_rope", "stb")
"""Methods with an error of reconstruction in the donor's space."""
SHARED = (*MINE, "landmark_pca", "linear")
"""Methods that learn from the shared tokens."""


@dataclass(frozen=True)
class Plan:
    """What becomes of each of the donor's ids in one matrix.

    Args:
        copied: `{donor id: base id}` of rows that are copied.
        matched: how many of them were found by a lone byte and by a beginning: `{"byte": ..., "prefix": ...}`.
        anchors: `(donor id, base id)` of the shared tokens that new rows are made from.
        new: ids of the rows that are made.
        zero: how many ids have no row to be made from.
    """

    copied: dict[int, int]
    matched: dict[str, int]
    anchors: list[tuple[int, int]]
    new: list[int]
    zero: int


def plan(
    method: OMPTransplant,
    role: Role,
    joined: Joined,
    donor_rows: int,
    base_rows: int,
    poor: tuple[set[int], set[int]] = (set(), set()),
) -> Plan:
    """Sort the donor's ids.

    Args:
        method: its options.
        role: which matrix.
        joined: the shared tokens.
        donor_rows: rows that the donor's matrix has; tokens beyond have none.
        base_rows: likewise of the base.
        poor: under-trained ids of the donor and of the base.
    """
    poor_donor, poor_base = poor
    shared = {i: j for i, j in joined.ids.items() if i < donor_rows and j < base_rows}
    good = {i: j for i, j in shared.items() if i not in poor_donor and j not in poor_base}
    copied, matched, new, zero = dict(good), {"byte": 0, "prefix": 0}, [], 0
    for i, token in joined.donor.tokens.items():
        if i in good:
            continue
        if i >= donor_rows or (i in poor_donor and shared.get(i, -1) in poor_base | {-1}):
            zero += 1
            continue
        found = None
        if method.byte_match in (role, "both"):
            found = _usable(joined.base.byte(token, joined.donor), base_rows, poor_base)
            matched["byte"] += found is not None
        if found is None and method.prefix_match in (role, "both"):
            found = _usable(joined.base.prefix(token, joined.donor, method.join), base_rows, poor_base)
            matched["prefix"] += found is not None
        if found is None:
            new.append(i)
        else:
            copied[i] = found
    return Plan(copied, matched, sorted(good.items()), new, zero)


def _usable(found: int | None, rows: int, poor: set[int]) -> int | None:
    return None if found is None or found >= rows or found in poor else found


def poor_tokens(joined: Joined, donor: tuple[Tensor, Tensor | None], base: tuple[Tensor, Tensor | None]) -> Any:
    """Under-trained ids of the donor and of the base; see `undertrained`.

    Args:
        joined: both vocabularies.
        donor: its embedding and its head, if that is another matrix.
        base: likewise.
    """
    found = []
    for vocabulary, (embedding, head) in ((joined.donor, donor), (joined.base, base)):
        used = [i for i in vocabulary.tokens if i < len(embedding)]
        named = [i for i in used if any(word in vocabulary.tokens[i].text for word in UNUSED)]
        found.append(undertrained(embedding.float(), None if head is None else head.float(), named, used))
    return tuple(found)


@dataclass
class Built:
    """A new matrix and what there is to say of it.

    Args:
        matrix_RE: the rows, in the base's dtype.
        told: numbers for the record.
    """

    matrix_RE: Tensor
    told: dict[str, Any] = field(default_factory=dict)


def build(
    method: OMPTransplant,
    role: Role,
    planned: Plan,
    joined: Joined,
    donor_VD: Tensor,
    base_VE: Tensor,
    k: int,
    ropes: tuple[Rope | None, Rope | None],
    seed: int,
    *,
    biased: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Build the matrix of one role.

    Args:
        method: which way, and its options.
        role: which matrix.
        planned: from `plan`.
        joined: the shared tokens.
        donor_VD: the donor's matrix of this role.
        base_VE: the base's, with its bias as a last column where it has one.
        k: atoms or neighbours.
        ropes: rotations of the donor's and the base's heads; `mp_rope` alone needs them.
        seed: of what is drawn.
        biased: whether the last column is a bias. Default False.
        progress: called with new tokens done and their number.
    """
    work = torch.float64 if method.dtype == "float64" else torch.float32
    matrix_RE = base_VE.new_zeros((joined.donor.rows, base_VE.shape[1]))
    if planned.copied:
        matrix_RE[list(planned.copied)] = base_VE[list(planned.copied.values())]
    told: dict[str, Any] = {
        "copied": len(planned.copied), "new": len(planned.new), "zero": planned.zero,
        **{f"by {how}": count for how, count in planned.matched.items() if count},
    }  # fmt: skip
    if planned.new:
        y_TD = donor_VD[planned.new].to(base_VE.device, work)
        made_TE, near_TD = _made(
            method, role, planned, joined, y_TD, donor_VD, base_VE, work, k, ropes, seed, biased, progress
        )  # fmt: skip
        if near_TD is not None:
            error_T, size_T = (y_TD - near_TD).norm(dim=1), y_TD.norm(dim=1)
            told["reconstruction error"] = float((error_T / size_T.clamp(min=torch.finfo(work).tiny)).mean())
        if method.noise:
            drawn = torch.randn(made_TE.shape, generator=generator(seed, "noise", role), dtype=work)
            made_TE = made_TE + method.noise * drawn.to(made_TE.device)
        if method.scale is not None:
            made_TE = method.scale * made_TE
        if not torch.isfinite(made_TE).all():
            raise IntaglioError(f"k is {k}: the coefficients of new rows of the {role} are not finite; try a smaller k")
        matrix_RE[planned.new] = made_TE.to(matrix_RE.dtype)
        told["mean norm of new rows"] = float(matrix_RE[planned.new].to(work).norm(dim=1).mean())
    if planned.copied:
        told["mean norm of shared rows"] = float(matrix_RE[list(planned.copied)].to(work).norm(dim=1).mean())
    return Built(matrix_RE, told)


def _made(
    method: OMPTransplant,
    role: Role,
    planned: Plan,
    joined: Joined,
    y_TD: Tensor,
    donor_VD: Tensor,
    base_VE: Tensor,
    work: torch.dtype,
    k: int,
    ropes: tuple[Rope | None, Rope | None],
    seed: int,
    biased: bool,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, Tensor | None]:
    """New rows [T, E], and what the method's atoms give in the donor's space [T, D]; None where it has none."""
    count, how = len(y_TD), method.method
    if how not in SHARED:
        used = [i for i in joined.base.tokens if i < len(base_VE)]
        rows_VE = base_VE.to(work)
        if how == "subword":
            pieces = [joined.base.pieces(joined.donor.tokens[i]) for i in planned.new]
            pieces = [[i for i in ids if i < len(base_VE)] for ids in pieces]
            return subword(rows_VE, pieces, method.pieces, role), None
        if how == "mean":
            return rows_VE[used].mean(0).expand(count, -1).clone(), None
        if how == "john_hewitt":
            return normal(rows_VE[used], count, generator(seed, how, role)), None
        if how == "randn":
            drawn = torch.randn((count, base_VE.shape[1]), generator=generator(seed, how, role), dtype=work)
            return drawn.to(base_VE.device), None
        return rows_VE.new_zeros((count, base_VE.shape[1])), None
    atoms_ND = donor_VD[[i for i, _ in planned.anchors]].to(base_VE.device, work)
    base_NE = base_VE[[j for _, j in planned.anchors]].to(work)
    if how == "linear":
        return y_TD @ linear_map(atoms_ND, base_NE), None
    if how == "landmark_pca":
        return landmark_pca(y_TD, atoms_ND, base_NE), None
    if how == "stb":
        return sparse_basis(y_TD, atoms_ND, base_NE, k)
    if how == "common_interpolation":
        sparse = neighbours(y_TD, atoms_ND, k, method.metric, method.weighting, method.batch)
        return sparse.of(base_NE), sparse.of(atoms_ND)
    if how == "mp_rope":
        own, other = ropes
        assert own is not None  # both are checked before any work
        assert other is not None
        width = base_NE.shape[1] - biased
        parts = []
        for start in range(0, count, method.batch):
            turned = mp_rope(y_TD[start : start + method.batch], atoms_ND, k, own)
            row_BE = turned.of(base_NE[:, :width].contiguous(), other)
            if biased:  # it is not turned
                row_BE = torch.cat([row_BE, turned.sparse.of(base_NE[:, width:])], dim=1)
            parts.append((row_BE, turned.of(atoms_ND, own)))
            progress(min(start + method.batch, count), count)
        return torch.cat([row for row, _ in parts]), torch.cat([near for _, near in parts])
    sparse = omp(y_TD, atoms_ND, k, batch=method.batch, progress=lambda done: progress(done, count))
    return sparse.of(base_NE), sparse.of(atoms_ND)
