"""Metrics of generated outputs: repetition within a text, diversity between texts, overlap with training data.

Outputs are sequences of items: token ids, or `words` where a tokenizer's variants of a word should count as equal.
Dimension letters: N texts, P tokens of a prefix, B batch, L sequence, T positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.partial_pass import HeadOnly, final_hidden

Items = Sequence[Hashable]
WINDOW = 96
"""Last items of a text over which its type-token ratio is taken."""
OVERLAP = 5
"""Items of an n-gram that counts as copied."""
PREFIX, CONTINUED = 32, 256
"""Tokens of a held-out text that are continued, and tokens in all, as in the study of hyperfitting."""
ELEMENTS = 1 << 24
"""Limit of elements in a float32 table of logits computed at a time."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def ngrams(items: Items, n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence in order."""
    if n < 1:
        raise IntaglioError(f"n is {n}; an n-gram has at least one item")
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def type_token_ratio(items: Items, window: int | None = WINDOW) -> float:
    """Return the share of distinct items among the last `window` (None: all); 0 of nothing."""
    last = items if window is None else items[-window:]
    return len(set(last)) / max(len(last), 1)


def repetition(items: Items, n: int = 2) -> float:
    """Return the share of a text's n-grams that occurred in it before; 0 of texts shorter than n."""
    every = ngrams(items, n)
    return 1 - len(set(every)) / len(every) if every else 0.0


def distinct_n(outputs: Sequence[Items], n: int) -> float:
    """Return the number of different n-grams of several outputs over the number of their items; 0 of nothing."""
    total = sum(map(len, outputs))
    return len({gram for items in outputs for gram in ngrams(items, n)}) / total if total else 0.0


def self_overlap(outputs: Sequence[Items], n: int = 2) -> float:
    """Return the mean over ordered pairs of outputs of the share of n-grams that the first shares with the second.

    1 for equal outputs, 0 for outputs without a common n-gram, and for fewer than two.
    """
    pairs = permutations([ngrams(items, n) for items in outputs], 2)
    shares = [fmean(gram in other for gram in own) for own, other in pairs if own]
    return fmean(shares) if shares else 0.0


def oracle_at_k(scores: Sequence[float], k: int) -> float:
    """Return the best of the first k scores of a prompt's outputs.

    Raises:
        IntaglioError: k is below 1 or above the number of scores.
    """
    if not 1 <= k <= len(scores):
        raise IntaglioError(f"k is {k}; from 1 to the number of outputs, {len(scores)}, is accepted")
    return max(scores[:k])


class NGramIndex:
    """The n-grams of a training set, for overlap measures and for blocking them.

    Args:
        sequences: training sequences.
        n: items of an n-gram, at least 2. Default 5.

    Attributes:
        continuations: for each prefix of n - 1 items, the items that complete an n-gram of the training set.
    """

    def __init__(self, sequences: Iterable[Items], n: int = OVERLAP) -> None:
        if n < 2:
            raise IntaglioError(f"n is {n}; an n-gram that counts as copied has at least 2 items")
        self.n = n
        self.continuations: dict[tuple[Hashable, ...], set[Any]] = defaultdict(set)
        self._sequences = [list(items) for items in sequences]
        for items in self._sequences:
            for gram in ngrams(items, n):
                self.continuations[gram[:-1]].add(gram[-1])

    def __contains__(self, gram: tuple[Hashable, ...]) -> bool:
        """Return whether an n-gram is in the training set."""
        return gram[-1] in self.continuations.get(gram[:-1], ())

    def overlap(self, items: Items) -> float:
        """Return the share of a text's n-grams that are in the training set; 0 of shorter texts."""
        every = ngrams(items, self.n)
        return fmean(gram in self for gram in every) if every else 0.0

    def longest_overlap(self, items: Items) -> int:
        """Return the most items in a row that a text shares with a training sequence; 0 if fewer than n."""
        longest = 0
        for start in range(len(items) - self.n + 1):
            size = max(self.n, longest + 1)
            while start + size <= len(items) and self._occurs(list(items[start : start + size])):
                longest, size = size, size + 1
        return longest

    def _occurs(self, part: list[Hashable]) -> bool:
        if any(gram not in self for gram in ngrams(part, self.n)):
            return False
        starts = ((row, i) for row in self._sequences for i, item in enumerate(row) if item == part[0])
        return any(row[i : i + len(part)] == part for row, i in starts)


@torch.no_grad()
def continue_texts(
    checkpoint: Checkpoint,
    prefixes_NP: Tensor,
    new: int,
    *,
    top_p: float | None = None,
    temperature: float | None = None,
    processors: Sequence[Any] = (),
    seed: int = 0,
    batch_size: int = 16,
) -> list[list[int]]:
    """Return exactly `new` new token ids for each prefix; the end of a text is not accepted before.

    Args:
        checkpoint: a causal model.
        prefixes_NP: token ids of equal length.
        new: number of new tokens.
        top_p: sample from the nucleus of this probability. Default: the whole distribution.
        temperature: sample at this temperature. Default: 1 with `top_p`; without either, greedy.
        processors: logits processors. Default: none.
        seed: of the draws. Default 0.
        batch_size: prefixes at a time. Default 16.
    """
    model: Any = checkpoint.model.eval()
    drawn = {"do_sample": True, "top_p": top_p or 1.0, "top_k": 0, "temperature": temperature or 1.0}
    options: dict[str, Any] = {"do_sample": False} if top_p is None and temperature is None else drawn
    options |= {"max_new_tokens": new, "min_new_tokens": new, "num_beams": 1, "pad_token_id": 0}
    texts = []
    with torch.random.fork_rng(devices=[] if checkpoint.device.type == "cpu" else None):
        torch.manual_seed(seed)
        for ids_BP in prefixes_NP.to(checkpoint.device).split(batch_size):
            given = {"attention_mask": torch.ones_like(ids_BP), "logits_processor": list(processors), **options}
            texts += model.generate(ids_BP, **given)[:, ids_BP.shape[1] :].tolist()
    return texts


@torch.no_grad()
def greedy_answers(checkpoint: Checkpoint, prompts_NP: Tensor, max_new_tokens: int) -> list[str]:
    """Return the text that a causal model adds to each prompt, up to its end of text; prompts are of equal length."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
    rows_NL = model.generate(prompts_NP, attention_mask=torch.ones_like(prompts_NP), **options)  # type: ignore[operator]
    texts: list[str] = tokenizer.batch_decode(rows_NL[:, prompts_NP.shape[1] :], skip_special_tokens=True)
    return texts


def greedy_continuations(checkpoint: Checkpoint, data: Segments) -> dict[str, Any] | None:
    """Return greedy continuations of the first tokens of held-out segments, and their metrics, for a report.

    Returns:
        `texts` (a list of `prefix` and `text`), `new_tokens`, `type_token_ratio` of the last 96 tokens, `repetition` of
        bigrams and `entropy` of predictions on the segments, in nats; None without a tokenizer or a head.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or not predicts_next(anatomy(checkpoint.model)):
        return None
    prefix = min(PREFIX, data.length // 2)
    new = min(CONTINUED - prefix, checkpoint.context - prefix)
    prefixes_NP = data.ids_NT[:, :prefix]
    rows = continue_texts(checkpoint, prefixes_NP, new)
    texts = [
        {"prefix": tokenizer.decode(before, skip_special_tokens=True), "text": tokenizer.decode(after)}
        for before, after in zip(prefixes_NP, rows, strict=True)
    ]
    return {
        "texts": texts,
        "new_tokens": new,
        "type_token_ratio": fmean(map(type_token_ratio, rows)),
        "repetition": fmean(map(repetition, rows)),
        "entropy": predictive_entropy(checkpoint, data),
    }


@torch.no_grad()
def log_prob(checkpoint: Checkpoint, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Return the log-probability of an output given its prompt, in nats, summed over its tokens."""
    ids_1L = torch.tensor([[*prompt, *output]], device=checkpoint.device)
    model: Any = checkpoint.model
    log_p_TV = model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(log_p_TV.gather(1, ids_1L[0, len(prompt) :, None]).sum())


def predictive_entropy(checkpoint: Checkpoint, data: Segments, batch_size: int = 4) -> float:
    """Return the mean entropy of the next-token distribution on held-out segments, in nats.

    H = -mean over positions of sum_v p(v) log p(v), with each segment's own tokens as context
    """
    return _entropies(checkpoint, data, (1.0,), batch_size)[0]


def entropy_matched_temperature(checkpoint: Checkpoint, data: Segments, entropy: float, batch_size: int = 4) -> float:
    """Return the temperature at which a model's mean predictive entropy is a given one: the control for sharpening.

    The entropy rises with the temperature. Each of four passes narrows its range to an eighth.

    Raises:
        IntaglioError: no temperature from 1/64 to 64 gives that entropy.
    """
    temperatures = [1 / 64, 64.0]
    for _ in range(4):
        low, high = temperatures[0], temperatures[-1]
        temperatures = [low * (high / low) ** (step / 8) for step in range(9)]
        values = _entropies(checkpoint, data, temperatures, batch_size)
        upper = bisect_left(values, entropy)
        if not 0 < upper < len(values):
            raise IntaglioError(
                f"entropy is {entropy:.3g}; temperatures from {low:.3g} to {high:.3g} give {values[0]:.3g} to "
                f"{values[-1]:.3g} nats"
            )
        temperatures = temperatures[upper - 1 : upper + 1]
    return math.sqrt(temperatures[0] * temperatures[1])


@torch.no_grad()
def _entropies(checkpoint: Checkpoint, data: Segments, temperatures: Sequence[float], batch_size: int) -> list[float]:
    """Return the mean predictive entropy at each temperature."""
    checkpoint.check_ids(data.ids_NT)
    parts = anatomy(checkpoint.model)
    head = HeadOnly(parts, frozen=False)
    step = max(1, ELEMENTS // checkpoint.vocabulary)
    totals, count = [0.0] * len(temperatures), 0
    for batch in data.batches(batch_size):
        for hidden_LD in final_hidden(parts, batch)[:, :-1]:
            for hidden_TD in hidden_LD.split(step):
                logits_TV = head.logits(hidden_TD[None])[0].float()
                for index, temperature in enumerate(temperatures):
                    log_p_TV = (logits_TV / temperature).log_softmax(-1)
                    totals[index] -= float((log_p_TV.exp() * log_p_TV).nan_to_num().sum())
                count += len(logits_TV)
    return [total / count for total in totals]
