"""Hidden state optimization: gradient steps on the cached keys and values, window by window, with a frozen model.

    L(H) = -sum_t log p(x_{t+1} | H, x_a..x_t)  over window x_a..x_{a+w-1},      H <- step(H, dL/dH)

The losses of a window are those before its update. The window's own keys and values then join H.

Dimension letters: B rows, T tokens, S cached states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE
from intaglio.trainer.preserve_state import preserve_grads, preserve_modes

EPS = 1e-8


@dataclass(frozen=True)
class CacheOptimizer:
    """Update rule of cached states.

    Args:
        rule: `sgd`, H - step g; `rms`, H - step g / rms(g), the root mean square over each layer's keys or values of a
            row; `adam`, with moments and step counts of each cached state, which shift with the cache. Default `rms`.
        step_size: 0 leaves the cache as it is. Default 0.001, for `rms`: SmolLM2's keys have a root mean square
            of about 2 and its values of 1.
        steps: updates of the cache on each window. Default 1.
        update_own: whether the window's own states are updated too. Default False: the earlier ones alone.
        memory: most cached states; the oldest are dropped. Default: no limit.
        betas: of Adam. Default (0.9, 0.999).
    """

    rule: Literal["sgd", "rms", "adam"] = "rms"
    step_size: float = 0.001
    steps: int = 1
    update_own: bool = False
    memory: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class OptimizedCache:
    """Cached states with the optimizer's moments of each.

    Args:
        states: keys and values of each layer in turn, [B, H, S, D].
        moments: Adam's first and second moments of each tensor in `states`.
        updates_S: number of updates of each cached state.
        position: number of tokens read, those of dropped states included.
    """

    states: list[Tensor] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    updates_S: Tensor = field(default_factory=lambda: torch.zeros(0))
    position: int = 0

    @property
    def length(self) -> int:
        """Number of cached states."""
        return self.states[0].shape[-2] if self.states else 0

    def as_cache(self) -> DynamicCache:
        """Return the states as a stock cache."""
        cache = DynamicCache()
        for layer in range(len(self.states) // 2):
            cache.update(self.states[2 * layer], self.states[2 * layer + 1], layer)
        return cache

    def append(self, new: Sequence[Tensor]) -> None:
        """Add the states of tokens just read, with zero moments."""
        old = self.states or [x.detach()[..., :0, :] for x in new]
        moments = self.moments or [(torch.zeros_like(x), torch.zeros_like(x)) for x in old]
        count = new[0].shape[-2]
        self.updates_S = F.pad(self.updates_S.to(new[0].device), (0, count))
        self.states = [torch.cat([x, y.detach()], -2) for x, y in zip(old, new, strict=True)]
        self.moments = [(F.pad(m, (0, 0, 0, count)), F.pad(v, (0, 0, 0, count))) for m, v in moments]
        self.position += count

    def drop(self, memory: int) -> None:
        """Drop the oldest states beyond a number of them, with their moments."""
        self.updates_S = self.updates_S[-memory:]
        self.states = [x[..., -memory:, :] for x in self.states]
        self.moments = [(m[..., -memory:, :], v[..., -memory:, :]) for m, v in self.moments]

    def step(self, gradients: Sequence[Tensor], optimizer: CacheOptimizer) -> None:
        """Take one optimizer step on the states."""
        self.updates_S = self.updates_S + 1
        for index, (x, g) in enumerate(zip(self.states, gradients, strict=True)):
            if optimizer.rule == "rms":
                g = g / (g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + EPS)
            elif optimizer.rule == "adam":
                (b1, b2), (m, v) = optimizer.betas, self.moments[index]
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
                self.moments[index] = (m, v)
                t = self.updates_S[:, None]
                g = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + EPS)
            self.states[index] = x - optimizer.step_size * g


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze a model in evaluation mode."""
    with preserve_modes(model), preserve_grads(model):
        model.eval()
        model.requires_grad_(False)
        yield


def read(model: Any, ids_BT: Tensor, cache: OptimizedCache, *, embed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return logits [B, T, V] of tokens that follow a cache, and all keys and values, old and new."""
    past = cache.as_cache()
    at = torch.arange(cache.position, cache.position + ids_BT.shape[1], device=ids_BT.device)
    mask = torch.ones(len(ids_BT), cache.length + ids_BT.shape[1], dtype=torch.long, device=ids_BT.device)
    inputs: dict[str, Any] = {"input_ids": ids_BT}
    if embed:  # so that the window's own states have a gradient
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids_BT).requires_grad_()}
    logits_BTV: Tensor = model(
        **inputs, attention_mask=mask, position_ids=at.expand(len(ids_BT), -1), use_cache=True, **{CACHE: past}
    ).logits
    return logits_BTV, [x for layer in past.layers for x in (layer.keys, layer.values)]


def negative_log_likelihood(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Return -log p of the targets in nats, float32 [B, T]."""
    return F.cross_entropy(logits_BTV.float().transpose(1, 2), target_BT, reduction="none")


def check_rows(model: Any, ids_BT: Tensor) -> None:
    """Refuse rows without a next token or longer than the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if not 2 <= ids_BT.shape[1] <= context:
        raise IntaglioError(
            f"a text of {ids_BT.shape[1]} tokens is given; hidden state optimization reads 2 to the model's context of"
            f" {context}"
        )


def optimize_cache(
    model: Any, ids_BT: Tensor, window: int, optimizer: CacheOptimizer, *, update_last: bool = True
) -> tuple[Tensor, OptimizedCache]:
    """Read rows window by window and update the cache after each; return losses [B, T-1] and the cache.

    The cache holds the states of all tokens but the last. Rows are independent: their gradients and norms are their
    own. The parameters take no gradient and stay as they are.
    """
    check_rows(model, ids_BT)
    inputs_BT, target_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    cache, losses, own = OptimizedCache(), [], optimizer.update_own
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        for start in range(0, inputs_BT.shape[1], window):
            piece, earlier = slice(start, start + window), cache.length
            ends = start + window >= inputs_BT.shape[1]
            updates = optimizer.steps if (earlier or own) and (update_last or not ends) else 0
            for turn in range(max(1, updates)):
                cache.states = [x.detach().requires_grad_(updates > 0) for x in cache.states]
                logits_BTV, states = read(model, inputs_BT[:, piece], cache, embed=own and updates > 0)
                nll_BT = negative_log_likelihood(logits_BTV, target_BT[:, piece])
                if turn == 0:
                    losses.append(nll_BT.detach())
                gradients = [] if not updates else torch.autograd.grad(nll_BT.sum(), states)
                last = turn == max(1, updates) - 1
                if updates and earlier and not (own and last):
                    cache.step([g[..., :earlier, :] for g in gradients], optimizer)
                if last:
                    cache.append([x[..., earlier:, :] for x in states])
                if updates and own and last:
                    cache.step(gradients, optimizer)
            if optimizer.memory is not None:
                cache.drop(optimizer.memory)
    return torch.cat(losses, 1), cache


def hso_score(model: Any, ids_BT: Tensor, window: int, optimizer: CacheOptimizer | None = None) -> Tensor:
    """Return -log p of every token but the first in nats, float32 [B, T-1], each before the update on its window.

    Args:
        model: a causal language model; its parameters stay as they are.
        ids_BT: rows of equal length, int64 [B, T], T at most the model's context.
        window: tokens w between two updates.
        optimizer: update rule. Default: `CacheOptimizer()`. With a step size of 0 the sum is the plain model's.

    Raises:
        IntaglioError: rows of fewer than 2 tokens or beyond the context.
    """
    return optimize_cache(model, ids_BT, window, optimizer or CacheOptimizer(), update_last=False)[0]


def hso_prefill(model: Any, ids_BT: Tensor, window: int, optimizer: CacheOptimizer | None = None) -> OptimizedCache:
    """Return the optimized cache of all tokens but the last, to decode from; arguments as `hso_score`."""
    return optimize_cache(model, ids_BT, window, optimizer or CacheOptimizer())[1]


def next_logits(model: Any, cache: OptimizedCache, ids_BL: Tensor, *, memory: int | None = None) -> Tensor:
    """Read the last token of growing rows, add its states to the cache, and return the next token's logits [B, V]."""
    earlier = cache.length
    logits_B1V, states = read(model, ids_BL[:, -1:], cache)
    cache.append([x[..., earlier:, :] for x in states])
    if memory is not None:
        cache.drop(memory)
    return logits_B1V[:, -1]


@torch.no_grad()
def hso_classify(
    model: Any,
    prompt_ids: Sequence[int],
    labels: Sequence[Sequence[int]],
    window: int,
    optimizer: CacheOptimizer | None = None,
    *,
    neutral_ids: Sequence[int] | None = None,
) -> Tensor:
    """Return log p(label | prompt) in nats, float32 [labels]: few-shot classification with an optimized cache.

    The cache is updated on the prompt, not on the labels.

    Args:
        model: a causal language model.
        prompt_ids: demonstrations and the question, at least 2 tokens.
        labels: token ids of each label.
        window: tokens between two updates.
        optimizer: update rule. Default: `CacheOptimizer()`.
        neutral_ids: a prompt without content; its log-probabilities are subtracted. Default: no calibration.

    Raises:
        IntaglioError: no labels, an empty one, or a prompt as in `hso_score`.
    """
    if not labels or not all(len(label) for label in labels):
        raise IntaglioError("labels are missing or one is empty; give token ids of at least one token for each")
    device = next(model.parameters()).device
    cache = hso_prefill(model, torch.tensor([list(prompt_ids)], device=device), window, optimizer)
    scores = []
    with frozen(model):
        for label in labels:
            ids_1L = torch.tensor([[prompt_ids[-1], *label]], device=device)
            logits, _ = read(model, ids_1L[:, :-1], cache)
            scores.append(-negative_log_likelihood(logits, ids_1L[:, 1:]).sum())
    result = torch.stack(scores)
    if neutral_ids is None:
        return result
    return result - hso_classify(model, neutral_ids, labels, window, optimizer)
