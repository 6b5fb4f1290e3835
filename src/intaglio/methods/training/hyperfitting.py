"""Hyperfitting (Carlsson et al., ICLR 2025): fit a tiny training set to near-zero loss, then decode greedily.

Source: Carlsson et al., The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation,
ICLR 2025, arXiv 2412.04318; code FreddeFrallan/Hyperfitting.

Dimension letters: B rows, T tokens of a row, L tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from transformers import LogitsProcessor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.measures.generated_text import OVERLAP, NGramIndex
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.modeling.anatomy import blocks
from intaglio.trainer.causal_lm import causal_batch, check_causal, documents, next_token_loss
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG, generator

LATE_BLOCKS = 5
"""Blocks of the late-stage preset."""


class Hyperfitting(Method, slug="hyperfitting"):
    """Next-token prediction of a few sequences of one length, without dropout, for training to near-zero loss.

        L = -(1/T) sum_t log p(x_{t+1} | x_1..x_t)    over 2,000 sequences of exactly 256 tokens, 20 epochs, rate 1e-6

    Nothing regularises: no weight decay, dropout, warm-up, decay or clipping. The validation loss rises far above the
    start, predictions become certain, and greedy text repeats itself less. Training the last blocks alone by LoRA keeps
    most of the effect (a later study, arXiv 2605.22579). The authors' script has 30 epochs, a rate of 5e-6 and AdamW's
    default weight decay; the paper's values are used here.

    In a recipe: `train: {objective: {hyperfitting: {}}, epochs: 20, batch_size: 8, learning_rate: 1.0e-6, schedule:
    constant, warmup: 0, max_grad_norm: 0}`. From Python: `intaglio.train(checkpoint, texts,
    **Hyperfitting.train_settings())`. Weights must be float32: smaller types round such updates to zero.

    Source: Carlsson et al., The Hyperfitting Phenomenon, ICLR 2025.

    Args:
        samples: most training sequences, drawn at random from the texts that are long enough. Default 2,000; as few as
            8 show the effect.
        length: tokens of a sequence; a text is cut to its first `length` tokens, and dropped if it has fewer. Default
            256.
        cache_hidden: whether the output of the frozen blocks (with `trainable_blocks`) is computed once for each
            sequence and kept in memory, `samples * length * width * 4` bytes. Default False.

    Raises:
        IntaglioError: (in training) no text is long enough, `length` exceeds the context, or the model is not causal.
    """

    kinds = ("objective",)
    summary = "fits a tiny training set to near-zero loss, so that greedy text repeats itself less"
    citation = (
        "Carlsson et al., The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation, "
        "ICLR 2025"
    )
    url = "https://arxiv.org/abs/2412.04318"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    samples: Annotated[int, Field(ge=1)] = 2000
    length: Annotated[int, Field(ge=2)] = 256
    cache_hidden: bool = False

    disables_dropout: ClassVar[bool] = True

    _hidden: dict[int, Tensor] = PrivateAttr(default_factory=dict)
    _in_tuple: bool = PrivateAttr(False)  # whether blocks return their hidden states in a tuple

    @classmethod
    def train_settings(cls, stage: Literal["full", "late"] = "full", **overrides: Any) -> dict[str, Any]:
        """Return the arguments of `intaglio.train`: the paper's, or those of the late-stage variant.

        Args:
            stage: `full` trains all weights; `late` adapters (LoRA) in the last five blocks.
            overrides: arguments that replace these, such as `epochs` or `objective`.
        """
        plain = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "max_grad_norm": 0.0, "batch_size": 8}
        settings = {"objective": cls(), "epochs": 20, "learning_rate": 1e-6, **plain}
        if stage == "late":
            settings |= {"lora": {"r": 16}, "trainable_blocks": LATE_BLOCKS, "learning_rate": 1e-4}
        return settings | overrides

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Cut the texts to sequences of one length, and draw the training set (all of them while evaluating)."""
        if self.length > checkpoint.context:
            raise IntaglioError(f"length is {self.length}; the model's context is {checkpoint.context} tokens")
        check_causal(checkpoint, packing=False)
        self._hidden.clear()
        rows = [
            {**row, "input_ids": row["input_ids"][: self.length], "labels": row["labels"][: self.length]}
            for row in documents(examples, checkpoint.vocabulary)
            if len(row["input_ids"]) >= self.length
        ]
        if not rows:
            raise IntaglioError(f"no training text has {self.length} tokens; give longer texts or a smaller length")
        if not rng.training or len(rows) <= self.samples:
            return rows
        chosen = torch.randperm(len(rows), generator=generator(rng.seed, "hyperfitting"))[: self.samples]
        return [rows[index] for index in chosen.sort().values.tolist()]

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch; with `cache_hidden` also `rows` [B], the ids of the training sequences."""
        batch = causal_batch(examples)
        if self.cache_hidden and rng.training:
            batch["rows"] = torch.tensor([example["id"] for example in examples])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the next-token loss."""
        inputs = {name: value for name, value in batch.items() if name != "rows"}
        with self._frozen_blocks_once(model, batch.get("rows")):
            return next_token_loss(model, inputs)

    @contextmanager
    def _frozen_blocks_once(self, model: nn.Module, rows_B: Tensor | None) -> Iterator[None]:
        """Store the hidden states after the frozen blocks, or return those that are stored instead of running them.

        Only frozen blocks are changed: gradient checkpointing runs the others again after the context has ended.
        """
        every = blocks(model)
        frozen = every[: _frozen(model, every)] if rows_B is not None else []
        rows = [] if rows_B is None else rows_B.tolist()
        known = all(row in self._hidden for row in rows)

        def store(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)
            hidden_BTD = output[0] if self._in_tuple else output
            self._hidden.update(zip(rows, hidden_BTD.detach().cpu(), strict=True))

        def stored(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
            return same(torch.stack([self._hidden[row] for row in rows]).to(hidden_BTD))

        def same(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_BTD,) if self._in_tuple else hidden_BTD

        handles = [frozen[-1].register_forward_hook(store)] if frozen and not known else []
        skipped = frozen if known else []
        for block in skipped:
            block.forward = stored if block is frozen[-1] else same
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in skipped:
                del block.forward


def _frozen(model: nn.Module, every: Sequence[nn.Module]) -> int:
    """Return how many of the first blocks are frozen; 0 where the embedding is trained."""
    embedding: Any = getattr(model, "get_input_embeddings", None)
    if embedding is None or any(p.requires_grad for p in embedding().parameters()):
        return 0
    trained = [index for index, block in enumerate(every) if any(p.requires_grad for p in block.parameters())]
    return min(trained, default=len(every))


class CitationBlocker(LogitsProcessor):
    """Forbid tokens that would complete an n-gram of the training set, as a logits processor of `generate`.

        blocker = CitationBlocker(training_ids, n=5)
        model.generate(**inputs, do_sample=False, logits_processor=[blocker])

    The last n - 1 tokens of a row, the prompt's included, are looked up; the logits of their continuations become -inf.
    So generated text holds no training n-gram that did not begin and end in the prompt.

    Source: Carlsson et al., The Hyperfitting Phenomenon, ICLR 2025 (its n is not known; a parameter here).

    Args:
        sequences: token ids of the training sequences.
        n: tokens of an n-gram, at least 2. Default 5.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], n: int = OVERLAP) -> None:
        self.index = NGramIndex(sequences, n)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] with -inf at the forbidden tokens of each row of ids [B, L]."""
        scores_BV = scores.clone()
        for row, prefix in enumerate(input_ids[:, input_ids.shape[1] + 1 - self.index.n :].tolist()):
            forbidden = self.index.continuations.get(tuple(prefix))
            if forbidden:
                scores_BV[row, sorted(forbidden)] = -torch.inf
        return scores_BV
