"""Layout of mixed prompts, curriculum of lengths, and the arithmetic of the expansion policy.

Dimension letters: T positions, S tokens of a context, L chunks of a context, G sampled sets, P picks of a set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN = -1
"""Slot of a position that holds a token."""

RATIOS = (0.5, 2.0)
"""Ratio between the weights of a length and of half that length, in the first and in the last phase of a curriculum.

The paper's table of mixtures was not at hand; only its geometric form is known.
"""

Piece = Tensor | int
"""Part of a prompt: token ids, int64, or the row of a chunk in the table of embeddings."""


def layout(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Return the token ids (0 for chunks) and the slots (`TOKEN` for tokens) of a prompt, int64 [T] each."""
    ids = [piece if isinstance(piece, Tensor) else torch.zeros(1, dtype=torch.int64) for piece in pieces]
    slots = [torch.full_like(p, TOKEN) if isinstance(p, Tensor) else torch.tensor([p]) for p in pieces]
    empty = torch.zeros(0, dtype=torch.int64)
    return torch.cat([empty, *ids]), torch.cat([empty, *slots])


def is_compressible(ids_S: Tensor, size: int, tail: str) -> list[bool]:
    """Return for each chunk of a passage whether it can be one embedding; with `tail: tokens` a short one cannot."""
    return [tail == "encode" or len(chunk) == size for chunk in ids_S.split(size)] if len(ids_S) else []


def context_pieces(ids_S: Tensor, size: int, rows: Sequence[int | None]) -> list[Piece]:
    """Return a passage's chunks in order, each as its row in the table, or as tokens where that is None."""
    chunks = ids_S.split(size) if len(ids_S) else ()
    return [chunk if row is None else row for chunk, row in zip(chunks, rows, strict=True)]


def lengths(most: int) -> list[int]:
    """Return the numbers of chunks of a curriculum: powers of two, then the most."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def curriculum_weights(count: int, progress: float) -> Tensor:
    """Return the probabilities of `count` lengths, float64; there are as many phases as lengths.

    w_j is proportional to rho^j; rho rises geometrically over the phases between the two `RATIOS`.

    Args:
        count: number of lengths, ascending.
        progress: share of the steps that are done, in [0, 1].
    """
    phase = min(int(progress * count), count - 1)
    low, high = RATIOS
    ratio = low * (high / low) ** (phase / max(1, count - 1))
    weights = ratio ** torch.arange(count, dtype=torch.float64)
    return weights / weights.sum()


def draw_length(most: int, progress: float, rng: torch.Generator) -> int:
    """Draw the number of chunks of a training row."""
    choices = lengths(most)
    return choices[int(torch.multinomial(curriculum_weights(len(choices), progress), 1, generator=rng))]


def expansion_count(chunks: int, share: float) -> int:
    """Return how many of some chunks stay tokens; at least one unless the share is 0."""
    return max(1, round(share * chunks)) if share and chunks else 0


def effective_rate(size: int, share: float) -> float:
    """Return tokens of context per position, k / (1 - p + k p)."""
    return size / (1 - share + size * share)


def sample_picks(scores_L: Tensor, picks: int, groups: int, rng: torch.Generator) -> Tensor:
    """Draw ordered sets of chunks without replacement by softmax over the chunks that are left, int64 [G, P].

    The order of the largest scores after adding Gumbel noise has that distribution.
    """
    uniform_GL = torch.rand((groups, len(scores_L)), generator=rng, dtype=torch.float64).clamp_min(1e-300)
    noise_GL = -(-uniform_GL.log()).log()
    return (scores_L.detach().double().cpu() + noise_GL).topk(picks, dim=-1).indices


def pick_log_probs(scores_L: Tensor, picks_GP: Tensor) -> Tensor:
    """Return the log-probability [G] of ordered picks: the sum of log-softmaxes with earlier picks masked out."""
    left_GL = scores_L.expand(len(picks_GP), -1)
    total_G = scores_L.new_zeros(len(picks_GP))
    for pick_G1 in picks_GP.split(1, dim=1):
        total_G = total_G + left_GL.log_softmax(-1).gather(1, pick_G1)[:, 0]
        left_GL = left_GL.scatter(1, pick_G1, -math.inf)
    return total_G


def advantages(rewards_G: Tensor) -> Tensor:
    """Return (r - mean) / std within a group, zeros where all rewards are equal."""
    centred_G = rewards_G - rewards_G.mean()
    std = centred_G.square().mean().sqrt()
    return centred_G / std if float(std) > 1e-8 else torch.zeros_like(rewards_G)


def clipped_loss(log_probs_G: Tensor, old_G: Tensor, advantages_G: Tensor, clip: float) -> Tensor:
    """Return the clipped surrogate loss of PPO: -mean min(r A, clip(r, 1 - clip, 1 + clip) A)."""
    ratio_G = (log_probs_G - old_G).exp()
    return -torch.minimum(ratio_G * advantages_G, ratio_G.clamp(1 - clip, 1 + clip) * advantages_G).mean()
