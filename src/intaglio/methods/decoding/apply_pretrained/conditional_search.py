"""Search for likely texts, and for likely texts with an attribute a: exact modes and conditional beam search.

    log p(x | a) = log p(x) + log p(a | x) - const,     S(x_1..x_t) = log p(x_1..x_t) + gamma log q(a | x_1..x_t)

Dimension letters: N prefixes, K candidate tokens of each, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE, anatomy

Tokens = tuple[int, ...]
Attribute = Callable[[Sequence[Tokens], Tensor | None, Tensor], Tensor]
"""`log_q(prefixes, hidden_ND, tokens_NK) -> [N, K]`: log q(a | prefix and candidate).

Where the end of the text decides the attribute, a candidate that ends it has the exact value."""


class NextToken(Protocol):
    """A language model over prefixes of equal length: log-probabilities [N, V] and last hidden states [N, D]."""

    def __call__(self, prefixes: Sequence[Tokens]) -> tuple[Tensor, Tensor | None]:
        """Return both; the hidden states are None where there are none."""


class CachedPrefixes:
    """A `NextToken` of a model after a prompt; its cache follows beams and depth-first paths.

    Args:
        model: a causal language model.
        prompt_ids: token ids of the prompt, at least one.
        process: logits processor of `generate`, applied to log-probabilities. Default: none.
    """

    def __init__(self, model: Any, prompt_ids: Sequence[int], process: Any = None) -> None:
        self.model, self.prompt, self.process = model, tuple(prompt_ids), process
        self._base = anatomy(model).base
        self._rows: list[Tokens] = [()]
        self._cache = DynamicCache()

    @torch.no_grad()
    def __call__(self, prefixes: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """See `NextToken`."""
        texts = [self.prompt + prefix for prefix in prefixes]
        shared = [max((_common(row, text), -n) for n, row in enumerate(self._rows)) for text in texts]
        known = min(min(common for common, _ in shared), len(texts[0]) - 1)
        device = next(self.model.parameters()).device
        rows = torch.tensor([-n for _, n in shared], device=device)
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows, :, :known]
            layer.values = layer.values[rows, :, :known]
        ids_NL = torch.tensor([text[known:] for text in texts], device=device)
        mask = torch.ones(len(texts), len(texts[0]), dtype=torch.long, device=device)
        at = torch.arange(known, len(texts[0]), device=device).expand(len(texts), -1)
        hidden: list[Tensor] = []
        handle = self._base.register_forward_hook(
            lambda module, args, output: hidden.append(output.last_hidden_state[:, -1])
        )
        try:
            logits_N1V = self.model(
                input_ids=ids_NL, attention_mask=mask, position_ids=at, use_cache=True, **{CACHE: self._cache}
            ).logits
        finally:
            handle.remove()
        self._rows = texts
        log_probs_NV = logits_N1V[:, -1].float().log_softmax(-1)
        if self.process:
            log_probs_NV = self.process(torch.tensor(texts, device=device), log_probs_NV)
        return log_probs_NV, hidden[0]


def _common(a: Tokens, b: Tokens) -> int:
    """Return the length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class SearchedText:
    """A text of a search.

    Args:
        tokens: token ids, the end token left out.
        log_prob: log p in nats, that of the end token included.
        score: S; log_prob where there is no attribute.
        end: the end token; None where the text was cut off at the length limit.
    """

    tokens: Tokens
    log_prob: float
    score: float
    end: int | None

    @property
    def ids(self) -> list[int]:
        """Token ids with the end token."""
        return [*self.tokens, *([] if self.end is None else [self.end])]


@dataclass
class ModeSearch:
    """Result of an exact search.

    Args:
        modes: the most likely text of each length, or under None of any length.
        proven: whether the whole tree was searched or pruned; False after the node budget.
        nodes: prefixes that the model read.
    """

    modes: dict[int | None, SearchedText] = field(default_factory=dict)
    proven: bool = True
    nodes: int = 0


def exact_mode(
    model: NextToken,
    end_tokens: Collection[int],
    max_length: int,
    *,
    lengths: Collection[int] | None = None,
    bounds: Iterable[SearchedText] = (),
    node_budget: int = 10_000,
) -> ModeSearch:
    """Find the most likely texts by depth-first search with pruning.

    A prefix is left out if its log p does not exceed that of the best text known: log-probabilities only fall. Under
    `lengths` each length n has a best text of its own, and a text ends at those lengths alone.

    Args:
        model: log-probabilities of next tokens.
        end_tokens: tokens that end a text.
        max_length: most tokens before the end token.
        lengths: lengths to condition on. Default None: the most likely text of any length up to `max_length`.
        bounds: complete texts known before, such as those of a beam search. Default: none.
        node_budget: most prefixes that the model reads; then the result is not proven. Default 10,000.

    Returns:
        The modes; a length without a text of positive probability is left out.

    Raises:
        IntaglioError: a length outside 0 to `max_length`.
    """
    wanted: dict[int, int | None] = dict.fromkeys(range(max_length + 1)) if lengths is None else {n: n for n in lengths}
    if not wanted or not 0 <= min(wanted) <= max(wanted) <= max_length:
        raise IntaglioError(f"lengths are {sorted(wanted)}; at least one from 0 to max_length, {max_length}, is needed")
    result, deepest = ModeSearch(), max(wanted)

    def offer(text: SearchedText) -> None:
        key = wanted.get(len(text.tokens), -1)
        if key == -1 or text.end is None:
            return
        known = result.modes.get(key)
        if text.log_prob > (-math.inf if known is None else known.log_prob):
            result.modes[key] = text

    def bound(depth: int) -> float:
        keys = {key for n, key in wanted.items() if n >= depth}
        return min((result.modes[key].log_prob if key in result.modes else -math.inf) for key in keys)

    def children(prefix: Tokens, log_prob: float) -> Iterator[tuple[Tokens, float]]:
        result.nodes += 1
        row_V = model([prefix])[0][0].double()
        for end in end_tokens:
            total = log_prob + float(row_V[end])
            offer(SearchedText(prefix, total, total, end))
        if len(prefix) == deepest:
            return
        values, order = row_V.sort(descending=True, stable=True)
        for value, token in zip(values.tolist(), order.tolist(), strict=True):
            if log_prob + value <= bound(len(prefix) + 1):
                return
            if token not in end_tokens:
                yield (*prefix, token), log_prob + value

    for text in bounds:
        offer(text)
    path = [children((), 0.0)]
    while path:
        child = next(path[-1], None)
        if child is None:
            path.pop()
        elif result.nodes >= node_budget:
            result.proven = False
            break
        else:
            path.append(children(*child))
    return result


def conditional_beam_search(
    model: NextToken,
    end_tokens: Collection[int],
    max_new_tokens: int,
    *,
    beams: int,
    attribute: Attribute | None = None,
    top_k: int | None = None,
    gamma: float = 1.0,
) -> list[SearchedText]:
    """Return the best texts by S, at most `beams`, best first.

    Each beam is extended by its `top_k` most likely tokens and the end tokens, all of them are scored, and the best
    `beams` are kept; a text that ends there leaves the beam. The search stops when no beam's log p exceeds the score of
    the worst finished text. Without an attribute this is stock beam search with `length_penalty=0` and
    `early_stopping="never"`.

    Args:
        model: log-probabilities of next tokens.
        end_tokens: tokens that end a text.
        max_new_tokens: most tokens, the end token included.
        beams: number of beams B.
        attribute: log q of each extension. Default: log q = 0.
        top_k: candidates of each beam by log p, at least 2 B. Default: 2 B.
        gamma: weight of log q. Default 1.

    Raises:
        IntaglioError: no text has the attribute.
    """
    active: list[tuple[Tokens, float]] = [((), 0.0)]
    finished: list[SearchedText] = []
    for length in range(1, max_new_tokens + 1):
        prefixes = [prefix for prefix, _ in active]
        log_probs_NV, hidden_ND = model(prefixes)
        ends_NE = torch.tensor([list(end_tokens)] * len(active), dtype=torch.long, device=log_probs_NV.device)
        most = max(top_k or 0, 2 * beams)
        likely_NK = log_probs_NV.topk(min(most, log_probs_NV.shape[1])).indices
        repeated_NK = (likely_NK[..., None] == ends_NE[:, None, :]).any(-1)
        tokens_NK = torch.cat([likely_NK, ends_NE], 1)
        base_N1 = torch.tensor([[log_prob] for _, log_prob in active], dtype=torch.float64)
        log_probs_NK = base_N1 + log_probs_NV.gather(1, tokens_NK).double().cpu()
        scores_NK = log_probs_NK.clone()
        if attribute is not None and gamma:
            scores_NK += gamma * attribute(prefixes, hidden_ND, tokens_NK).double().cpu()
        scores_NK[:, : likely_NK.shape[1]][repeated_NK.cpu()] = -math.inf
        best = scores_NK.flatten().sort(descending=True, stable=True)
        active = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if score == -math.inf or len(active) == beams:
                break
            row, column = divmod(place, scores_NK.shape[1])
            token, log_prob = int(tokens_NK[row, column]), float(log_probs_NK[row, column])
            ended = token in end_tokens
            if (ended or length == max_new_tokens) and rank < beams:
                tokens = prefixes[row] if ended else (*prefixes[row], token)
                finished.append(SearchedText(tokens, log_prob, score, token if ended else None))
            elif not ended:
                active.append(((*prefixes[row], token), log_prob))
        finished = sorted(finished, key=lambda text: -text.score)[:beams]
        if not active or (len(finished) == beams and finished[-1].score >= max(value for _, value in active)):
            break
    if not finished:
        raise IntaglioError(
            f"no text of {max_new_tokens} tokens has the attribute; use more beams, a larger top_k or more tokens"
        )
    return finished
