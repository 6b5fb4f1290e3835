"""Output of draft heads: the model's frozen output matrix with a trained change, over the tokens that may be guessed.

    full:      logits_i = C_i x                          C_i starts as [W, ..., W]
    low rank:  logits_i = [W, ..., W] x + A B_i x        A (shared by all heads) starts at 0
    none:      logits_i = [W, ..., W] x

The bias of the model's head and its transform of the logits (a scaling, a soft cap) follow (`TargetHead`).

W [V, D] is the model's output matrix and x [X] has one or more parts of width D. For a vocabulary of 49,152 and a width
of 576 a full matrix has 28 or 57 million entries per head; a shared low-rank change has under two.

A product with all of W is a fifth of a small model's own pass. Most text consists of few tokens, so heads may guess the
frequent ones only (`DraftVocabulary`): a token that they cannot guess costs a draft, never a wrong token, as the model
itself verifies every one. (Zhao et al., FR-Spec: Accelerating Large-Vocabulary Language Models via Frequency-Ranked
Speculative Sampling, 2025, arXiv 2502.14856, does so with a draft model.)

Dimension letters: R rows, V vocabulary, K tokens that may be guessed, D width, X inputs, M heads, r rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import Anatomy
from intaglio.modeling.partial_pass import after_blocks
from intaglio.trainer.causal_lm import IGNORED

MAX_DRAFT_VOCABULARY = 8192
"""Tokens that may be guessed by default, where the vocabulary is more than twice as large."""
FULL = 1 << 20
"""Most entries of all heads' matrices together for full matrices, if no rank is given."""
RANK = 32
"""The rank beyond that."""


def resolve_rank(rank: int | None, heads: int, vocabulary: int, inputs: int) -> int | None:
    """Return the given rank; by default full matrices (None) where they are small, else 32."""
    return rank if rank is not None else None if heads * vocabulary * inputs <= FULL else RANK


def build_draft_vocabulary(texts: Iterable[Sequence[int]], vocabulary: int, most: int | None) -> Tensor | None:
    """Return the most frequent tokens of some texts, int64 [K] in the order of their ids; None for all tokens.

    If the texts have too few, the lowest ids are added, which the usual ways to build a vocabulary give to frequent
    tokens.

    Args:
        texts: token ids.
        vocabulary: V.
        most: K; None: 8,192 if V is more than twice that, else all.
    """
    if most is None:
        most = MAX_DRAFT_VOCABULARY if vocabulary > 2 * MAX_DRAFT_VOCABULARY else vocabulary
    if most >= vocabulary:
        return None
    counts = Counter(token for ids in texts for token in ids)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))[:most]
    chosen = set(ranked)
    more = (token for token in range(vocabulary) if token not in chosen)
    return torch.tensor(sorted([*ranked, *(next(more) for _ in range(most - len(ranked)))]))


class DraftVocabulary(nn.Module):
    """The tokens that heads may guess, and the mapping between them and the model's vocabulary.

    Args:
        weight_VD: the model's output matrix, of which the tokens' rows are copied.
        tokens_K: token ids in increasing order, int64. Default: all; then nothing is copied, and every mapping is the
            identity.
    """

    tokens_K: Tensor | None
    weight_KD: Tensor
    _index_V: Tensor

    def __init__(self, weight_VD: Tensor | None = None, tokens_K: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("tokens_K", tokens_K)
        if weight_VD is not None and tokens_K is not None:
            index_V = torch.full((len(weight_VD),), IGNORED)
            index_V[tokens_K] = torch.arange(len(tokens_K))
            self.register_buffer("_index_V", index_V, persistent=False)
            kept_KD = weight_VD.detach()[tokens_K.to(weight_VD.device)].cpu()
            self.register_buffer("weight_KD", kept_KD, persistent=False)

    def matrix(self, weight_VD: Tensor) -> Tensor:
        """Return the rows of the output matrix that belong to the tokens [K, D]."""
        return weight_VD if self.tokens_K is None else self.weight_KD

    def indices(self, tokens: Tensor) -> Tensor:
        """Return the indices of token ids in the draft vocabulary; -100 for -100 and for tokens outside."""
        if self.tokens_K is None:
            return tokens
        return torch.where(tokens == IGNORED, IGNORED, self._index_V[tokens.clamp(min=0)])

    def tokens(self, indices: Tensor) -> Tensor:
        """Return the token ids of indices from 0 to K - 1."""
        return indices if self.tokens_K is None else self.tokens_K[indices]

    def narrow(self, logits_V: Tensor) -> Tensor:
        """Return the logits of the draft vocabulary [..., K] from those of the whole vocabulary [..., V]."""
        return logits_V if self.tokens_K is None else logits_V[..., self.tokens_K]

    def wide(self, logits_K: Tensor) -> Tensor:
        """Return logits of the whole vocabulary [..., V], minus infinity for tokens that may not be guessed."""
        if self.tokens_K is None:
            return logits_K
        logits_V = logits_K.new_full((*logits_K.shape[:-1], len(self._index_V)), -torch.inf)
        logits_V[..., self.tokens_K] = logits_K
        return logits_V


class TargetHead:
    """The target's own output head over the draft vocabulary: T(W x + b).

    T is what the model applies to its logits: the scaling of Granite and Cohere, the soft cap of Gemma 2.

    Args:
        parts: of the target.
        words: the draft vocabulary, on the target's device.

    Raises:
        IntaglioError: the model has no output head.
    """

    def __init__(self, parts: Anatomy, words: DraftVocabulary) -> None:
        if parts.head is None:
            raise IntaglioError(f"{type(parts.model).__name__} has no output head, so nothing can be guessed for it")
        self._parts = parts
        weight_VD: Tensor = parts.head.weight  # type: ignore[assignment]
        self.weight_KD = words.matrix(weight_VD)
        bias_V: Tensor | None = getattr(parts.head, "bias", None)
        self._bias_K = None if bias_V is None else words.narrow(bias_V.detach())
        probe_1K = torch.linspace(-9.0, 9.0, len(self.weight_KD), device=weight_VD.device, dtype=weight_VD.dtype)[None]
        with torch.no_grad():
            self._changes_logits = not torch.equal(self._transform(probe_1K), probe_1K)

    def _transform(self, raw_RK: Tensor) -> Tensor:
        hidden_RD = self.weight_KD.new_zeros(len(raw_RK), int(self._parts.config.hidden_size))
        return after_blocks(self._parts, hidden_RD, lambda _: raw_RK[:, None])

    def finish(self, raw_RK: Tensor) -> Tensor:
        """Return logits [R, K] from products with the output matrix; gradients pass."""
        if self._bias_K is not None:
            raw_RK = raw_RK + self._bias_K.to(raw_RK.dtype)
        return self._transform(raw_RK) if self._changes_logits else raw_RK


class DraftLMHead(nn.Module):
    """The output of M heads.

    Args:
        weight_VD: the model's output matrix, or its rows of the draft vocabulary.
        heads: M.
        copies: parts of width D in an input.
        rank: of the shared change; 0: no change; None: full matrices, copies of the model's.
        generator: source of B.
    """

    def __init__(
        self, weight_VD: Tensor, heads: int, copies: int, rank: int | None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        vocabulary, width = weight_VD.shape
        inputs = copies * width
        self.copies, self.rank = copies, rank
        if rank is None:
            start = weight_VD.detach().float().cpu().repeat(1, copies)
            self.full_MVX = nn.Parameter(start.expand(heads, -1, -1).clone())
        elif rank:
            self.out_Vr = nn.Parameter(torch.zeros(vocabulary, rank))
            self.in_MrX = nn.Parameter(torch.randn(heads, rank, inputs, generator=generator) / inputs**0.5)

    def forward(self, x_RX: Tensor, head: int, target: TargetHead) -> Tensor:
        """Return logits [R, V] of one head (from 0), in the state's dtype, through the target's own transform."""
        return target.finish(self._raw(x_RX, head, target.weight_KD))

    def _raw(self, x_RX: Tensor, head: int, weight_VD: Tensor) -> Tensor:
        if self.rank is None:
            return F.linear(x_RX, self.full_MVX[head])
        summed_RD = x_RX.unflatten(-1, (self.copies, -1)).sum(-2)
        logits_RV = F.linear(summed_RD.to(weight_VD.dtype), weight_VD).to(x_RX.dtype)
        if not self.rank:
            return logits_RV
        return logits_RV + F.linear(F.linear(x_RX, self.in_MrX[head]), self.out_Vr)
