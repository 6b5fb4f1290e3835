"""BICO: bidirectional denoising in the fine-tuning of causal models (Lv et al., EMNLP 2024).

It counters the reversal curse: a model trained on "A is B" does not know that B is A.

Where the paper and the official code differ (the mask token is their padding token, masked tokens are never keys), this
file follows the code; it draws a token where the code's mean over an empty K is not a number, and pads on the right.

Source: Lv et al., An Analysis and Mitigation of the Reversal Curse, EMNLP 2024, arXiv 2311.07468, section 4; official
code trestad/mitigating-reversal-curse.

Dimension letters: B rows, T tokens of a row, H heads, G key-value heads, D width of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.masks import Bidirectional, Causal, temporary_visibility
from intaglio.masks.attention_interface import ATTENTION
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.modeling.anatomy import attention, blocks
from intaglio.trainer.causal_lm import (
    IGNORED,
    causal_batch,
    check_causal,
    cut,
    documents,
    next_token_loss,
    row_length,
    targets,
)
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.special_token import reserve_mask_token

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rotates queries [B, H, T, D] and keys [B, G, T, D] back by their positions."""


def reflected_scores(query_BHTD: Tensor, key_BGTD: Tensor, rotate_back: Rotation) -> Tensor:
    """Return unscaled scores [B, H, T, T] in which every key is rotated as one at or to the left of the query.

    Args:
        query_BHTD: queries, rotated by their positions.
        key_BGTD: keys, rotated by their positions; H is a multiple of G.
        rotate_back: rotates both by minus their positions.
    """
    negated = rotate_back(*rotate_back(query_BHTD, key_BGTD))
    left, right = (_products(query, key) for query, key in ((query_BHTD, key_BGTD), negated))
    after_TT = torch.ones(left.shape[-2:], dtype=torch.bool, device=left.device).triu(1)
    return torch.where(after_TT, right, left)


def _products(query_BHTD: Tensor, key_BGTD: Tensor) -> Tensor:
    repeated = key_BGTD.repeat_interleave(query_BHTD.shape[1] // key_BGTD.shape[1], 1)
    return query_BHTD @ repeated.transpose(-1, -2)


class ReflectedAttention:
    """Attention function of a layer whose scores are `reflected_scores`; its pre-hook keeps the layer's rotation.

    Args:
        module: attention module.
        rotary: the family's function that rotates queries and keys.
        seen: gets the scores of each call. Default None.
    """

    def __init__(
        self, module: nn.Module, rotary: Callable[..., tuple[Tensor, Tensor]], seen: list[Tensor] | None = None
    ) -> None:
        self.rotary, self.seen = rotary, seen
        self.handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.angles: tuple[Tensor, Tensor] | None = None

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.angles = kwargs.get("position_embeddings")
        if self.angles is None:
            raise IntaglioError(f"{type(module).__name__} is not given its rotations; set flip: false")

    def _rotate_back(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        assert self.angles is not None  # the hook ran
        cos, sin = self.angles
        norm = (cos.square() + sin.square()).sqrt()  # long-context variants scale both
        width = cos.shape[-1]  # Phi and others rotate the first part of a head alone
        q, k = self.rotary(query[..., :width], key[..., :width], cos / norm, -sin / norm)
        return torch.cat([q, query[..., width:]], -1), torch.cat([k, key[..., width:]], -1)

    def __call__(
        self,
        module: nn.Module,
        query_BHTD: Tensor,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, H, D] and the weights [B, H, T, T]."""
        if not isinstance(mask, Tensor) or more.get("s_aux") is not None:
            raise IntaglioError("flip needs eager or sdpa attention without learned sinks; set flip: false")
        scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
        scores = reflected_scores(query_BHTD, key_BGTD, self._rotate_back) * scale
        if self.seen is not None:
            self.seen.append(scores)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        least = torch.finfo(scores.dtype).min
        hidden = ~mask if mask.dtype == torch.bool else mask == least
        weights = scores.masked_fill(hidden, least).softmax(-1, dtype=torch.float32)
        weights = weights.masked_fill(hidden, 0.0).to(query_BHTD.dtype)  # of padding too, which may see nothing
        weights = nn.functional.dropout(weights, dropout, module.training)
        value_BHTD = value_BGTD.repeat_interleave(query_BHTD.shape[1] // value_BGTD.shape[1], 1)
        return (weights @ value_BHTD).transpose(1, 2).contiguous(), weights


@contextmanager
def reflected(model: nn.Module, seen: list[Tensor] | None = None) -> Iterator[None]:
    """Replace the scores of every layer with rotary positions by `reflected_scores`, below a visibility rule."""
    replaced = []
    try:
        for module in map(attention, blocks(model)):
            rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
            if rotary is not None and getattr(module, "use_rope", True):
                module.__dict__[ATTENTION] = ReflectedAttention(module, rotary, seen)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            module.__dict__.pop(ATTENTION).handle.remove()


@torch.no_grad()
def check_reflection(model: Any) -> None:
    """Refuse a model whose rotations are not those that `reflected` turns.

    Equal tokens have equal queries and keys at every position, so that their reflected scores must be symmetric.
    """
    name, scores = type(model).__name__, list[Tensor]()
    ids = torch.ones(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with preserve_modes(model), temporary_visibility(model, Bidirectional()), reflected(model, scores):
            model.eval()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (RuntimeError, TypeError) as error:
        raise IntaglioError(f"{name} does not rotate its queries and keys in the usual way; set flip: false") from error
    rotates = bool(getattr(model.config.get_text_config(), "rope_parameters", None))
    same = [bool(((s - s.mT).abs() <= torch.finfo(s.dtype).eps ** 0.5 * s.abs().max()).all()) for s in scores]
    if (rotates and not scores) or not all(same):
        raise IntaglioError(f"{name} has layers whose rotations cannot be turned; set flip: false")


class BICO(Method, slug="bico"):
    """Bidirectional denoising mixed into fine-tuning, so that a model trained on "A is B" also answers "B is".

    A fair coin for each batch chooses one of two losses:

        next token    -mean_t log p(x_{t+1} | x_1 .. x_t), the stock model
        denoising     -mean_{i in K} log p(x_i | x_j for all j not in K), read from the output at i - 1

    K holds each token but the first and special ones with probability 0.15. A token in K is replaced by the mask token
    and is no key in any layer; every other token is a key for all. Scores keep the rotations that the model knows: a
    key n on the right of a query m is rotated as if it stood n - m tokens to the left,

        s(m, n) = q^T R(n - m) k for n <= m,    q^T R(m - n) k for n > m

    by negating all positions in the scores above the diagonal. After training the model is the stock causal one.

    In a recipe: `train: {objective: {bico: {}}, facts: facts.jsonl, epochs: 20, lora: {r: 32}}`, or `texts` instead of
    facts. From Python: `intaglio.train(checkpoint, texts, objective=intaglio.BICO(), epochs=20)`. In a stock
    `transformers.Trainer`:

        method, rng = intaglio.BICO(), KeyedRNG(seed=0)    # and two names below: intaglio.trainer
        class Denoising(transformers.Trainer):
            compute_loss = lambda self, model, inputs, **_: method.loss(model, inputs).total
        arguments = transformers.TrainingArguments("out", max_steps=100, remove_unused_columns=False)
        rows = training_rows(method, checkpoint, texts, rng)
        Denoising(checkpoint.model, arguments, EpochCollator(method, rng), rows).train()

    Source: Lv et al., An Analysis and Mitigation of the Reversal Curse, EMNLP 2024, section 4. The authors train LoRA
    (r 32, alpha 16, dropout 0.01) with AdamW at 2e-5, batches of 4, about 10 epochs.

    Args:
        denoise_ratio: probability that a batch is denoised. Default 0.5. Held-out loss is that of the next token.
        mask_ratio: probability that a token is masked, in (0, 1). Default 0.15.
        flip: whether keys on the right are rotated as keys on the left; of no effect on models without rotary
            positions. Default True.
        bidirectional: False denoises under the model's own causal mask. Default True.
        attend_masked: whether masked tokens are keys as well, as in MNTP of LLM2Vec. Default False.
        mask_token: the mask token, by name or id. Default: the tokenizer's, or else a new token; the authors use
            padding. As it is no key, its row matters only where two masked tokens follow each other.
        grow: whether a missing mask token is added to the vocabulary. Default True.
        length: most tokens of a row, which holds a document or a part. Default: the model's context, at most 1,024.
    """

    kinds = ("objective",)
    summary = "mixes bidirectional denoising into fine-tuning, so that facts learned in one order are recalled in both"
    citation = "Lv et al., An Analysis and Mitigation of the Reversal Curse, EMNLP 2024"
    url = "https://arxiv.org/abs/2311.07468"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "vocabulary"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal"})

    denoise_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15
    flip: bool = True
    bidirectional: bool = True
    attend_masked: bool = False
    mask_token: str | int | None = None
    grow: bool = True
    length: Annotated[int, Field(ge=2)] | None = None

    _mask_id: int = PrivateAttr(-1)
    _special: tuple[int, ...] = PrivateAttr(())

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or add the mask token, and cut the documents to rows."""
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=False)
        if self.flip and self.bidirectional and self.denoise_ratio:
            check_reflection(checkpoint.model)
        self._mask_id = reserve_mask_token(checkpoint, self.mask_token, grow=self.grow, seed=rng.seed)
        self._special = tuple(getattr(checkpoint.tokenizer, "all_special_ids", ()))
        return cut(documents(examples, checkpoint.vocabulary), length)

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return a causal batch, or by a coin one to denoise, whose `attention_mask` leaves out masked keys."""
        batch = causal_batch(examples)
        del batch["weight"]  # micro-batches of a step count by their rows, whatever their targets
        coin = float(torch.rand(1, generator=rng(examples[0], "coin")))
        if not rng.training or coin >= self.denoise_ratio:
            return batch
        masked = [self._masked(row, rng) for row in examples]
        if not any(bool(masked_T.any()) for masked_T in masked):
            masked = self._single(examples, rng)
        padded_BT = nn.utils.rnn.pad_sequence(masked, batch_first=True)
        real_BT = batch.pop("attention_mask", torch.ones_like(batch["input_ids"]))
        next_BT = nn.functional.pad(padded_BT[:, 1:], (0, 1))
        if not padded_BT.any():
            return {**batch, "attention_mask": real_BT}  # nothing can be masked
        return {
            "input_ids": batch["input_ids"].masked_fill(padded_BT, self._mask_id),
            "target": batch["target"].masked_fill(~next_BT, IGNORED),
            "attention_mask": real_BT if self.attend_masked else real_BT.masked_fill(padded_BT, 0),
            "denoise": True,
        }

    def _eligible(self, row: Example) -> Tensor:
        """Return the tokens that may be masked, bool [T]: those with a target that are not special."""
        ids_T = row["input_ids"]
        eligible_T = ~torch.isin(ids_T, torch.tensor(self._special, dtype=torch.int64))
        eligible_T[0] = False
        eligible_T[1:] &= targets(row)[:-1] != IGNORED
        return eligible_T

    def _masked(self, row: Example, rng: KeyedRNG) -> Tensor:
        drawn_T = torch.rand(len(row["input_ids"]), generator=rng(row, "bico"))
        return (drawn_T < self.mask_ratio) & self._eligible(row)

    def _single(self, examples: Sequence[Example], rng: KeyedRNG) -> list[Tensor]:
        """Return masks of a single token, for a batch in which none was drawn."""
        masked = [torch.zeros(len(row["input_ids"]), dtype=torch.bool) for row in examples]
        for row, masked_T in zip(examples, masked, strict=True):
            eligible = self._eligible(row).nonzero().flatten()
            if len(eligible):
                drawn = int(torch.randint(len(eligible), (1,), generator=rng(row, "single")))
                masked_T[eligible[drawn]] = True
                break
        return masked

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of the next token, or of the masked tokens."""
        if "denoise" not in batch:
            return next_token_loss(model, batch)
        inputs = {name: value for name, value in batch.items() if name != "denoise"}
        if "position_ids" in inspect.signature(model.forward).parameters:  # some families count them by the mask
            target_BT = batch["target"]
            inputs["position_ids"] = torch.arange(target_BT.shape[1], device=target_BT.device).expand_as(target_BT)
        with temporary_visibility(model, Bidirectional() if self.bidirectional else Causal()):
            if not (self.flip and self.bidirectional):
                return next_token_loss(model, inputs)
            with reflected(model):
                return next_token_loss(model, inputs)
