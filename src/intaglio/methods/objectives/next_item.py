"""Next-item recommendation on stock models: item vocabularies, new models, scores, rankings.

An item is a token: 0 is padding, the last row the mask token. An encoder predicts the item at a mask token after the
history, a decoder the item after the last one. Sequences start at position 0 and are padded on the right.

Dimension letters: B histories, T items of a history, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.from_scratch import FAMILIES, new
from intaglio.data.item_sequences import PAD, ItemSequences, Question
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.measures.ranking import NEGATIVES, RankingProtocol, draw_candidates, rank_of
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.dataset import as_ids
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Example
from intaglio.trainer.rng import generator
from intaglio.trainer.token_classification import padded

PAD_TOKEN, MASK_TOKEN = "[PAD]", "[MASK]"
BATCH = 256
"""Histories scored at a time."""
EXTRA: dict[str, dict[str, Any]] = {"bert": {"type_vocab_size": 1}, "gpt2": {"activation_function": "relu"}}
"""Further fields of a new recommender's config by family, as in the papers' models."""


def window_starts(items: int, length: int, step_ratio: float) -> list[int]:
    """Return the first positions of the windows of a sequence, ascending; the last window ends with the sequence."""
    if items <= length:
        return [0]
    step = max(1, int(step_ratio * length))
    return [0, *reversed(range(items - length, 0, -step))]


def window_rows(examples: Iterable[Example], length: int, step_ratio: float, *, training: bool) -> Iterator[Example]:
    """Yield the windows of each sequence, `input_ids` int64 [T] and `seen`, all items of the sequence.

    While evaluating there is only the last window. Sequences of one item are dropped: they have nothing to predict.
    """
    for number, example in enumerate(examples):
        what = f"sequence {number} of the training data"
        if "input_ids" not in example:
            raise IntaglioError(f"{what} has no input_ids; item ids are needed")
        ids_T = as_ids(example["input_ids"], what)
        if len(ids_T) < 2:
            continue
        starts = window_starts(len(ids_T), length, step_ratio)
        for start in starts if training else starts[-1:]:
            yield {"id": example["id"], "start": start, "input_ids": ids_T[start : start + length], "seen": ids_T}


def item_ids(checkpoint: Checkpoint, mask_id: int | None = None) -> tuple[int, ...]:
    """Return the ids of a vocabulary that are no special tokens, from which items are drawn."""
    special = {mask_id, *getattr(checkpoint.tokenizer, "all_special_ids", (PAD,))}
    return tuple(index for index in range(checkpoint.vocabulary) if index not in special)


def draw_items(ids: Sequence[int], shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Return ids drawn uniformly, int64 of a shape."""
    chosen = torch.randint(len(ids), shape, generator=rng)
    return torch.tensor([ids[index] for index in chosen.flatten().tolist()], dtype=torch.int64).view(shape)


def item_tokenizer(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are items: item k of the names is id k + 1; texts have an item a line."""
    taken = {PAD_TOKEN, MASK_TOKEN} & set(names)
    if taken:
        raise IntaglioError(f"an item is named {min(taken)!r}, which is a special token; rename it")
    vocabulary = {name: index for index, name in enumerate((PAD_TOKEN, *names, MASK_TOKEN))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=MASK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD_TOKEN, mask_token=MASK_TOKEN)


def item_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the items of a recommender in the order of their ids, from id 1."""
    tokenizer = checkpoint.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend is not None and type(backend.model).__name__ == "WordLevel"
    if not words or tokenizer.pad_token_id != PAD or tokenizer.mask_token_id != len(tokenizer) - 1:
        raise IntaglioError(
            f"{checkpoint.source or 'this checkpoint'} is no recommender: its tokens are no items; intaglio train"
            " --interactions makes one"
        )
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return tuple(name for name, _ in ordered[1:-1])


def new_recommender(
    items: ItemSequences,
    family: str = "bert",
    *,
    width: int = 64,
    depth: int = 2,
    heads: int = 2,
    context: int = 50,
    dropout: float = 0.2,
    seed: int = 0,
    **overrides: Any,
) -> Checkpoint:
    """Return an untrained model of a stock architecture over items, with its vocabulary as the tokenizer.

    BERT is BERT4Rec's architecture: tied output with a transform and a bias, learned positions, weights drawn from
    N(0, 0.02^2) truncated at two deviations. GPT-2 stands for SASRec's: causal, tied output, learned positions, ReLU,
    layer norms before each part. Unlike the paper's, its inner layer has four times the width, keys and values are
    normalised as queries are, and embeddings are not scaled by the root of the width.

    Args:
        items: sequences whose items become the vocabulary.
        family: as in `intaglio.new`. Default `bert`.
        width: of the hidden state. Default 64.
        depth: number of layers. Default 2.
        heads: attention heads. Default 2.
        context: longest history in items, L in the paper. Default 50.
        dropout: of hidden states and attention weights, where the family has them. Default 0.2.
        seed: of the weights. Default 0.
        overrides: as in `intaglio.new`.

    Raises:
        IntaglioError: an unknown family, or sizes that do not fit each other.
    """
    if family not in FAMILIES:
        raise IntaglioError(f"there is no family {family!r}; {did_you_mean(str(family), FAMILIES)}")
    fields = dict.fromkeys(FAMILIES[family].dropouts, dropout)
    fields |= {"tie_word_embeddings": True, **EXTRA.get(family, {})}
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "context": context, "seed": seed}
    checkpoint = new(family, **sizes, tokenizer=item_tokenizer(items.names[1:]), **{**fields, **overrides})
    checkpoint.source = f"new {family} recommender"
    if family == "bert" and checkpoint.model.device.type != "meta":
        _truncate(checkpoint.model, generator(seed, "recommender"))
    return checkpoint


@torch.no_grad()
def _truncate(model: Any, rng: torch.Generator) -> None:
    """Draw the matrices of a model again, from the truncated normal distribution of BERT's own code."""
    std = float(model.config.initializer_range)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=rng)


@contextmanager
def head_on(model: Any, positions_M: Tensor) -> Iterator[None]:
    """Run the head of a stock model on some positions alone, given by their flat indices: logits are [1, M, V]."""

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output[0].flatten(0, 1)[positions_M][None]
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class NextItemModel:
    """A model that predicts next items: whether by a mask token (`mask_id`) or causally (None), and its context."""

    model: Any
    context: int
    mask_id: int | None
    special: tuple[int, ...]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> NextItemModel:
        """Return the predictor of a recommender."""
        names = item_names(checkpoint)
        mask = len(names) + 1
        causal = anatomy(checkpoint.model).causal
        return cls(checkpoint.model, checkpoint.context, None if causal else mask, (PAD, mask))

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits of the next item, float32 [B, V] on the CPU; padding and mask token have -inf."""
        rows = [self._row(history) for history in histories]
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in padded(rows).items()}
        last_B = batch["attention_mask"].sum(1) - 1
        flat_B = last_B + torch.arange(len(rows), device=device) * batch["input_ids"].shape[1]
        with preserve_modes(self.model), head_on(self.model, flat_B):
            self.model.eval()
            # A model may have more rows than tokens: the mask token is the last one.
            scores_BV = self.model(**batch).logits[0, :, : max(self.special) + 1].float().cpu()
        scores_BV[:, list(self.special)] = -math.inf
        return scores_BV

    def _row(self, history: Sequence[int]) -> Tensor:
        if not history:
            raise IntaglioError("a history is empty; at least one item is needed")
        # Cut before the mask is appended, or it would push the oldest position past the context.
        recent = history[-self.context :] if self.mask_id is None else [*history[-(self.context - 1) :], self.mask_id]
        return torch.tensor(list(recent))


@dataclass(frozen=True)
class Popularity:
    """Baseline that scores items by their number of interactions, whatever the history; `counts` by id, from 0."""

    counts: tuple[int, ...]

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that are no items."""
        return (PAD, len(self.counts))

    def scores(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Return the counts, float32 [B, V]."""
        return torch.tensor([*self.counts, 0], dtype=torch.float32).repeat(len(histories), 1)


def ranks(
    recommender: Checkpoint | NextItemModel | Popularity,
    questions: Sequence[Question],
    *,
    protocol: RankingProtocol = "full",
    counts: Sequence[int] = (),
    seed: int = 0,
) -> Tensor:
    """Return the rank of each target, int64 [questions], from 0. Items of the history are never candidates.

    Args:
        recommender: a checkpoint, or a scorer such as `Popularity`.
        questions: histories and targets.
        protocol: `full` (all items, default), `popular` or `uniform`: the target among 100 unseen items drawn by their
            `counts`, or uniformly.
        counts: interactions of each item by id, from id 0, for `popular`.
        seed: of the sampled candidates, which depend on it, the user and nothing else. Default 0.

    Raises:
        IntaglioError: an unknown protocol, or `counts` that do not fit the items.
    """
    if protocol not in get_args(RankingProtocol):
        raise IntaglioError(f"protocol is {protocol!r}; {did_you_mean(str(protocol), get_args(RankingProtocol))}")
    predictor = NextItemModel.from_checkpoint(recommender) if isinstance(recommender, Checkpoint) else recommender
    weights_V = torch.ones(max(predictor.special) + 1)
    if protocol == "popular":
        if len(counts) != len(weights_V) - 1:
            raise IntaglioError(f"counts has {len(counts)} values; popular needs {len(weights_V) - 1}, from id 0")
        weights_V[:-1] = torch.tensor(counts, dtype=torch.float32)
    weights_V[list(predictor.special)] = 0
    parts = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        scores_BV = predictor.scores([question.history for question in part])
        candidates_BV = torch.stack([_candidates(question, weights_V, protocol, seed) for question in part])
        parts.append(rank_of(scores_BV, torch.tensor([question.target for question in part]), candidates_BV))
    return torch.cat(parts)


def _candidates(question: Question, weights_V: Tensor, protocol: RankingProtocol, seed: int) -> Tensor:
    if protocol != "full":
        rng = generator(seed, protocol, question.user)
        return draw_candidates(weights_V, question.history, question.target, NEGATIVES, rng)
    candidates_V = weights_V > 0
    candidates_V[list(question.history)] = False
    return candidates_V


@dataclass(frozen=True)
class Recommendation:
    """An item with its score (a logit) and id."""

    item: str
    score: float
    id: int


def recommend(
    checkpoint: Checkpoint, history: Sequence[str], k: int = 10, *, exclude_seen: bool = True
) -> list[Recommendation]:
    """Rank items for a history.

    Args:
        checkpoint: a recommender.
        history: names of items in order of time; a model reads the last ones, as many as its context holds.
        k: number of items to return. Default 10.
        exclude_seen: whether items of the history are left out. Default True.

    Returns:
        The items with the highest scores, best first; fewer than k if there are not as many.

    Raises:
        IntaglioError: the history is empty, or an item is unknown.
    """
    names = item_names(checkpoint)
    ids = history_ids(history, {name: index for index, name in enumerate(names, 1)})
    scores_V = NextItemModel.from_checkpoint(checkpoint).scores([ids])[0]
    if exclude_seen:
        scores_V[ids] = -math.inf
    best = scores_V.topk(min(k, int(torch.isfinite(scores_V).sum())))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Recommendation(names[index - 1], score, index) for index, score in pairs]


def history_ids(history: Sequence[str], known: Mapping[str, int]) -> list[int]:
    """Return the ids of a history's items."""
    if not history:
        raise IntaglioError("the history is empty; name at least one item")
    for item in history:
        if item not in known:
            example = next(iter(known))
            raise IntaglioError(f"the model does not know the item {item!r}; it has {len(known)}, such as {example!r}")
    return [known[item] for item in history]
