"""OMPTransplant (Goddard and Fernandes Neto, 2025): replace a checkpoint's vocabulary without training.

The checkpoint keeps its transformer and gets the vocabulary of a donor. Rows of shared tokens are copied; the row of a
new token t is a combination of a few shared tokens S, with the coefficients that approximate the donor's own row of t:

    c = argmin ||donor_t - sum_{s in S} c_s donor_s||      row_t = sum_{s in S} c_s base_s

- `vocabulary`: token contents, and the matching of two vocabularies.
- `matching_pursuit`: batched orthogonal matching pursuit.
- `baselines`: the other ways to build a row.
- `donor`: the donor's tokenizer and matrices.
- `embedding_init`: the new matrix of one role (embedding or head).
- `swap`: writes matrices, ids and tokenizer into the checkpoint.

Differences from the released tool (mergekit's tokensurgeon): tokens are matched by the bytes that they decode to
(`join: strings` compares spellings, as the tool does); a special token without a role is matched by its name, not with
every other such token; atoms are reorthogonalised where they need it, not all of them every 256 steps; the options for
prefixes and bytes act on the matrix that they name; `weighted_mean` weights as the tool's comments say; the rotation of
`landmark_pca` is the one that fits; a head's bias is transferred too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load_config
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.omp_transplant.baselines import (
    Metric,
    Pieces,
    Role,
    Weighting,
    landmark_pca,
    linear_map,
    neighbours,
    normal,
    sparse_basis,
    subword,
    undertrained,
)
from intaglio.methods.weights.omp_transplant.donor import Donor, check_matrix, load_config_and_tokenizer, rope_of
from intaglio.methods.weights.omp_transplant.matching_pursuit import BATCH, GRAM_BYTES, Rope, SparseCode, mp_rope, omp
from intaglio.methods.weights.omp_transplant.swap import check_parts, single_digits, swap_vocabulary
from intaglio.methods.weights.omp_transplant.vocabulary import Join, SharedVocabulary, Vocabulary, match_tokens
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.trainer.rng import generator

__all__ = ["Donor", "OMPTransplant", "SharedVocabulary", "SparseCode", "Vocabulary", "match_tokens", "omp", "scaled_k"]

PAPER_K = 64
WIDTH_SHARE = 10
"""The default k is the donor's width over this: near the width the donor's row is fitted exactly, noise included, and
the coefficients do not transfer to the base's space."""
LEAST_OVERLAP = 0.3
"""Below this share of shared tokens the tokenizers are most likely read wrongly, or cover different scripts."""

UNUSED_MARKS = ("unused_token", "reserved_special_token")
"""Substrings of the names of unused tokens."""
RECONSTRUCTING_METHODS = ("omp", "common_interpolation", "mp_rope", "stb")
"""Methods with a reconstruction error in the donor's space."""
ANCHORED_METHODS = (*RECONSTRUCTING_METHODS, "landmark_pca", "linear")
"""Methods that learn from the shared tokens."""

Approximation = Literal[
    "omp", "zero", "mean", "randn", "john_hewitt", "subword", "common_interpolation", "landmark_pca", "stb", "mp_rope",
    "linear",
]  # fmt: skip
Where = Literal["no", "embedding", "head", "both"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Assignment of the donor's ids in one matrix, with the matrices of donor and base.

    If `biased`, the last column of `base_VE` is the head's bias. `copied` maps donor to base ids, `matched` counts byte
    and prefix matches, `anchors` are the pairs of ids that new rows are built from, `zero` is the number of zero rows.
    """

    role: Role
    joined: SharedVocabulary
    donor_VD: Tensor
    base_VE: Tensor
    biased: bool
    copied: dict[int, int]
    matched: dict[str, int]
    anchors: list[tuple[int, int]]
    new: list[int]
    zero: int


def scaled_k(width: int, shared: int) -> int:
    """Return the default k: a tenth of the donor's width, at most the paper's 64 (for widths in the thousands)."""
    return min(PAPER_K, max(1, width // WIDTH_SHARE), shared)


class OMPTransplant(Method, slug="omp_transplant"):
    """Replace the checkpoint's tokenizer and vocabulary by a donor's, without training.

    For the input embedding, and for an untied head, each with the donor's matrix of that role: a token that both
    vocabularies have keeps its row, bit for bit; a new token t gets sum_s c_s base_s, with the coefficients of the
    orthogonal matching pursuit that approximates the donor's row of t by k shared tokens s. Atoms are not normalised,
    nothing is centred, coefficients are not clipped. Ids without a donor row stay zero. The donor's tokenizer, chat
    template and special-token ids are adopted; positions and everything else stay.

    Arithmetic suffers where the two tokenizers split numbers differently (a warning is issued); `digits` then helps.

    The paper's k of 64 suits widths in the thousands. The default is min(64, width of the donor / 10);
    `OMPTransplant.paper(donor=...)` gives 64.

    Args:
        donor: model whose tokenizer is adopted: a bundled name, a directory or a hub id, pinned by
            `user/name@revision`. Only its embedding and head weights are read.
        method: how new rows are built. Default `omp`. For comparison: `zero`, `mean` (of the base's rows), `randn`
            (standard deviation 1), `john_hewitt` (drawn with the base's mean and covariance), `subword` (rows of the
            base's own pieces of the token), `common_interpolation` (nearest shared tokens), `landmark_pca`, `stb` (a
            sparse token basis), `mp_rope` (pursuit with a rotation for each atom), `linear` (least squares over all
            shared tokens).
        k: atoms of a new row (`omp`, `mp_rope`, `stb`), or neighbours (`common_interpolation`). Default: by the width.
        join: how tokens are matched: those that decode to the same `bytes` (default), or those spelt by the same
            `strings`, as in the released tool.
        byte_match: (`join: strings`) also match a one-byte character with the byte token of that byte, and vice versa,
            in the `embedding`, the `head`, `both`, or `no` (default). With `join: bytes` they match anyway.
        prefix_match: likewise, a new token takes the row of its longest prefix that the base has. Default `no`.
        metric: (`common_interpolation`) `euclidean` (default) or `cosine`.
        weighting: (`common_interpolation`) by `distance` (default), `barycentric` or `least_squares`.
        pieces: (`subword`) `mean` (default), `sum`, `weighted_mean` or `first_last`.
        magikarp: exclude under-trained tokens from the shared ones, and leave rows zero that are under-trained on both
            sides. Default false.
        noise: standard deviation of Gaussian noise added to new rows. Default 0.
        scale: factor on new rows, after the noise. Default: none.
        digits: how the new tokenizer splits numbers: `donor` (default), unchanged; or `single`, digit by digit, which
            keeps the arithmetic of a base that does so, since single digits are shared tokens: tokens of several digits
            are then neither read nor generated.
        least_overlap: minimum share of shared tokens, of the smaller vocabulary; below it the step is refused. Default
            0.3.
        dtype: dtype in which rows are computed, `float32` (default) or `float64`; they are stored in the base's.
        batch: new tokens at a time. Default 512.

    Raises:
        IntaglioError: an unknown donor, or one without a tokenizer; no shared tokens, or too few; k above their number;
            a head that is not a plain linear layer; NaN rows; (`mp_rope`) a model without rotary positions.

    Warns:
        UserWarning: k is over half of the donor's width; numbers are split differently.

    Source: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, 2025,
    arXiv 2506.06607; where they differ, the released code. Departures from it are listed in
    `intaglio.methods.weights.omp_transplant`.
    """

    kinds = ("carving",)
    summary = (
        "gives a model another model's tokenizer without training; new embeddings are sparse combinations of "
        "shared tokens"
    )
    citation = (
        "Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, 2025"
    )
    url = "https://arxiv.org/abs/2506.06607"

    storage: ClassVar[Literal["standalone"]] = "standalone"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"vocabulary"})
    invalidates: ClassVar[frozenset[Capability]] = frozenset({"tokenizer"})

    donor: Annotated[str, Field(min_length=1)]
    method: Approximation = "omp"
    k: Annotated[int, Field(ge=1)] | None = None
    join: Join = "bytes"
    byte_match: Where = "no"
    prefix_match: Where = "no"
    metric: Metric = "euclidean"
    weighting: Weighting = "distance"
    pieces: Pieces = "mean"
    magikarp: bool = False
    noise: Annotated[float, Field(ge=0)] = 0.0
    scale: Annotated[float, Field(gt=0)] | None = None
    digits: Literal["donor", "single"] = "donor"
    least_overlap: Annotated[float, Field(ge=0, le=1)] = LEAST_OVERLAP
    dtype: Literal["float32", "float64"] = "float32"
    batch: Annotated[int, Field(ge=1)] = BATCH

    @model_validator(mode="after")
    def _check_byte_match(self) -> Self:
        if self.join == "bytes" and self.byte_match != "no":
            raise ValueError("byte_match needs join: strings; with join: bytes, byte tokens match anyway")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's settings: 64 atoms, tokens matched as in the released code."""
        return cls(**{"k": PAPER_K, "join": "strings", **overrides})

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse an unknown donor and a model whose head or embedding cannot be replaced."""
        check_parts(parts)
        config, _ = load_config_and_tokenizer(self.donor)
        self._check_ropes(rope_of(config), int(config.hidden_size), parts)

    def check_tokenizer(self, tokenizer: Any, source: str) -> None:
        """Refuse a pair of tokenizers that share too few tokens."""
        config, other = load_config_and_tokenizer(self.donor)
        joined = self.joined(tokenizer, other, source)
        self.atoms(int(config.hidden_size), len(joined.ids))

    def _check_ropes(self, donor: Rope | None, width: int, parts: Anatomy) -> None:
        if self.method != "mp_rope":
            return
        base = rope_of(parts.config)
        for owner, rope, size in (("the donor", donor, width), ("the model", base, int(parts.config.hidden_size))):
            if rope is None or not rope.fits(size):
                raise IntaglioError(
                    f"method mp_rope needs rotary positions over heads of an even size; {owner} has none"
                )

    def joined(self, tokenizer: Any, donor: Any, source: str) -> SharedVocabulary:
        """Return the shared tokens of two tokenizers; refuse too small an overlap."""
        if tokenizer is None:
            raise IntaglioError(f"{source or 'the checkpoint'} has no tokenizer, so its tokens cannot be compared")
        shared = match_tokens(Vocabulary.from_tokenizer(tokenizer), Vocabulary.from_tokenizer(donor), self.join)
        if not shared.ids:
            raise IntaglioError(f"the tokenizers of {source or 'the checkpoint'} and {self.donor} share no token")
        if shared.overlap < self.least_overlap:
            raise IntaglioError(
                f"the tokenizers of {source or 'the checkpoint'} and {self.donor} share {len(shared.ids):,} tokens, "
                f"{shared.overlap:.1%} of the smaller vocabulary; least_overlap requires {self.least_overlap:.0%}"
            )
        return shared

    def atoms(self, width: int, shared: int) -> int:
        """Return k for a donor of this width."""
        if self.k is None:
            return scaled_k(width, shared)
        if self.method in ANCHORED_METHODS and self.k > shared:
            raise IntaglioError(f"k is {self.k}; the two vocabularies share {shared:,} tokens to choose from")
        return self.k

    def new_tokens(self, before: Any, after: Any) -> frozenset[int]:
        """Return the ids of a tokenizer's tokens that an earlier tokenizer did not have."""
        shared = match_tokens(Vocabulary.from_tokenizer(before), Vocabulary.from_tokenizer(after), self.join)
        return frozenset(shared.donor.tokens.keys() - shared.ids.keys())

    def estimate(self, workload: Workload) -> Cost:
        """Return the cost of one matrix, assuming that half of the donor's tokens are new."""
        _, config = load_config(self.donor)
        config = config.get_text_config()
        rows, width = int(config.vocab_size), int(config.hidden_size)
        half = rows / 2
        memory = 4 * rows * (width + workload.hidden) * 2 + 4 * self.batch * rows
        if self.method not in ("omp", "mp_rope", "common_interpolation"):
            return Cost(2.0 * half * width * (width + workload.hidden), 0.0, int(memory))
        passes = 1 if self.method == "common_interpolation" else self.atoms(width, int(half))
        gram = min(4 * half * half, GRAM_BYTES) if self.method == "omp" else 0
        # A single matrix product runs at twice the rate of a forward pass.
        return Cost(half * half * width * passes, 0.0, int(memory + gram))

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Give `checkpoint` the donor's tokenizer and return it."""
        check_parts(anatomy(checkpoint.model))
        if checkpoint.tokenizer is None:
            raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so its tokens are unknown")
        return self.transplant(checkpoint, Donor.load(self.donor), seed=seed, progress=progress)

    def transplant(
        self, checkpoint: Checkpoint, donor: Donor, *, seed: int = 0, progress: Progress = no_progress
    ) -> Checkpoint:
        """Do the same with a donor that is already loaded; on an error the checkpoint is unchanged."""
        parts = anatomy(checkpoint.model)
        check_parts(parts)
        self._check_ropes(donor.rope, donor.embedding_VD.shape[1], parts)
        joined = self.joined(checkpoint.tokenizer, donor.tokenizer, checkpoint.source)
        source = checkpoint.source or "the checkpoint"
        embedding: Any = parts.embedding
        head: Any = parts.head
        base: dict[Role, Tensor] = {"embedding": embedding.weight.detach()}
        if head is not None and not parts.tied:
            base["head"] = head.weight.detach()
        donor_head_VD = donor.embedding_VD if donor.head_VD is None else donor.head_VD
        donor_matrices = {"embedding": donor.embedding_VD, "head": donor_head_VD}
        for role in base:
            check_matrix(base[role], f"the {role} of {source}")
            check_matrix(donor_matrices[role], f"the {role} of {donor.name}")
        undertrained: tuple[set[int], set[int]] = (set(), set())
        if self.magikarp:
            undertrained = find_undertrained(
                joined, (donor.embedding_VD, donor.head_VD), (base["embedding"], base.get("head"))
            )
        bias: Any = getattr(head, "bias", None)
        plans = []
        for role, base_VE in base.items():
            biased = bias is not None and (role == "head" or parts.tied)
            if biased:  # a new row's bias is built like the row
                base_VE = torch.cat([base_VE, bias.detach()[:, None].to(base_VE.dtype)], dim=1)
            plans.append(self._plan(role, joined, donor_matrices[role], base_VE, biased, undertrained))
        k = min(self.atoms(plan.donor_VD.shape[1], len(plan.anchors)) for plan in plans)
        self._warn(joined, k, donor.embedding_VD.shape[1])
        matrices: dict[Role, Tensor] = {}
        chosen: dict[str, Any] = {"k": k} if self.method in ("omp", "mp_rope", "common_interpolation", "stb") else {}
        chosen |= self._summary(joined, base["embedding"], donor)
        for plan in plans:

            def report(done: int, total: int, role: Role = plan.role) -> None:
                progress(done, total, f"{self.slug}: {role}")

            ropes = (donor.rope, rope_of(parts.config))
            matrices[plan.role], chosen[str(plan.role)] = self._build(plan, k, ropes, seed, report)
        tokenizer, suppressed = donor.tokenizer, []
        if self.digits == "single":
            tokenizer = single_digits(donor.tokenizer)
            suppressed = [i for i in joined.donor.tokens if _has_digit_run(joined.donor, i)]
        swap_vocabulary(checkpoint, tokenizer, donor, matrices, suppressed)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint

    def _summary(self, joined: SharedVocabulary, embedding_VE: Tensor, donor: Donor) -> dict[str, Any]:
        tokens = len(joined.donor.tokens)
        return {
            "tokens": {"base": len(joined.base.tokens), "donor": tokens, "shared": len(joined.ids)},
            "rows": {"before": len(embedding_VE), "after": joined.donor.rows},
            "shared of the donor's": len(joined.ids) / tokens,
            "overlap": joined.overlap,
            "widths": {"base": embedding_VE.shape[1], "donor": donor.embedding_VD.shape[1]},
            "digits of a number token": {"base": joined.base.digits, "donor": joined.donor.digits},
        }

    def _warn(self, joined: SharedVocabulary, k: int, width: int) -> None:
        if self.method == "omp" and 2 * k > width:
            warnings.warn(
                f"omp_transplant: k is {k}, over half of the donor's width of {width}: the coefficients then fit "
                "noise and transfer badly to the base's space",
                stacklevel=4,
            )
        base, donor = joined.base.digits, joined.donor.digits
        if base != donor and not (self.digits == "single" and base == 1):
            hint = "; digits: single keeps the base's split" if base == 1 else ""
            warnings.warn(
                f"omp_transplant: a number token has up to {base} digits in the base and up to {donor} in the donor, "
                f"so expect arithmetic to suffer{hint}",
                stacklevel=4,
            )

    def _plan(
        self,
        role: Role,
        joined: SharedVocabulary,
        donor_VD: Tensor,
        base_VE: Tensor,
        biased: bool,
        undertrained: tuple[set[int], set[int]],
    ) -> Plan:
        """Sort the donor's ids into copied, new and zero rows; tokens beyond the rows of a matrix have no row."""
        donor_rows, base_rows = len(donor_VD), len(base_VE)
        poor_donor, poor_base = undertrained
        shared = {i: j for i, j in joined.ids.items() if i < donor_rows and j < base_rows}
        anchors = {i: j for i, j in shared.items() if i not in poor_donor and j not in poor_base}
        copied, matched, new, zero = dict(anchors), {"byte": 0, "prefix": 0}, [], 0
        for i, token in joined.donor.tokens.items():
            if i in anchors:
                continue
            if i >= donor_rows or (i in poor_donor and shared.get(i, -1) in poor_base | {-1}):
                zero += 1
                continue
            match = None
            if self.byte_match in (role, "both"):
                match = _usable_id(joined.base.byte(token, joined.donor), base_rows, poor_base)
                matched["byte"] += match is not None
            if match is None and self.prefix_match in (role, "both"):
                match = _usable_id(joined.base.prefix(token, joined.donor, self.join), base_rows, poor_base)
                matched["prefix"] += match is not None
            if match is None:
                new.append(i)
            else:
                copied[i] = match
        return Plan(
            role, joined, donor_VD, base_VE, biased, copied, matched, sorted(anchors.items()), new, zero
        )  # fmt: skip

    def _build(
        self,
        plan: Plan,
        k: int,
        ropes: tuple[Rope | None, Rope | None],
        seed: int,
        progress: Callable[[int, int], None],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the matrix of one role [R, E], with a bias as its last column if biased, and its statistics."""
        role, base_VE = plan.role, plan.base_VE
        work = torch.float64 if self.dtype == "float64" else torch.float32
        matrix_RE = base_VE.new_zeros((plan.joined.donor.rows, base_VE.shape[1]))
        if plan.copied:
            matrix_RE[list(plan.copied)] = base_VE[list(plan.copied.values())]
        summary: dict[str, Any] = {
            "copied": len(plan.copied), "new": len(plan.new), "zero": plan.zero,
            **{f"by {how}": count for how, count in plan.matched.items() if count},
        }  # fmt: skip
        if plan.new:
            y_TD = plan.donor_VD[plan.new].to(base_VE.device, work)
            new_TE, approximation_TD = self._new_rows(plan, y_TD, k, ropes, seed, progress)
            if approximation_TD is not None:
                error_T, size_T = (y_TD - approximation_TD).norm(dim=1), y_TD.norm(dim=1)
                summary["reconstruction error"] = float((error_T / size_T.clamp(min=torch.finfo(work).tiny)).mean())
            if self.noise:
                drawn = torch.randn(new_TE.shape, generator=generator(seed, "noise", role), dtype=work)
                new_TE = new_TE + self.noise * drawn.to(new_TE.device)
            if self.scale is not None:
                new_TE = self.scale * new_TE
            if not torch.isfinite(new_TE).all():
                raise IntaglioError(
                    f"k is {k}: the coefficients of new rows of the {role} are not finite; try a smaller k"
                )
            matrix_RE[plan.new] = new_TE.to(matrix_RE.dtype)
            summary["mean norm of new rows"] = float(matrix_RE[plan.new].to(work).norm(dim=1).mean())
        if plan.copied:
            summary["mean norm of shared rows"] = float(matrix_RE[list(plan.copied)].to(work).norm(dim=1).mean())
        return matrix_RE, summary

    def _new_rows(
        self,
        plan: Plan,
        y_TD: Tensor,
        k: int,
        ropes: tuple[Rope | None, Rope | None],
        seed: int,
        progress: Callable[[int, int], None],
    ) -> tuple[Tensor, Tensor | None]:
        """Return new rows [T, E] and the method's approximation in the donor's space [T, D], or None."""
        role, joined, base_VE, work = plan.role, plan.joined, plan.base_VE, y_TD.dtype
        count, kind = len(y_TD), self.method
        if kind not in ANCHORED_METHODS:
            used = [i for i in joined.base.tokens if i < len(base_VE)]
            rows_VE = base_VE.to(work)
            if kind == "subword":
                pieces = [joined.base.pieces(joined.donor.tokens[i]) for i in plan.new]
                pieces = [[i for i in ids if i < len(base_VE)] for ids in pieces]
                return subword(rows_VE, pieces, self.pieces, role), None
            if kind == "mean":
                return rows_VE[used].mean(0).expand(count, -1).clone(), None
            if kind == "john_hewitt":
                return normal(rows_VE[used], count, generator(seed, kind, role)), None
            if kind == "randn":
                drawn = torch.randn((count, base_VE.shape[1]), generator=generator(seed, kind, role), dtype=work)
                return drawn.to(base_VE.device), None
            return rows_VE.new_zeros((count, base_VE.shape[1])), None
        atoms_ND = plan.donor_VD[[i for i, _ in plan.anchors]].to(base_VE.device, work)
        base_NE = base_VE[[j for _, j in plan.anchors]].to(work)
        if kind == "linear":
            return y_TD @ linear_map(atoms_ND, base_NE), None
        if kind == "landmark_pca":
            return landmark_pca(y_TD, atoms_ND, base_NE), None
        if kind == "stb":
            return sparse_basis(y_TD, atoms_ND, base_NE, k)
        if kind == "common_interpolation":
            sparse = neighbours(y_TD, atoms_ND, k, self.metric, self.weighting, self.batch)
            return sparse.combine(base_NE), sparse.combine(atoms_ND)
        if kind == "mp_rope":
            donor_rope, base_rope = ropes
            assert donor_rope is not None  # both are checked before any work
            assert base_rope is not None
            width = base_NE.shape[1] - plan.biased
            parts = []
            for start in range(0, count, self.batch):
                code = mp_rope(y_TD[start : start + self.batch], atoms_ND, k, donor_rope)
                row_BE = code.combine(base_NE[:, :width].contiguous(), base_rope)
                if plan.biased:  # a bias is not rotated
                    row_BE = torch.cat([row_BE, code.sparse.combine(base_NE[:, width:])], dim=1)
                parts.append((row_BE, code.combine(atoms_ND, donor_rope)))
                progress(min(start + self.batch, count), count)
            return torch.cat([row for row, _ in parts]), torch.cat([near for _, near in parts])
        sparse = omp(y_TD, atoms_ND, k, batch=self.batch, progress=lambda done: progress(done, count))
        return sparse.combine(base_NE), sparse.combine(atoms_ND)


def find_undertrained(
    joined: SharedVocabulary, donor: tuple[Tensor, Tensor | None], base: tuple[Tensor, Tensor | None]
) -> Any:
    """Return under-trained ids of the donor and of the base; see `undertrained`."""
    ids = []
    for vocabulary, (embedding, head) in ((joined.donor, donor), (joined.base, base)):
        used = [i for i in vocabulary.tokens if i < len(embedding)]
        unused = [i for i in used if any(word in vocabulary.tokens[i].text for word in UNUSED_MARKS)]
        ids.append(undertrained(embedding.float(), None if head is None else head.float(), unused, used))
    return tuple(ids)


def _usable_id(found: int | None, rows: int, poor: set[int]) -> int | None:
    return None if found is None or found >= rows or found in poor else found


def _has_digit_run(vocabulary: Vocabulary, i: int) -> bool:
    """Return whether a token holds two digits or more in a row, so that it is never read digit by digit."""
    content = vocabulary.tokens[i].content
    return vocabulary.tokens[i].kind != "special" and any(48 <= a <= 57 and 48 <= b <= 57 for a, b in pairwise(content))
