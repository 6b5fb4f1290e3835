"""From a draft's state to logits: the model's own frozen output head, with a trained change, over the tokens that heads
may guess.

    full:      logits_i = C_i x                          C_i starts as [W, ..., W]
    low rank:  logits_i = [W, ..., W] x + A B_i x        A (shared by all heads) starts at 0
    none:      logits_i = [W, ..., W] x

W [V, D] is the model's output matrix and x [X] has one or more parts of width D. For a vocabulary of 49,152 and a width
of 576 a full matrix has 28 or 57 million entries a head; a shared low-rank change has under two.

A product with all of W is a fifth of a small model's own pass. Most text is made of few tokens, so heads may guess the
frequent ones only (`Words`): what they then cannot guess costs a draft, never a wrong token, as the model itself checks
every one. (Zhao et al., FR-Spec: Accelerating Large-Vocabulary Language Models via Frequency-Ranked Speculative
Sampling, 2025, arXiv 2502.14856, does so with a draft model.)

Dimension letters: R rows, V vocabulary, K tokens that may be guessed, D width, X inputs, M heads, r rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.trainer.causal_lm import IGNORED

MOST_WORDS = 8192
"""Tokens that are guessed where the vocabulary is larger than twice as many and no number is asked for."""
FULL = 1 << 20
"""Entries of all heads' matrices together up to which they are full where no rank is given."""
RANK = 32
"""The rank beyond that."""


def rank_of(rank: int | None, heads: int, vocabulary: int, inputs: int) -> int | None:
    """The rank to use: what was asked for, or full matrices (None) where they are small, else 32.

    Args:
        rank: asked for; None: the rule above.
        heads: M.
        vocabulary: V.
        inputs: X.
    """
    return rank if rank is not None else None if heads * vocabulary * inputs <= FULL else RANK


def words_of(texts: Iterable[Sequence[int]], vocabulary: int, most: int | None) -> Tensor | None:
    """The tokens that heads may guess, int64 [K] in the order of their ids; None for all of them.

    The most frequent ones of some text; where it has too few, those with the lowest ids besides, which the usual ways
    to make a vocabulary give to what is frequent.

    Args:
        texts: token ids.
        vocabulary: V.
        most: K; None: 8,192 if V is more than twice that, else all.
    """
    if most is None:
        most = MOST_WORDS if vocabulary > 2 * MOST_WORDS else vocabulary
    if most >= vocabulary:
        return None
    counts = Counter(token for ids in texts for token in ids)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))[:most]
    chosen = set(ranked)
    more = (token for token in range(vocabulary) if token not in chosen)
    return torch.tensor(sorted([*ranked, *(next(more) for _ in range(most - len(ranked)))]))


class Words(nn.Module):
    """The tokens that heads may guess, and the way between them and the model's vocabulary.

    Args:
        weight_VD: the model's output matrix, of which the tokens' rows are copied.
        tokens_K: token ids in rising order, int64. Default: all; then nothing is copied, and every way is the identity.
    """

    tokens_K: Tensor | None
    weight_KD: Tensor
    _place_V: Tensor

    def __init__(self, weight_VD: Tensor | None = None, tokens_K: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("tokens_K", tokens_K)
        if weight_VD is not None and tokens_K is not None:
            place_V = torch.full((len(weight_VD),), IGNORED)
            place_V[tokens_K] = torch.arange(len(tokens_K))
            self.register_buffer("_place_V", place_V, persistent=False)
            kept_KD = weight_VD.detach()[tokens_K.to(weight_VD.device)].cpu()
            self.register_buffer("weight_KD", kept_KD, persistent=False)

    def matrix(self, weight_VD: Tensor) -> Tensor:
        """The rows of the output matrix that belong to the tokens [K, D].

        Args:
            weight_VD: the model's output matrix.
        """
        return weight_VD if self.tokens_K is None else self.weight_KD

    def places(self, tokens: Tensor) -> Tensor:
        """Where tokens stand among those that may be guessed; -100 for the others.

        Args:
            tokens: ids, or -100.
        """
        if self.tokens_K is None:
            return tokens
        return torch.where(tokens == IGNORED, IGNORED, self._place_V[tokens.clamp(min=0)])

    def tokens(self, places: Tensor) -> Tensor:
        """The token ids at some places.

        Args:
            places: from 0 to K - 1.
        """
        return places if self.tokens_K is None else self.tokens_K[places]

    def narrow(self, logits_V: Tensor) -> Tensor:
        """The logits of the tokens alone [..., K].

        Args:
            logits_V: of the whole vocabulary [..., V].
        """
        return logits_V if self.tokens_K is None else logits_V[..., self.tokens_K]

    def wide(self, logits_K: Tensor) -> Tensor:
        """Logits of the whole vocabulary [..., V], minus infinity where a token may not be guessed.

        Args:
            logits_K: of the tokens [..., K].
        """
        if self.tokens_K is None:
            return logits_K
        found = logits_K.new_full((*logits_K.shape[:-1], len(self._place_V)), -torch.inf)
        found[..., self.tokens_K] = logits_K
        return found


class Vocabulary(nn.Module):
    """The output of M heads.

    Args:
        weight_VD: the model's output matrix, or the rows of it that heads may guess (`Words`).
        heads: M.
        copies: parts of width D in an input. Default 1.
        rank: of the shared change; 0: no change at all; None: full matrices, copies of the model's.
        generator: what B is drawn from.
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

    def forward(self, x_RX: Tensor, head: int, weight_VD: Tensor) -> Tensor:
        """Logits [R, V] of one head, of the state's dtype.

        Args:
            x_RX: states.
            head: from 0.
            weight_VD: the model's output matrix.
        """
        if self.rank is None:
            return F.linear(x_RX, self.full_MVX[head])
        summed_RD = sum(x_RX.chunk(self.copies, -1))
        assert isinstance(summed_RD, Tensor)
        logits_RV = F.linear(summed_RD.to(weight_VD.dtype), weight_VD).to(x_RX.dtype)
        if not self.rank:
            return logits_RV
        return logits_RV + F.linear(F.linear(x_RX, self.in_MrX[head]), self.out_Vr)
