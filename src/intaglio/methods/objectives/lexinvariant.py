"""Lexinvariant language models: new token embeddings for every sequence (Huang et al., 2023).

A row is a hash of (seed of the sequence, token, dimension), so any row can be computed on any device without its table.

Source: Huang, Zelikman, Chen, Wu, Valiant, Liang, Lexinvariant Language Models, NeurIPS 2023, arXiv 2305.16349. No
official code is public.

Dimension letters: B sequences, T tokens of a sequence, D width, V vocabulary, R rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.hashed_rows import gaussian_rows, random_types
from intaglio.trainer.causal_lm import (
    IGNORED,
    causal_batch,
    check_causal,
    cross_entropy,
    cut,
    documents,
    packed,
    row_length,
)
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG

SCALE = 0.1
"""Initial logit scale of a lexinvariant model."""
TABLE_SIZE = 1 << 25
"""Most numbers of all tables of a batch that are held at once; larger ones are computed in parts."""


@dataclass(frozen=True)
class SequenceTables:
    """Token tables of a batch, one for each sequence.

    Args:
        seeds: int64 [B].
        model: the model, whose learned rows are read if `random_ratio` is below 1.
        random_ratio: probability that a token type of a sequence has a random row.
        stds: standard deviations of the random rows in input and readout.
        scale: of the logits.
        excluded: token ids without a probability.
    """

    seeds: Tensor
    model: Any
    random_ratio: float
    stds: tuple[float | Tensor, float | Tensor]
    scale: Tensor | float
    excluded: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Width of the rows."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def expand(self, rows: int) -> SequenceTables:
        """Return the tables of a batch in which each sequence occurs several times in a row, as beams do."""
        if rows % len(self.seeds):
            raise IntaglioError(f"seeds has {len(self.seeds)} tables for {rows} rows; one a row is accepted")
        return replace(self, seeds=self.seeds.repeat_interleave(rows // len(self.seeds)))

    def noise(self, ids_BR: Tensor) -> Tensor:
        """Return the N(0, 1) rows of tokens [B, R, D]."""
        return gaussian_rows(self.seeds[:, None], ids_BR, self.width)

    def _rows(self, ids_BR: Tensor, std: float | Tensor, learned: Callable[[Tensor], Tensor]) -> Tensor:
        if self.random_ratio == 0:
            return learned(ids_BR)
        random_BRD = self.noise(ids_BR) * std
        if self.random_ratio == 1:
            return random_BRD
        random_BR = random_types(self.seeds[:, None], ids_BR, self.random_ratio)
        return torch.where(random_BR[..., None], random_BRD, learned(ids_BR))

    def inputs(self, ids_BT: Tensor) -> Tensor:
        """Return the input embeddings [B, T, D]."""
        embedding = self.model.get_input_embeddings()
        # The class's forward: the instance's may be replaced by this very function.
        rows_BTD = self._rows(ids_BT, self.stds[0], lambda ids: type(embedding).forward(embedding, ids))
        return rows_BTD.to(embedding.weight.dtype)

    def readout(self, ids_BR: Tensor) -> Tensor:
        """Return the readout rows [B, R, D]; ids [1, R] are the same tokens in all tables."""
        ids_BR = ids_BR.expand(len(self.seeds), -1)
        return self._rows(ids_BR, self.stds[1], lambda ids: F.embedding(ids, self.model.get_output_embeddings().weight))

    def logits(self, hidden_BTD: Tensor, ids_R: Tensor) -> Tensor:
        """Return the logits of tokens [B, T, R], -inf for excluded ones."""
        rows_BRD = self.readout(ids_R[None]).to(hidden_BTD.dtype)
        return self.masked(self.scale * (hidden_BTD @ rows_BRD.mT), ids_R)

    def masked(self, logits_BTR: Tensor, ids_R: Tensor) -> Tensor:
        """Return logits that are -inf for excluded tokens."""
        if not self.excluded:
            return logits_BTR
        gone_R = torch.isin(ids_R, torch.tensor(self.excluded, device=ids_R.device))
        return logits_BTR.masked_fill(gone_R, -math.inf)

    def chunks(self, chunk_rows: int | None) -> tuple[Tensor, ...]:
        """Return all token ids, split so that the tables of a part hold at most `chunk_rows` rows."""
        table = self.model.get_input_embeddings().weight
        rows = chunk_rows or max(1, TABLE_SIZE // (len(self.seeds) * self.width))
        return torch.arange(len(table), device=table.device).split(rows)

    def negative_log_likelihood(self, hidden_BTD: Tensor, target_BT: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Return the mean loss in nats without the whole table: a running logsumexp over parts of the rows."""

        def logsumexp(hidden: Tensor, ids_R: Tensor) -> Tensor:
            return self.logits(hidden, ids_R).float().logsumexp(-1)

        normalizer_BT = torch.full(target_BT.shape, -math.inf, device=target_BT.device)
        for ids_R in parts:
            if torch.isin(ids_R, torch.tensor(self.excluded, device=ids_R.device)).all():
                continue  # the logsumexp of nothing has no gradient
            part_BT = recompute(logsumexp, hidden_BTD, ids_R, use_reentrant=False)
            normalizer_BT = torch.logaddexp(normalizer_BT, part_BT)
        known_BT = target_BT != IGNORED
        rows_BTD = self.readout(target_BT.clamp(min=0)).to(hidden_BTD.dtype)
        score_BT = self.scale * (hidden_BTD * rows_BTD).sum(-1).float()
        return ((normalizer_BT - score_BT) * known_BT).sum() / known_BT.sum().clamp(min=1)


class LogitScale(nn.Module):
    """Learned scalar factor s of the logits."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(initial))


class Lexinvariant(Method, slug="lexinvariant"):
    """Next-token prediction with Gaussian token embeddings, new ones for every sequence in every epoch.

        E_b[v] ~ N(0, I_D) for every sequence b and token v,    x_t = E_b[w_t],    logits_t = s E_b LN(h_t)

    A token has one vector inside a sequence and another in the next, so the model cannot know tokens and infers them
    from context: averaged over E, p(w_1..w_n) = p(pi(w_1)..pi(w_n)) for every permutation pi of the vocabulary. The
    readout is tied to the same table; s is learned, and no parameter has a row for each token. With `random_ratio` p
    below 1 (the semi-lexinvariant regulariser), each token type of a sequence has a Gaussian row with probability p,
    else its learned row, in input and readout.

    In a recipe: `train: {objective: {lexinvariant: {}}, steps: 2000}`; `{lexinvariant: {random_ratio: 0.2}}` is the
    semi-lexinvariant regulariser. Afterwards, in Python:

        method = intaglio.Lexinvariant.from_checkpoint(checkpoint)
        probs = method.probs(checkpoint.model, ids, draws=8)       # mean over tables
        with method.tables(checkpoint.model, seeds=[1, 2]):        # a table a row, held through the generation
            checkpoint.model.generate(ids)
        method.store_table(checkpoint, seed=0)                     # a stock checkpoint with one fixed table

    In a stock `transformers.Trainer`, on any causal model:

        objective, rng = intaglio.Lexinvariant(length=64), KeyedRNG(seed=0)    # and three names below: intaglio.trainer
        rows = training_rows(objective, checkpoint, texts, rng)
        model, collate = ObjectiveModule(checkpoint.model, objective), EpochCollator(objective, rng)
        arguments = transformers.TrainingArguments("out", remove_unused_columns=False, save_strategy="no")
        transformers.Trainer(model, arguments, collate, rows).train()

    With `random_ratio` 1 the model's own tables become buffers that hold one draw: they are saved, but neither read
    nor trained. The logit scale is an attachment of the checkpoint. Special tokens are drawn like all others; padding
    has no probability. Documents packed in a row share a table and do not see each other. Input scales and logit
    soft-caps of a family do not apply.

    With `random_ratio` below 1 the random rows have the present standard deviation of the learned ones, the logits
    the scale of the stock model, and evaluation uses learned rows alone, so that the result is a stock checkpoint.
    Where embeddings are not tied, a type is random in input and readout together, each at its own standard deviation.

    Source: Huang et al., Lexinvariant Language Models, NeurIPS 2023, sections 2 and 3.

    Args:
        random_ratio: probability p that a token type has a random row, in [0, 1]. Default 1; the paper's regulariser
            has 0.2.
        logit_scale: initial value of s. Default 0.1; 1/sqrt(width) starts with logits of about unit variance.
        embedding_std: standard deviation of the random input rows. Default 1; below a `random_ratio` of 1 that of the
            learned rows.
        chunk_rows: rows of the readout table computed at a time. Default: all, up to 2^25 numbers over the batch.
        length: tokens of a row. Default: the model's context, at most 1,024.
        pack: whether rows are filled with several documents that do not see each other. Default True.
    """

    kinds = ("objective",)
    summary = "draws new token embeddings for every sequence, so that the model infers symbols from context"
    citation = "Huang et al., Lexinvariant Language Models, NeurIPS 2023"
    url = "https://arxiv.org/abs/2305.16349"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    random_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    logit_scale: Annotated[float, Field(gt=0)] = SCALE
    embedding_std: Annotated[float, Field(gt=0)] | None = None
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    pack: bool = True

    _factor: float = PrivateAttr(1.0)
    _excluded: tuple[int, ...] = PrivateAttr(())

    @cached_property
    def owned(self) -> nn.ModuleDict:
        """The logit scale if `random_ratio` is 1, else no modules."""
        return nn.ModuleDict({"readout": LogitScale(self.logit_scale)} if self.random_ratio == 1 else {})

    @property
    def scale(self) -> Tensor | float:
        """The logit scale s, a parameter; 1 if `random_ratio` is below 1."""
        return self.owned["readout"].scale if self.owned else 1.0  # type: ignore[return-value]

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Take the tables out of the model's parameters if they are not trained, and cut or pack the examples."""
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        if not isinstance(getattr(anatomy(checkpoint.model).head, "weight", None), Tensor):
            raise IntaglioError(
                f"lexinvariant needs a head with one weight; {type(checkpoint.model).__name__} has none"
            )
        self.bind(checkpoint)
        self.owned.to(checkpoint.device)
        if self.random_ratio == 1:
            _fix_tables(checkpoint.model, rng.seed)
        else:
            self._check_logits(checkpoint.model)
        whole = documents(examples, checkpoint.vocabulary)
        return packed(whole, length) if self.pack else cut(whole, length)

    @torch.no_grad()
    def _check_logits(self, model: Any) -> None:
        """Refuse a model whose logits are not the product of its last hidden state and its head."""
        with preserve_modes(model):
            model.eval()
            ids_BT = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
            stock_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
            tables = self.sequence_tables(model, ids_BT[:, 0], 0.0)
            hidden_BTD = model.base_model(inputs_embeds=tables.inputs(ids_BT), use_cache=False)[0]
            own_BTV = tables.logits(hidden_BTD, torch.arange(stock_BTV.shape[-1], device=ids_BT.device)).float()
        if not torch.allclose(own_BTV, stock_BTV, rtol=0, atol=2e-2 * float(stock_BTV.std())):
            raise IntaglioError(
                f"{type(model).__name__} adds a bias to its logits, scales or caps them, so random rows do not fit its"
                " head; random_ratio: 1 trains it without"
            )

    @torch.no_grad()
    def bind(self, checkpoint: Checkpoint) -> None:
        """Note the factor of a checkpoint's input embedding, and the token that has no probability."""
        embedding: Any = checkpoint.model.get_input_embeddings()  # type: ignore[operator]
        rows_VD = embedding(torch.arange(checkpoint.vocabulary, device=checkpoint.device))
        self._factor = float(rows_VD.norm() / embedding.weight.norm())  # not 1 in Gemma
        if self.random_ratio == 1:
            padding, end = (getattr(checkpoint.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
            self._excluded = () if padding is None or padding == end else (padding,)

    def modules(self) -> nn.ModuleDict:
        """Return `owned`."""
        return self.owned

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch with `seeds`, int64 [B], of the rows' tables."""
        batch = causal_batch(examples)
        draws = [torch.randint(1 << 62, (), generator=rng(example, "lexinvariant")) for example in examples]
        for padding in self._excluded:
            batch["target"] = batch["target"].masked_fill(batch["target"] == padding, IGNORED)
        return {**batch, "seeds": torch.stack(draws), "weight": int((batch["target"] != IGNORED).sum())}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean negative log-likelihood of the next tokens, in nats."""
        ratio = self.random_ratio if model.training or self.random_ratio == 1 else 0.0
        tables = self.sequence_tables(model, batch["seeds"], ratio)
        inputs = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        embeds_BTD = tables.inputs(batch["input_ids"])
        hidden_BTD = model.base_model(inputs_embeds=embeds_BTD, **inputs, use_cache=False)[0]  # type: ignore[operator]
        parts = tables.chunks(self.chunk_rows)
        if len(parts) > 1:
            return Loss(tables.negative_log_likelihood(hidden_BTD, batch["target"], parts))
        logits_BTV = tables.logits(hidden_BTD, parts[0])
        return Loss(cross_entropy(logits_BTV, batch["target"]), outputs=logits_BTV)

    def sequence_tables(self, model: Any, seeds_B: Tensor, ratio: float | None = None) -> SequenceTables:
        """Return the tables of sequences by their seeds."""
        ratio = self.random_ratio if ratio is None else ratio
        stds: tuple[float | Tensor, float | Tensor] = (self.embedding_std or 1.0, 1.0)
        if 0 < ratio < 1:
            table_VD, head_VD = (module.weight.detach() for module in
                                 (model.get_input_embeddings(), model.get_output_embeddings()))  # fmt: skip
            stds = (self.embedding_std or table_VD.std() * self._factor, head_VD.std())
        return SequenceTables(seeds_B, model, ratio, stds, self.scale, self._excluded)

    @contextmanager
    def tables(self, model: Any, seeds: Sequence[int]) -> Iterator[None]:
        """Give each row of a batch its own table through all calls of the model, `generate` and its cache included.

        Args:
            model: a model trained with this objective.
            seeds: of the rows' tables; beams and returned sequences of a row share its table.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = self.sequence_tables(model, torch.tensor(list(seeds), device=embedding.weight.device))
        parts = tables.chunks(self.chunk_rows)
        stored_BVD = tables.readout(parts[0][None]) if len(parts) == 1 else None

        def read(hidden_BTD: Tensor) -> Tensor:
            own = tables.expand(len(hidden_BTD))
            if stored_BVD is None:
                return torch.cat([own.logits(hidden_BTD, ids_R) for ids_R in parts], -1)
            rows_BVD = stored_BVD.repeat_interleave(len(hidden_BTD) // len(stored_BVD), 0).to(hidden_BTD.dtype)
            return own.masked(self.scale * (hidden_BTD @ rows_BVD.mT), parts[0])

        embedding.forward = lambda ids_BT: tables.expand(len(ids_BT)).inputs(ids_BT)
        head.forward = read
        try:
            yield
        finally:
            del embedding.forward, head.forward

    @torch.no_grad()
    def probs(self, model: Any, ids_BT: Tensor, *, draws: int = 1, seed: int = 0) -> Tensor:
        """Return the mean over tables of the next-token probabilities at every position, float32 [B, T, V].

        Args:
            model: a model trained with this objective.
            ids_BT: contexts, int64.
            draws: tables drawn for each context. Default 1.
            seed: of the tables; draw k of row b has the seed `seed + k B + b`. Default 0.

        Raises:
            IntaglioError: `draws` is below 1.
        """
        if draws < 1:
            raise IntaglioError(f"draws is {draws}; at least 1 is accepted")
        total: Tensor | float = 0.0
        with preserve_modes(model):
            model.eval()
            for draw in range(draws):
                first = seed + draw * len(ids_BT)
                with self.tables(model, range(first, first + len(ids_BT))):
                    total = total + model(ids_BT, use_cache=False).logits.float().softmax(-1)
        return total / draws  # type: ignore[return-value]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method as a checkpoint was trained, with its learned scale; `fields` override those of training.

        Raises:
            IntaglioError: the checkpoint was not trained with `random_ratio` 1.
        """
        if cls.slug not in checkpoint.attachments:
            name = checkpoint.source or "this checkpoint"
            raise IntaglioError(f"no logit scale is attached to {name}; training with lexinvariant attaches one")
        attachment: Attachment = checkpoint.attachments[cls.slug]
        method = cls(**{**attachment.parameters, **fields})
        method.owned.load_state_dict(attachment.tensors)
        method.owned.to(checkpoint.device)
        method.bind(checkpoint)
        return method

    @torch.no_grad()
    def store_table(self, checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
        """Write one table and the logit scale into the weights, and return the checkpoint, which is then a stock one.

        Its embedding is E, its untied head s E. It knows its tokens by this table alone; padding keeps a probability.

        Args:
            checkpoint: trained with `random_ratio` 1; edited in place.
            seed: of the table. Default 0.
        """
        model: Any = checkpoint.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = self.sequence_tables(model, torch.tensor([seed], device=checkpoint.device), 1.0)
        ids_V = torch.arange(checkpoint.vocabulary, device=checkpoint.device)
        noise_VD = tables.noise(ids_V[None])[0].to(embedding.weight.dtype)
        _set_table(embedding, nn.Parameter(noise_VD * tables.stds[0] / self._factor))
        _set_table(head, nn.Parameter(noise_VD * self.scale))
        if getattr(head, "bias", None) is not None:
            head.bias.zero_()
        checkpoint.config.tie_word_embeddings = model.config.tie_word_embeddings = False
        checkpoint.attachments.pop(self.slug, None)
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed)
        return checkpoint


def _set_table(module: Any, table: Tensor) -> None:
    """Replace the weight of an embedding or head: a parameter, or else a buffer, which is saved but not trained."""
    del module.weight
    if isinstance(table, nn.Parameter):
        module.weight = table
    else:
        module.register_buffer("weight", table)


def _fix_tables(model: Any, seed: int) -> None:
    """Make the token tables of a model buffers that hold the draw of a seed."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, old = head.weight is embedding.weight, embedding.weight
    ids_V = torch.arange(len(old), device=old.device)
    table_VD = gaussian_rows(torch.tensor(seed, device=old.device), ids_V, old.shape[1]).to(old.dtype)
    _set_table(embedding, table_VD)
    _set_table(head, table_VD if tied else table_VD.clone())
    if isinstance(getattr(head, "bias", None), nn.Parameter):
        bias = torch.zeros_like(head.bias)
        del head.bias
        head.register_buffer("bias", bias)
