"""LUD (Sun et al., LREC-COLING 2024): a model that is taught to say several confident tokens in one pass.

    train(ckpt, texts, objective=LUD(), steps=500)
    ckpt.model.generate(**inputs, custom_generate=LUD(beta=0.9))

- `units.py`: runs of tokens that the model predicts with confidence
- `reconfiguration.py`: rows in which PADs stand for them
- `accept.py`: the beta rule and the guard; `slots.py`: PADs in a pass
- `loop.py`: decoding without verification; `drafting.py`: units as drafts for the verify loop
- `statistics.py`: threshold, agreement and speed-up
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr
from pydantic.json_schema import SkipJsonSchema
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Method, ModelAspect
from intaglio.methods.decoding.lud import reconfiguration
from intaglio.methods.decoding.lud.accept import Guard, RepeatsText, repeats_id
from intaglio.methods.decoding.lud.drafting import Drafting
from intaglio.methods.decoding.lud.loop import Settings, Spans
from intaglio.methods.decoding.lud.statistics import UnitStatistics
from intaglio.methods.decoding.lud.units import READ, confident, rests, spans, units_of
from intaglio.speculative import decoder_mixin
from intaglio.speculative.outputs import SpeculativeOutput, as_asked, streaming
from intaglio.speculative.protocols import Run, Session
from intaglio.speculative.request import read_request
from intaglio.speculative.target_model import Reader
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
"""PAD's name where it has to be added."""
NOTE = "lexical_units"
"""Where a tuned model's configuration says which id PAD has, how long units were, and in which vocabulary."""
CAP = 4
BETA, VERIFIED_BETA = 0.9, 0.3


class LUD(decoder_mixin.Drafting, Method, slug="lud"):
    """Lexical unit decoding: training that lets a model predict the rest of a unit at once, and decoding that uses it.

    **Not lossless**: without `verify` the model's second, third, ... token of a pass is taken unseen. Whatever reports
    a run says threshold, agreement with the unaided model and speed-up together.

    *Units.* With p_t = P(y_t | x, y_<t) by the model itself, a token joins the unit of the token before it where
    p_t >= `alpha`, up to `cap` tokens k; any other begins a unit.

    *Training.* For a unit y_s .. y_e, PAD stands as the input in the place of y_s .. y_{e-1}, and the model predicts
    all of the unit from what stands before it:

        L = mean of -log p(x_t | x_<t) over the real tokens
          + `weight` * mean of -log p(y_{s+j} | x, y_<s, PAD_1 .. PAD_j) over the PADs, j = 1 .. e - s

    Only a unit's own predictions see PADs, and nothing outside of units is taught to PADs, so that the model stays
    unsure there. With `alpha` above 1 there are no units, and training is plain next-token prediction.

    *Decoding.* A pass reads the tokens of the last one and k - 1 PADs; slot 1 is the ordinary next token. With conf_j
    the highest probability at slot j (temperature 1, whatever the sampling), l = max(1, m) tokens are taken, m the most
    with conf_1 .. conf_m >= `beta`; fewer where a token repeats its predecessor (`guard`). PADs never stay in the
    cache. With `beta` above 1, or `cap` 1, the output is the ordinary one. When sampling, slot 1 is drawn, and the
    others are taken only where the drawn token was itself likely.

    Args:
        alpha: (training) least probability of a token that joins a unit; above 1: none does. Default 0.9.
        cap: most tokens of a unit, k, and of a pass. Default 4; decoding: as the checkpoint was trained.
        top1: (training) whether such a token must also be the model's most likely one. Default false.
        identify: (training) `during`: units are found by the model as it is at each step, in a pass of their own, so
            only what is trained on is read, and data may be a stream; `before`: once, by the model that training
            starts from, as in the paper. Default `during`.
        layout: (training) `packed`: PADs stand behind the row; `truncated`: in rows of their own, cut at the unit. Both
            have the same loss. Default `packed`.
        places: (training) where PADs take over: at `any` place of a unit, for what is left of it (of at most k tokens),
            or at its `start` alone, as in the paper. A unit's first token is by definition one that the model was not
            sure of, so from there it is seldom sure of the next; the places where a decoder can gain are further in.
            Default `any`.
        anchors: (training) such places of a row that are drawn each time it is trained on. Default: an eighth of its
            tokens; truncated, 1.
        weight: (training) of the PADs' loss. Default 1.
        length: (training) tokens of a row. Default: the model's context, at most 1,024.
        pack: (training) whether rows are filled with several documents that do not see each other. Default true.
        chat: (training) whether prompts of instruction pairs are put into the chat template. Default true.
        pad_token: PAD, by name or id. Default: `<|unit|>`, which training adds; decoding: as the checkpoint was
            trained.
        grow: (training) whether a token that the vocabulary lacks is added to it. Default true.
        beta: (decoding) least confidence; above 1: one token a pass. Default 0.9; with `verify` 0.3.
        guard: (decoding) stop before a token that repeats its predecessor: its id, or its `text` too (or goes on from
            it; needs a tokenizer), or `none`, for vocabularies of bytes or characters, which repeat by right. Default
            `text`.
        verify: (decoding) whether the model verifies in the next pass what slots said, which the paper does not: the
            output is then the model's own. Default false.
        tokenizer: the model's, for the guard. Default: none, and the guard looks at ids.
        streamer: gets prompt and tokens; `generate` hands none to a custom decoder.
        on_step: called after every pass with each row's `Step`; without `verify` with its own token first and then with
            what slots gave.
        generator: what draws come from. Default: torch's global generator.
        prepack: whether passes on a CPU use weights laid out beforehand; see `Speculative`. Default: where it pays.

    Raises:
        IntaglioError: the model was not trained so, or with another vocabulary or shorter units; and all that training
            and the verify loop refuse.

    Source: Sun et al., Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs,
    LREC-COLING 2024, arXiv 2405.15208. No code was published, and the paper leaves alpha, beta, k, the mixture of the
    losses and the layout open; the defaults are ours. The prompt is read without PADs, so the first token comes alone.
    Under LoRA, PAD's row stays as it was drawn, and the adapters learn to read it.
    """

    kinds = ("objective", "decoder", "drafter")
    summary = (
        "trains a model to emit the rest of a lexical unit in one pass, and decodes so; lossless only with verification"
    )
    citation = (
        "Sun et al., Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs, "
        "LREC-COLING 2024"
    )
    url = "https://arxiv.org/abs/2405.15208"

    model_config = ConfigDict(arbitrary_types_allowed=True)
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"weights", "vocabulary"})
    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "cache"})
    vocabulary_config_keys: ClassVar[frozenset[str]] = frozenset({NOTE})
    needs_hidden: ClassVar[bool] = False

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
        """As the paper has it: units found once before training, and learnt from their start.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"identify": "before", "places": "start", **overrides})

    # --- training ---

    def prepare(self, checkpoint: Checkpoint, examples: Iterable[Example], rng: KeyedRNG) -> Iterable[Example]:
        """Find or make PAD, note it in the model's configuration, and cut or pack the examples into rows.

        Args:
            checkpoint: a causal decoder; its vocabulary grows by PAD if it lacks it.
            examples: texts or ids, in which every token counts, or instruction pairs, in which answers do.
            rng: its seed is that of PAD's first embedding.

        Raises:
            IntaglioError: the model is no causal decoder or takes no mask, PAD is missing and may not be added, an
                example is malformed, or a stream whose units were to be found before training.
        """
        length = row_length(checkpoint, self.length)
        check_causal(checkpoint, packing=self.pack)
        Reader(checkpoint.model)  # refuses models whose attention takes no mask
        self._context = checkpoint.context
        self._pad = reserve_token(
            checkpoint, self.pad_token, name=TOKEN, field="pad_token", grow=self.grow, seed=rng.seed
        )
        note = {"pad": self._pad, "cap": self._cap, "vocabulary": _rows(checkpoint.model)}
        setattr(checkpoint.model.config, NOTE, note)
        rows = self._cut(checkpoint, examples, length)
        return self._found(checkpoint.model, rows) if self.identify == "before" else rows

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
        whole = documents(examples, _rows(checkpoint.model))
        return packed(whole, length) if self.pack else cut(whole, length)

    def _answers(self, checkpoint: Checkpoint, examples: Iterable[Example], length: int) -> Iterator[Example]:
        for number, example in enumerate(examples):
            prompt, answer, stop = tokenize_pair(checkpoint, example, number, length, chat=self.chat)
            ids_T = torch.tensor([*prompt, *answer, *stop])
            labels_T = ids_T.clone()
            labels_T[: len(prompt)] = IGNORED
            yield {"input_ids": ids_T, "labels": labels_T}

    def _found(self, model: Any, rows: Iterator[Example]) -> Iterator[Example]:
        """The rows with the units that the model finds in them now."""
        while head := list(islice(rows, 1)):
            if model.training:
                raise IntaglioError(
                    "units are found before training, but rows are still read or the model is in training mode; give "
                    "the data in memory and the model in evaluation mode, or set identify: during"
                )
            some = head + list(islice(rows, max(1, READ // len(head[0]["input_ids"])) - 1))
            for row, units, count in zip(some, *self._units(model, some), strict=True):
                kept = torch.tensor(units, dtype=torch.int64).reshape(-1, 2)
                yield {**row, "units": kept, "counts": torch.tensor(count)}

    def _units(self, model: Any, rows: Sequence[Example]) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int]]]:
        """Of each row: the units that can be learnt, and how many tokens lie in how many units."""
        learnt, counts = [], []
        for row, joins_T in zip(rows, confident(model, rows, self.alpha, self.top1), strict=True):
            units = units_of(row, joins_T, self._cap)
            counts.append((sum(end - begin + 1 for begin, end in units), len(units)))
            if self.places == "start":
                learnt.append(spans(row, units))
            else:
                learnt.append(rests(row, units_of(row, joins_T, len(joins_T)), self._cap))
        return learnt, counts

    def modules(self) -> nn.ModuleDict:
        """None."""
        return nn.ModuleDict()

    def collate(self, examples: Sequence[Example], rng: KeyedRNG) -> Batch:
        """Return the batch with its PADs or, where units are found during training, what `loss` lays them into.

        Args:
            examples: rows.
            rng: draws the anchors, anew each epoch.
        """
        seeds = [int(torch.randint(2**62, (1,), generator=rng(row, "lud"))) for row in examples]
        if self.identify == "before":
            units = [[(begin, end) for begin, end in row["units"].tolist()] for row in examples]
            return self._laid(examples, units, [tuple(row["counts"].tolist()) for row in examples], seeds)
        weight = sum(int((targets(row) != IGNORED).sum()) for row in examples)
        return reconfiguration.as_tensors(examples) | {"seeds": torch.tensor(seeds), "weight": weight}

    def _laid(
        self,
        rows: Sequence[Example],
        units: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
    ) -> Batch:
        chosen = [
            reconfiguration.drawn(found, self._anchors(len(row["input_ids"])), torch.Generator().manual_seed(seed))
            for row, found, seed in zip(rows, units, seeds, strict=True)
        ]
        if self.layout == "packed":
            batch = reconfiguration.packed(rows, chosen, self._pad)
        else:
            batch = reconfiguration.truncated(rows, chosen, self._pad, self._cap - 1, self._context)
        tokens, number = (sum(column) for column in zip(*counts, strict=True))
        return batch | {"unit_length": torch.tensor(tokens / max(1, number))}

    def _anchors(self, tokens: int) -> int:
        if self.anchors is not None:
            return self.anchors
        return max(1, tokens // 8) if self.layout == "packed" else 1

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss and its parts: `next_token`, `units` (of PADs), `pads` (how many), `unit_length` (tokens).

        Args:
            model: the model.
            batch: from `collate`.
        """
        if "seeds" in batch:
            rows = reconfiguration.as_rows(batch)
            device = batch["input_ids"].device
            laid = self._laid(rows, *self._units(model, rows), batch["seeds"].tolist())
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in laid.items()}
        logits_BSV = reconfiguration.logits(model, batch)
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
        """What the last `generate` call cost, and how far it agreed with the unaided model."""
        return self._statistics

    @property
    def threshold(self) -> float:
        """Beta."""
        return self.beta if self.beta is not None else VERIFIED_BETA if self.verify else BETA

    def _tuned(self, model: Any) -> tuple[int, int]:
        """PAD's id and k, as the model was trained or as the fields say."""
        note, rows = _note(model), _rows(model)
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
        """The id of the PAD token that the fields name."""
        if not isinstance(self.pad_token, str):
            return self.pad_token
        if self.tokenizer is None:
            raise IntaglioError(f"pad_token is {self.pad_token!r} and no tokenizer is known; give tokenizer= or its id")
        found = self.tokenizer.get_vocab().get(self.pad_token)
        if found is None:
            raise IntaglioError(f"pad_token is {self.pad_token!r}, which the tokenizer does not have")
        return int(found)

    def _guard(self) -> Guard:
        by_text = self.guard != "id" and self.tokenizer is not None
        return Guard(RepeatsText(self.tokenizer) if by_text else repeats_id, self.guard != "none", self._statistics)

    def start(self, run: Run) -> Session:
        """Begin a run in which the model verifies; see `Drafter.start`.

        Args:
            run: what is known before the first pass.

        Raises:
            IntaglioError: the model was not trained for lexical units, or otherwise than the fields say.
        """
        pad, cap = self._tuned(run.model)
        beta = VERIFIED_BETA if self.beta is None else self.beta
        return Drafting(run, pad, cap - 1, beta, self._guard())

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Called by `model.generate(..., custom_generate=self)`; see `Speculative` for what is accepted.

        Args:
            model: tuned by the objective.
            input_ids: the prompts [B, P].
            logits_processor: as `generate` made them.
            stopping_criteria: as `generate` made them.
            generation_config: the merged one.
            **model_kwargs: what `generate` prepared for the model.
        """
        self._statistics = UnitStatistics(threshold=self.threshold, verified=self.verify)
        given = (model, input_ids, logits_processor, stopping_criteria, generation_config)
        return self._verified(given, model_kwargs) if self.verify else self._lossy(given, model_kwargs)

    def _verified(self, given: tuple[Any, ...], model_kwargs: dict[str, Any]) -> Tensor | SpeculativeOutput:
        loop = self.loop()
        try:
            found = loop(*given, **model_kwargs)
        finally:
            for field in dataclasses.fields(loop.statistics):
                setattr(self._statistics, field.name, getattr(loop.statistics, field.name))
        if isinstance(found, SpeculativeOutput):
            found.statistics = self._statistics
        return found

    def _lossy(self, given: tuple[Any, ...], model_kwargs: dict[str, Any]) -> Tensor | SpeculativeOutput:
        model, ids_BP, processors, criteria, config = given
        request = read_request(model, ids_BP, processors, criteria, config, model_kwargs)
        pad, cap = self._tuned(model)
        settings = Settings(pad, cap - 1, self.threshold, self._guard(), self.generator, self.streamer, self.on_step,
                            self.prepack)  # fmt: skip
        with streaming(self.streamer, request.ids_BP), torch.inference_mode():
            ids_BL = Spans(settings, model, request, self._statistics).run()
        return as_asked(request, ids_BL, self._statistics)


def _rows(model: Any) -> int:
    """Token ids that a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def _note(model: Any) -> dict[str, int]:
    """What training has noted in a model's configuration; empty where it was not trained for units."""
    found = getattr(model.config, NOTE, None)
    if found is None:
        return {}
    names = {"pad", "cap", "vocabulary"}
    if not (isinstance(found, dict) and names == set(found) and all(type(found[name]) is int for name in names)):
        raise IntaglioError(f"{NOTE} in the model's configuration is damaged; train it with the objective lud again")
    return dict(found)
