"""LUD (Sun et al., LREC-COLING 2024): a model trained to predict several confident tokens in one pass.

    train(ckpt, texts, objective=LUD(), steps=500)
    ckpt.model.generate(**inputs, custom_generate=LUD(beta=0.9))

- `units.py`: runs of tokens that the model predicts with confidence
- `reconfiguration.py`: rows in which PADs replace them
- `accept.py`: the beta rule and the guard; `slots.py`: PADs in a pass
- `session.py`: decoding with and without verification
- `statistics.py`: threshold, agreement and speed-up
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, ModelAspect
from intaglio.methods.decoding.lud import data_layout
from intaglio.methods.decoding.lud.acceptance import RepeatsText, RepetitionGuard, repeats_id
from intaglio.methods.decoding.lud.lexical_units import READ, confident, remainders, spans, units_of
from intaglio.methods.decoding.lud.session import LUDSession, UnverifiedLUDSession
from intaglio.methods.decoding.lud.statistics import UnitStatistics
from intaglio.speculative._utils import vocabulary_size
from intaglio.speculative.decoder_mixin import SpeculativeDecoder
from intaglio.speculative.protocols import DecodingRun, Session
from intaglio.speculative.target_model import CachedModel
from intaglio.trainer.causal_lm import (
    IGNORED,
    check_causal,
    cross_entropy,
    cut,
    documents,
    filled,
    packed,
    row_length,
    targets,
)
from intaglio.trainer.instruction_data import tokenize_pair
from intaglio.trainer.protocols import Batch, Example, Loss
from intaglio.trainer.rng import KeyedRNG
from intaglio.trainer.special_token import reserve_token

TOKEN = "<|unit|>"
"""PAD's name if it has to be added."""
NOTE = "lexical_units"
"""Key of a tuned model's configuration that holds PAD's id, the cap of the units, and the vocabulary size."""
CAP = 4
BETA, VERIFIED_BETA = 0.9, 0.3


class LUD(SpeculativeDecoder, slug="lud"):
    """Lexical unit decoding: training that lets a model predict the rest of a unit at once, and decoding that uses it.

    **Not lossless**: without `verify` the model's second, third, ... token of a pass is taken unverified. Every report
    of a run gives threshold, agreement with the unaided model and speed-up together.

    *Units.* With p_t = P(y_t | x, y_<t) by the model itself, a token joins the unit of the token before it if
    p_t >= `alpha`, up to `cap` tokens k; any other begins a unit.

    *Training.* For a unit y_s .. y_e, PAD replaces y_s .. y_{e-1} as the input, and the model predicts all of the unit
    from the tokens before it:

        L = mean of -log p(x_t | x_<t) over the real tokens
          + `weight` * mean of -log p(y_{s+j} | x, y_<s, PAD_1 .. PAD_j) over the PADs, j = 1 .. e - s

    Only a unit's own predictions see PADs, and PADs learn nothing outside of units, so the model stays unsure there.
    With `alpha` above 1 there are no units, and training is plain next-token prediction.

    *Decoding.* A pass reads the tokens of the last one and k - 1 PADs; slot 1 is the ordinary next token. With conf_j
    the highest probability at slot j (temperature 1, whatever the sampling), l = max(1, m) tokens are taken, m the most
    with conf_1 .. conf_m >= `beta`; fewer if a token repeats its predecessor (`guard`). PADs never stay in the
    cache. With `beta` above 1, or `cap` 1, the output is the ordinary one. When sampling, slot 1 is drawn, and the
    others are taken only if the drawn token was itself likely.

    Args:
        alpha: (training) least probability of a token that joins a unit; above 1: none does. Default 0.9.
        cap: most tokens of a unit, k, and of a pass. Default 4; decoding: as the checkpoint was trained.
        top1: (training) whether such a token must also be the model's most likely one. Default false.
        identify: (training) `during`: units are identified at each step by the current model, in a pass of their own,
            so only training data is read, and it may be a stream; `before`: once, by the initial model, as in the
            paper. Default `during`.
        layout: (training) `packed`: PADs follow the row; `truncated`: in rows of their own, cut at the unit. Both
            have the same loss. Default `packed`.
        places: (training) where PADs begin: at `any` position of a unit, for the rest of it (at most k tokens), or only
            at its `start`, as in the paper. The model is by definition unsure of a unit's first token, and then seldom
            sure of the next; the positions where a decoder can gain are further in. Default `any`.
        anchors: (training) such positions of a row that are drawn each time it is trained on. Default: an eighth of its
            tokens; truncated, 1.
        weight: (training) of the PADs' loss. Default 1.
        length: (training) tokens of a row. Default: the model's context, at most 1,024.
        pack: (training) whether rows are packed with several documents that do not see each other. Default true.
        chat: (training) whether prompts of instruction pairs are put into the chat template. Default true.
        pad_token: PAD, by name or id. Default: `<|unit|>`, which training adds; decoding: as the checkpoint was
            trained.
        grow: (training) whether a token that the vocabulary lacks is added to it. Default true.
        beta: (decoding) least confidence; above 1: one token a pass. Default 0.9; with `verify` 0.3.
        guard: (decoding) stop before a token that repeats its predecessor: its id, or its `text` too (or continues
            it; needs a tokenizer), or `none`, for vocabularies of bytes or characters, which repeat legitimately.
            Default `text`.
        verify: (decoding) whether the model verifies the slots' tokens in the next pass, unlike the paper: the output
            is then the model's own. Default false.
        tokenizer: the model's, for the guard. Default: none; the guard compares ids.
        on_step: called after every pass with each row's `Step`; without `verify` with its own token first and then with
            those of the slots.

    Raises:
        IntaglioError: the model was not trained for units, or with another vocabulary or shorter units; and all that
            training and `Speculative` refuse.

    Source: Sun et al., Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs,
    LREC-COLING 2024, arXiv 2405.15208. No code was published, and the paper leaves alpha, beta, k, the mixture of the
    losses and the layout open; the defaults are ours. The prompt is read without PADs, so the first pass emits one
    token. Under LoRA, PAD's row stays as initialised, and the adapters learn to read it.
    """

    kinds = ("objective", "decoder", "drafter")
    summary = (
        "trains a model to emit runs of predictable tokens in one pass, and decodes so; lossless only with verification"
    )
    citation = (
        "Sun et al., Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs, "
        "LREC-COLING 2024"
    )
    url = "https://arxiv.org/abs/2405.15208"

    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "vocabulary"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache"})
    vocabulary_config_keys: ClassVar[frozenset[str]] = frozenset({NOTE})

    alpha: Annotated[float, Field(ge=0, le=2)] = 0.9
    cap: Annotated[int, Field(ge=1, le=64)] | None = None
    top1: bool = False
    identify: Literal["during", "before"] = "during"
    layout: Literal["packed", "truncated"] = "packed"
    places: Literal["any", "start"] = "any"
    anchors: Annotated[int, Field(ge=1)] | None = None
    weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    length: Annotated[int, Field(ge=2)] | None = None
    pack: bool = True
    chat: bool = True
    pad_token: str | int | None = None
    grow: bool = True
    beta: Annotated[float, Field(ge=0, le=2)] | None = None
    guard: Literal["text", "id", "none"] = "text"
    verify: bool = False
    tokenizer: SkipJsonSchema[InstanceOf[PreTrainedTokenizerBase] | None] = Field(None, exclude=True, repr=False)

    _pad: int = PrivateAttr(-1)
    _context: int = PrivateAttr(0)
    _statistics: UnitStatistics = PrivateAttr(default_factory=UnitStatistics)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's settings: units identified once before training, and learnt from their start."""
        return cls(**{"identify": "before", "places": "start", **overrides})

    # --- training ---

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or add PAD, write it to the model's configuration, and cut or pack the examples into rows.

        Args:
            checkpoint: a causal decoder; its vocabulary grows by PAD if it lacks it.
            examples: texts or ids, in which every token counts, or instruction pairs, in which answers do.
            rng: its seed is that of PAD's first embedding.

        Raises:
            IntaglioError: the model is no causal decoder or takes no mask, PAD is missing and may not be added, an
                example is malformed, or a stream with `identify: before`.
        """
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        CachedModel(checkpoint.model)  # refuses models whose attention takes no mask
        self._context = checkpoint.context
        self._pad = reserve_token(
            checkpoint, self.pad_token, name=TOKEN, field="pad_token", grow=self.grow, seed=rng.seed
        )
        note = {"pad": self._pad, "cap": self._cap, "vocabulary": vocabulary_size(checkpoint.model)}
        setattr(checkpoint.model.config, NOTE, note)
        rows = self._cut(checkpoint, examples, length)
        return self._with_units(checkpoint.model, rows) if self.identify == "before" else rows

    @property
    def _cap(self) -> int:
        return CAP if self.cap is None else self.cap

    def _cut(self, checkpoint: Checkpoint, examples: Iterable[Example], length: int) -> Iterator[Example]:
        iterator = iter(examples)
        head = list(islice(iterator, 1))
        examples = chain(head, iterator)
        if head and "input_ids" not in head[0]:
            answers = self._answers(checkpoint, examples, length)
            return filled(answers, length) if self.pack else answers
        whole = documents(examples, vocabulary_size(checkpoint.model))
        return packed(whole, length) if self.pack else cut(whole, length)

    def _answers(self, checkpoint: Checkpoint, examples: Iterable[Example], length: int) -> Iterator[Example]:
        for number, example in enumerate(examples):
            prompt, answer, stop = tokenize_pair(checkpoint, example, number, length, chat=self.chat)
            ids_T = torch.tensor([*prompt, *answer, *stop])
            labels_T = ids_T.clone()
            labels_T[: len(prompt)] = IGNORED
            yield {"input_ids": ids_T, "labels": labels_T}

    def _with_units(self, model: Any, rows: Iterator[Example]) -> Iterator[Example]:
        """Yield the rows with the units of the current model."""
        while head := list(islice(rows, 1)):
            if model.training:
                raise IntaglioError(
                    "units are identified before training, but rows are still read or the model is in training mode; "
                    "give the data in memory and the model in evaluation mode, or set identify: during"
                )
            some = head + list(islice(rows, max(1, READ // len(head[0]["input_ids"])) - 1))
            for row, units, count in zip(some, *self._units(model, some), strict=True):
                kept = torch.tensor(units, dtype=torch.int64).reshape(-1, 2)
                yield {**row, "units": kept, "counts": torch.tensor(count)}

    def _units(self, model: Any, rows: Sequence[Example]) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int]]]:
        """Return of each row the units that can be learnt, and the numbers of tokens in units and of units."""
        learnt, counts = [], []
        for row, joins_T in zip(rows, confident(model, rows, self.alpha, self.top1), strict=True):
            units = units_of(row, joins_T, self._cap)
            counts.append((sum(end - begin + 1 for begin, end in units), len(units)))
            if self.places == "start":
                learnt.append(spans(row, units))
            else:
                learnt.append(remainders(row, units_of(row, joins_T, len(joins_T)), self._cap))
        return learnt, counts

    def modules(self) -> nn.ModuleDict:
        """Return no modules."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return the batch with its PADs, or with `identify: during` the rows that `loss` adds them to.

        Anchors are drawn again in each epoch.
        """
        seeds = [int(torch.randint(2**62, (1,), generator=rng(row, "lud"))) for row in examples]
        if self.identify == "before":
            units = [[(begin, end) for begin, end in row["units"].tolist()] for row in examples]
            return self._with_pads(examples, units, [tuple(row["counts"].tolist()) for row in examples], seeds)
        weight = sum(int((targets(row) != IGNORED).sum()) for row in examples)
        return data_layout.as_tensors(examples) | {"seeds": torch.tensor(seeds), "weight": weight}

    def _with_pads(
        self,
        rows: Sequence[Example],
        units: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
    ) -> Batch:
        chosen = [
            data_layout.sample_units(own, self._anchors(len(row["input_ids"])), torch.Generator().manual_seed(seed))
            for row, own, seed in zip(rows, units, seeds, strict=True)
        ]
        if self.layout == "packed":
            batch = data_layout.packed(rows, chosen, self._pad)
        else:
            batch = data_layout.truncated(rows, chosen, self._pad, self._cap - 1, self._context)
        tokens, number = (sum(column) for column in zip(*counts, strict=True))
        return batch | {"unit_length": torch.tensor(tokens / max(1, number))}

    def _anchors(self, tokens: int) -> int:
        if self.anchors is not None:
            return self.anchors
        return max(1, tokens // 8) if self.layout == "packed" else 1

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss and its parts: `next_token`, `units` (of PADs), `pads` (how many), `unit_length` (tokens)."""
        if "seeds" in batch:
            rows = data_layout.as_rows(batch)
            device = batch["input_ids"].device
            padded = self._with_pads(rows, *self._units(model, rows), batch["seeds"].tolist())
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in padded.items()}
        logits_BSV = data_layout.logits(model, batch)
        real, pads = (cross_entropy(logits_BSV, batch[name]) for name in ("target", "pads"))
        count = (batch["pads"] != IGNORED).sum().float()
        parts = {"next_token": real, "units": pads, "pads": count, "unit_length": batch["unit_length"]}
        return Loss(real + self.weight * pads, parts, logits_BSV)

    # --- decoding ---

    @property
    def lossless(self) -> bool:
        """Whether the output is the model's own."""
        return self.verify

    @property
    def statistics(self) -> UnitStatistics:
        """Cost of the last `generate` call, and its agreement with the unaided model."""
        return self._statistics

    def new_statistics(self) -> UnitStatistics:
        """See `SpeculativeDecoder.new_statistics`."""
        return UnitStatistics(threshold=self.threshold, verified=self.verify)

    @property
    def threshold(self) -> float:
        """Beta."""
        return self.beta if self.beta is not None else VERIFIED_BETA if self.verify else BETA

    def _tuned(self, model: Any) -> tuple[int, int]:
        """Return PAD's id and k, from the fields or the model's training."""
        note, rows = _note(model), vocabulary_size(model)
        pad, cap = self._named(), self.cap
        if pad is None and not note:
            raise IntaglioError(
                "the model has no PAD token that was trained for lexical units; train it with the objective lud "
                "(train: {objective: {lud: {}}}), or name a token by id: pad_token"
            )
        if note and note["vocabulary"] != rows:
            raise IntaglioError(
                f"the model has {rows} token ids and was trained for lexical units with {note['vocabulary']}; its "
                "vocabulary was changed since, so train it again"
            )
        if note and pad is not None and pad != note["pad"]:
            raise IntaglioError(f"pad_token has the id {pad}; the model was trained with {note['pad']}")
        if note and cap is not None and cap > note["cap"]:
            raise IntaglioError(f"cap is {cap}; the model was trained with units of at most {note['cap']} tokens")
        pad = note["pad"] if pad is None else pad
        if not 0 <= pad < rows:
            raise IntaglioError(f"pad_token is {pad}; the model has ids from 0 to {rows - 1}")
        return pad, cap or note.get("cap", CAP)

    def _named(self) -> int | None:
        """Return the id of the field `pad_token`."""
        if not isinstance(self.pad_token, str):
            return self.pad_token
        if self.tokenizer is None:
            raise IntaglioError(f"pad_token is {self.pad_token!r} and no tokenizer is known; give tokenizer= or its id")
        token = self.tokenizer.get_vocab().get(self.pad_token)
        if token is None:
            raise IntaglioError(f"pad_token is {self.pad_token!r}, which the tokenizer does not have")
        return int(token)

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`.

        Raises:
            IntaglioError: the model was not trained for lexical units, or not with these fields; or scores are
                requested of a run that is not verified.
        """
        pad, cap = self._tuned(run.model)
        counts = run.statistics
        assert isinstance(counts, UnitStatistics)
        by_text = self.guard != "id" and self.tokenizer is not None
        repeats = RepeatsText(self.tokenizer) if by_text else repeats_id
        guard = RepetitionGuard(repeats, self.guard != "none", counts)
        if self.verify:
            return LUDSession(run, pad, cap - 1, self.threshold, guard)
        if run.config.return_dict_in_generate and (run.config.output_scores or run.config.output_logits):
            raise IntaglioError(
                "output_scores or output_logits is set; a slot's prediction is no score of the model's, so lexical "
                "units have none"
            )
        return UnverifiedLUDSession(run, pad, cap - 1, self.threshold, guard, counts)


def _note(model: Any) -> dict[str, int]:
    """Return the note of the training in a model's configuration; empty if it was not trained for units."""
    note = getattr(model.config, NOTE, None)
    if note is None:
        return {}
    names = {"pad", "cap", "vocabulary"}
    if not (isinstance(note, dict) and names == set(note) and all(type(note[name]) is int for name in names)):
        raise IntaglioError(f"{NOTE} in the model's configuration is damaged; train it with the objective lud again")
    return dict(note)
