"""OMPTransplant (Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation ..., 2025): another vocabulary.

The checkpoint keeps its transformer and gets the vocabulary of a donor. Rows of tokens that both have are copied; the
row of a new token t is made of a few shared tokens S, with the coefficients that make the donor's own row of t from
theirs:

    c = argmin ||donor_t - sum_{s in S} c_s donor_s||      row_t = sum_{s in S} c_s base_s

- `vocabulary`: what tokens stand for, and which of them both vocabularies have.
- `pursuit`: matching pursuit for many targets at a time.
- `baselines`: what else a row can be made of.
- `donor`: the donor's tokenizer and matrices.
- `rows`: the matrix of one role.
- `graft`: putting matrices, ids and tokenizer into the checkpoint.

Where this and the released tool (mergekit's tokensurgeon) part: tokens are joined by the bytes that they decode to
(`join: strings` compares spellings, as the tool does); a special token without a role is matched by its name, not with
every other such token; atoms are orthogonalised twice where they need it, not anew every 256 steps; the options for
prefixes and bytes act on the matrix that they name; `weighted_mean` weighs as the tool's comments say; the rotation of
`landmark_pca` is the one that fits; a head's bias is carried along.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load_config
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.methods.weights.omp_transplant.baselines import Metric, Pieces, Role, Weighting
from intaglio.methods.weights.omp_transplant.donor import Donor, about, check_matrix, rope_of
from intaglio.methods.weights.omp_transplant.graft import check_parts, graft, single_digits
from intaglio.methods.weights.omp_transplant.pursuit import BATCH, GRAM_BYTES, Rope, Sparse, omp
from intaglio.methods.weights.omp_transplant.rows import SHARED, Built, Plan, build, plan, poor_tokens
from intaglio.methods.weights.omp_transplant.vocabulary import Join, Joined, Vocabulary, join
from intaglio.modeling.anatomy import Anatomy, anatomy

__all__ = ["Donor", "Joined", "OMPTransplant", "Sparse", "Vocabulary", "join", "omp", "scaled_k"]

PAPER_K = 64
WIDTH_SHARE = 10
"""A support has at most the donor's width over this many atoms: near the width the donor's row is hit exactly, and the
coefficients, which then fit noise, say nothing in the base's space."""
LEAST_OVERLAP = 0.3
"""Below this share of shared tokens the two tokenizers are most likely read wrongly, or write different scripts."""

Approximation = Literal[
    "omp", "zero", "mean", "randn", "john_hewitt", "subword", "common_interpolation", "landmark_pca", "stb", "mp_rope",
    "linear",
]  # fmt: skip
Where = Literal["no", "embedding", "head", "both"]


def scaled_k(width: int, shared: int) -> int:
    """The paper's 64 atoms were tuned for widths in the thousands: a tenth of a narrower donor's width, at least 1.

    Args:
        width: of the donor's embedding.
        shared: tokens to choose from.
    """
    return min(PAPER_K, max(1, width // WIDTH_SHARE), shared)


class OMPTransplant(Method, slug="omp_transplant"):
    """Gives the checkpoint the donor's tokenizer without training: its transformer stays, its vocabulary is replaced.

    For the input embedding, and for the head where it is not the same matrix, each with the donor's own matrix of that
    role: a token that both vocabularies have keeps its row, bit for bit; a new token t gets sum_s c_s base_s, with the
    coefficients of the orthogonal matching pursuit that writes the donor's row of t by k shared tokens s. Atoms are not
    normalised, nothing is centred, coefficients are not clipped. Ids without a donor row stay zero. The donor's
    tokenizer, chat template and ids of special tokens come along; positions and everything else stay.

    Arithmetic suffers where the two tokenizers write numbers differently, which is told; `digits` then helps.

    The paper's k of 64 suits widths in the thousands. The default is min(64, width of the donor / 10);
    `OMPTransplant.paper(donor=...)` gives 64.

    Args:
        donor: whose tokenizer it gets: a bundled name, a directory or a hub id, pinned by `user/name@revision`. Of its
            weights only the embedding and the head are read.
        method: what new rows are made of. Default `omp`. For comparison: `zero`, `mean` (of the base's rows), `randn`
            (deviation 1), `john_hewitt` (drawn with the base's mean and covariance), `subword` (rows of the base's own
            pieces of the token), `common_interpolation` (nearest shared tokens), `landmark_pca`, `stb` (a basis of few
            shared tokens), `mp_rope` (pursuit with a rotation for each atom), `linear` (least squares over all shared
            tokens).
        k: atoms of a new row (`omp`, `mp_rope`, `stb`), or neighbours (`common_interpolation`). Default: by the width.
        join: which tokens are the same: those that decode to the same `bytes` (default), or those spelt by the same
            `strings`, as in the released tool.
        byte_match: (`join: strings`) a character of one byte takes the row of that lone byte, and the other way round,
            in the `embedding`, the `head`, `both`, or `no` (default). Joined by bytes they are the same anyway.
        prefix_match: likewise, a new token takes the row of its longest beginning that the base has. Default `no`.
        metric: (`common_interpolation`) `euclidean` (default) or `cosine`.
        weighting: (`common_interpolation`) by `distance` (default), `barycentric` or `least_squares`.
        pieces: (`subword`) `mean` (default), `sum`, `weighted_mean` or `first_last`.
        magikarp: leave under-trained tokens out of the shared ones, and rows zero that are so on both sides. Default
            false.
        noise: deviation of Gaussian noise on new rows. Default 0.
        scale: factor on new rows, after the noise. Default: none.
        digits: how the new tokenizer writes numbers: `donor` (default), to the letter; or `single`, digit by digit,
            which keeps the arithmetic of a base that does so, since single digits are shared tokens: tokens of several
            digits are then neither read nor said.
        least_overlap: the share of shared tokens, of the smaller vocabulary, below which nothing is done. Default 0.3.
        dtype: that rows are computed in, `float32` (default) or `float64`; they are stored in the base's.
        batch: new tokens at a time. Default 512.

    Raises:
        IntaglioError: an unknown donor, or one without a tokenizer; no shared tokens, or too few; k above their number;
            a head that is no plain linear layer; NaN rows; (`mp_rope`) a model without rotary positions.

    Warns:
        UserWarning: k is over half of the donor's width; numbers are written differently.

    Source: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, 2025,
    arXiv 2506.06607; where they differ, the released code. Departures from it are listed in the package's docstring.
    """

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
    def _bytes_once(self) -> Self:
        if self.join == "bytes" and self.byte_match != "no":
            raise ValueError("byte_match belongs to join: strings; joined by bytes, lone bytes match already")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The paper's 64 atoms, joined as in its released code.

        Args:
            overrides: fields that the caller sets, `donor` among them.
        """
        return cls(**{"k": PAPER_K, "join": "strings", **overrides})

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any linears: they stay as they are."""

    def check_model(self, parts: Anatomy) -> None:
        """Refuse, before any work, an unknown donor and a model whose head or embedding cannot be replaced.

        Args:
            parts: of the model.

        Raises:
            IntaglioError: says what is wrong.
        """
        check_parts(parts)
        config, _ = about(self.donor)
        self._check_ropes(rope_of(config), int(config.hidden_size), parts)

    def check_tokenizer(self, tokenizer: Any, source: str) -> None:
        """Refuse, before any work, a pair of tokenizers that share too little.

        Args:
            tokenizer: of the checkpoint.
            source: what the checkpoint is called.

        Raises:
            IntaglioError: says how many tokens they share, and how many are needed.
        """
        config, other = about(self.donor)
        joined = self.joined(tokenizer, other, source)
        self.atoms(int(config.hidden_size), len(joined.ids))

    def _check_ropes(self, donor: Rope | None, width: int, parts: Anatomy) -> None:
        if self.method != "mp_rope":
            return
        base = rope_of(parts.config)
        for whose, rope, size in (("the donor", donor, width), ("the model", base, int(parts.config.hidden_size))):
            if rope is None or not rope.fits(size):
                raise IntaglioError(f"method mp_rope turns heads of an even size by rotary positions; {whose} has none")

    def joined(self, tokenizer: Any, donor: Any, source: str) -> Joined:
        """The shared tokens.

        Args:
            tokenizer: of the checkpoint.
            donor: the donor's tokenizer.
            source: what the checkpoint is called.

        Raises:
            IntaglioError: no tokenizer, or too few shared tokens.
        """
        if tokenizer is None:
            raise IntaglioError(f"{source or 'the checkpoint'} has no tokenizer, so its tokens cannot be compared")
        found = join(Vocabulary.of(tokenizer), Vocabulary.of(donor), self.join)
        if not found.ids:
            raise IntaglioError(f"the tokenizers of {source or 'the checkpoint'} and {self.donor} share no token")
        if found.overlap < self.least_overlap:
            raise IntaglioError(
                f"the tokenizers of {source or 'the checkpoint'} and {self.donor} share {len(found.ids):,} tokens, "
                f"{found.overlap:.1%} of the smaller vocabulary; least_overlap asks for {self.least_overlap:.0%}"
            )
        return found

    def atoms(self, width: int, shared: int) -> int:
        """k for a donor of this width.

        Args:
            width: of the donor's rows.
            shared: tokens to choose from.

        Raises:
            IntaglioError: there are fewer than k.
        """
        if self.k is None:
            return scaled_k(width, shared)
        if self.method in SHARED and self.k > shared:
            raise IntaglioError(f"k is {self.k}; the two vocabularies share {shared:,} tokens to choose from")
        return self.k

    def new_tokens(self, before: Any, after: Any) -> frozenset[int]:
        """Ids of a tokenizer's tokens that an earlier one did not have.

        Args:
            before: the earlier tokenizer.
            after: the one that it was replaced with.
        """
        found = join(Vocabulary.of(before), Vocabulary.of(after), self.join)
        return frozenset(found.donor.tokens.keys() - found.ids.keys())

    def estimate(self, workload: Workload) -> Cost:
        """Return what a transplant takes, as if half of the donor's tokens were new, for one matrix.

        Args:
            workload: of the model.
        """
        _, config = load_config(self.donor)
        config = config.get_text_config()
        rows, width = int(config.vocab_size), int(config.hidden_size)
        half = rows / 2
        held = 4 * rows * (width + workload.hidden) * 2 + 4 * self.batch * rows
        if self.method not in ("omp", "mp_rope", "common_interpolation"):
            return Cost(2.0 * half * width * (width + workload.hidden), 0.0, int(held))
        passes = 1 if self.method == "common_interpolation" else self.atoms(width, int(half))
        gram = min(4 * half * half, GRAM_BYTES) if self.method == "omp" else 0
        # A lone product reaches twice the rate of a model's pass.
        return Cost(half * half * width * passes, 0.0, int(held + gram))

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Give `checkpoint` the donor's tokenizer and return it.

        Args:
            checkpoint: changed in place: its embedding, its head, its tokenizer and the ids in its configuration.
            calibration: not used.
            seed: of what is drawn (`randn`, `john_hewitt`, `noise`). Default 0.
            batch_size: not used.
            progress: called after each batch of new tokens.

        Raises:
            IntaglioError: see the class.
        """
        check_parts(anatomy(checkpoint.model))
        if checkpoint.tokenizer is None:
            raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so its tokens are unknown")
        return self.transplant(checkpoint, Donor.read(self.donor), seed=seed, progress=progress)

    def transplant(
        self, checkpoint: Checkpoint, donor: Donor, *, seed: int = 0, progress: Progress = no_progress
    ) -> Checkpoint:
        """The same from a donor that is read already.

        Args:
            checkpoint: changed in place.
            donor: what is taken from.
            seed: of what is drawn. Default 0.
            progress: called after each batch of new tokens.

        Raises:
            IntaglioError: see the class; the checkpoint is then as it was.
        """
        parts = anatomy(checkpoint.model)
        check_parts(parts)
        self._check_ropes(donor.rope, donor.embedding_VD.shape[1], parts)
        joined = self.joined(checkpoint.tokenizer, donor.tokenizer, checkpoint.source)
        embedding: Any = parts.embedding
        head: Any = parts.head
        base = _matrices(embedding.weight.detach(), None if parts.tied or head is None else head)
        given = {"embedding": donor.embedding_VD, "head": donor.embedding_VD}
        if donor.head_VD is not None:
            given["head"] = donor.head_VD
        for role in base:
            check_matrix(base[role], f"the {role} of {checkpoint.source or 'the checkpoint'}")
            check_matrix(given[role], f"the {role} of {donor.name}")
        bias = getattr(head, "bias", None) if head is not None else None
        biased = {role: bias is not None and (role == "head" or parts.tied) for role in base}
        whole = {role: _with_bias(matrix, bias if biased[role] else None) for role, matrix in base.items()}
        poor: tuple[set[int], set[int]] = (set(), set())
        if self.magikarp:
            poor = poor_tokens(joined, (donor.embedding_VD, donor.head_VD), (base["embedding"], base.get("head")))
        plans: dict[Role, Plan] = {
            role: plan(self, role, joined, len(given[role]), len(base[role]), poor) for role in _roles(base)
        }
        k = min(self.atoms(given[role].shape[1], len(plans[role].anchors)) for role in plans)
        self._warn(joined, k, donor.embedding_VD.shape[1])
        ropes = (donor.rope, rope_of(parts.config))
        built: dict[Role, Built] = {}
        for role, planned in plans.items():
            built[role] = build(
                self, role, planned, joined, given[role], whole[role], k, ropes, seed,
                biased=biased[role], progress=partial(_tell, progress, f"{self.slug}: {role}"),
            )  # fmt: skip
        tokens = {"k": k} if self.method in (*_COUNTED, "stb") else {}
        numbers = {str(role): part.told for role, part in built.items()}
        chosen = {**tokens, **self._told(joined, base["embedding"], donor), **numbers}
        several = [i for i in joined.donor.tokens if _several_digits(joined.donor, i)]
        single = self.digits == "single"
        graft(
            checkpoint,
            single_digits(donor.tokenizer) if single else donor.tokenizer,
            donor,
            {role: part.matrix_RE for role, part in built.items()},
            several if single else [],
        )
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen)
        return checkpoint

    def _told(self, joined: Joined, embedding_VE: Tensor, donor: Donor) -> dict[str, Any]:
        tokens = len(joined.donor.tokens)
        return {
            "tokens": {"base": len(joined.base.tokens), "donor": tokens, "shared": len(joined.ids)},
            "rows": {"before": len(embedding_VE), "after": joined.donor.rows},
            "shared of the donor's": len(joined.ids) / tokens,
            "overlap": joined.overlap,
            "widths": {"base": embedding_VE.shape[1], "donor": donor.embedding_VD.shape[1]},
            "digits of a number token": {"base": joined.base.digits, "donor": joined.donor.digits},
        }

    def _warn(self, joined: Joined, k: int, width: int) -> None:
        if self.method == "omp" and 2 * k > width:
            warnings.warn(
                f"omp_transplant: k is {k}, over half of the donor's width of {width}: the donor's rows are then "
                "nearly hit and the coefficients mean little in the base's space",
                stacklevel=4,
            )
        base, donor = joined.base.digits, joined.donor.digits
        if base != donor and not (self.digits == "single" and base == 1):
            help_ = "; digits: single keeps the base's way" if base == 1 else ""
            warnings.warn(
                f"omp_transplant: a number token has up to {base} digits in the base and up to {donor} in the donor, "
                f"so expect arithmetic to suffer{help_}",
                stacklevel=4,
            )


_COUNTED = ("omp", "mp_rope", "common_interpolation")


def _tell(progress: Progress, what: str, done: int, total: int) -> None:
    progress(done, total, what)


def _several_digits(vocabulary: Vocabulary, i: int) -> bool:
    """Whether a token holds two digits or more in a row, so that it is never read digit by digit."""
    content = vocabulary.tokens[i].content
    return vocabulary.tokens[i].kind != "special" and any(48 <= a <= 57 and 48 <= b <= 57 for a, b in pairwise(content))


def _matrices(embedding_VE: Tensor, head: Any) -> dict[str, Tensor]:
    return {"embedding": embedding_VE} | ({} if head is None else {"head": head.weight.detach()})


def _roles(base: dict[str, Tensor]) -> tuple[Role, ...]:
    return ("embedding", "head") if "head" in base else ("embedding",)


def _with_bias(matrix_VE: Tensor, bias_V: Tensor | None) -> Tensor:
    """A matrix with the head's bias as one more column: what rows are made of, a row's bias is made of too."""
    return matrix_VE if bias_V is None else torch.cat([matrix_VE, bias_V.detach()[:, None].to(matrix_VE.dtype)], dim=1)
