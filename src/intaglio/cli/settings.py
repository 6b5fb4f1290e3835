"""The decoders of `intaglio generate` that draft: their names, their settings from `--set key=value`, their colours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.attachments import Attachment
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.recipe.schema import from_cli
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.prompt_lookup import PromptLookup, check_count
from intaglio.speculative.drafters.static_tree import Shape, best, by_widths, chain
from intaglio.speculative.loop import Speculative
from intaglio.speculative.protocols import Drafter, Step


def _settings(name: str, function: Callable[..., Any], *without: str, **more: Any) -> type[BaseModel]:
    """A model with the arguments of a function that have defaults, but for some, and more of its own."""
    hints, arguments = get_type_hints(function), inspect.signature(function).parameters.values()
    fields = {
        a.name: (hints[a.name], a.default) for a in arguments if a.name not in without and a.default is not a.empty
    }
    options: Any = more | fields
    made: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **options)
    return made


PLAIN: dict[str, type[BaseModel]] = {
    "prompt_lookup": _settings("PromptLookup", PromptLookup.__init__),
    "ngram": _settings("NGram", NGramStore.build, corpus=(str, ...)),
    "draft_model": _settings(
        "DraftModel",
        DraftModel.__init__,
        "widths",
        "shape",
        model=(str, ...),
        length=(int, 5),
        widths=(str | None, None),
        acceptance=(str | None, None),
        nodes=(int, 15),
    ),
}
"""Drafters that are no method of the catalogue, and what can be set. The draft model's tree is a chain of `length`, or
has `widths` (such as 4,2,1) children level by level, or is the best of `nodes` for the `acceptance` of the draft's
first, second, ... choice (such as 0.5,0.2,0.1)."""


def names() -> list[str]:
    """The decoders that draft."""
    return [*(slug for slug, entry in PUBLISHED.items() if "drafter" in entry.kinds), *PLAIN]


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """`{key: value}` of the words given with `--set`.

    Args:
        words: each `key=value`.

    Raises:
        IntaglioError: a word without `=`, or a key that stands twice.
    """
    found: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not (key and sign):
            raise IntaglioError(f"--set {word!r} is not accepted; write key=value, such as nodes=7")
        if key in found:
            raise IntaglioError(f"--set {key} stands twice; give it once")
        found[key] = value
    return found


def check_settings(decoder: str, settings: Mapping[str, str]) -> BaseModel:
    """The settings of a decoder as its types say.

    Args:
        decoder: one of `names()`.
        settings: from `read_settings`.

    Raises:
        IntaglioError: one sentence on the first that is wrong.
    """
    wanted: type[BaseModel] = PLAIN[decoder] if decoder in PLAIN else get_method(decoder)
    for name, field in wanted.model_fields.items():
        if field.is_required() and name not in settings:
            raise IntaglioError(f"the decoder {decoder} needs a {name}; give it with --set {name}=...")
    return from_cli(wanted, dict(settings), "--set")


def make_drafter(decoder: str, settings: Mapping[str, str], checkpoint: Checkpoint) -> Drafter:
    """The drafter, ready: with what the checkpoint has attached, unless a corpus is set.

    Args:
        decoder: one of `names()`.
        settings: from `read_settings`.
        checkpoint: the target.

    Raises:
        IntaglioError: settings, corpus, attachment or draft model that are no good.
    """
    found = check_settings(decoder, settings)
    given: dict[str, Any] = {name: getattr(found, name) for name in settings}
    if decoder == "prompt_lookup":
        return PromptLookup(**given)
    if decoder == "ngram":
        texts = load_texts(given.pop("corpus"))
        ids = checkpoint.tokenizer(list(texts.documents), add_special_tokens=False, verbose=False)["input_ids"]
        return NGramStore.build(ids, checkpoint.vocabulary, **given)
    if decoder == "draft_model":
        model = load(
            given.pop("model"), device=checkpoint.device, dtype=next(checkpoint.model.parameters()).dtype
        ).model
        shape = _shape(given)
        return DraftModel(model, shape=shape.parents, **given)
    method: Any = get_method(decoder)
    drafter: Drafter
    attached = decoder in checkpoint.attachments and given.get("corpus") is None
    if attached or (PUBLISHED[decoder].fitted and not _reads_corpus(decoder) and not given.get("untrained")):
        drafter = checkpoint.decoder(decoder, **given)  # where nothing is attached, says what would do that
    else:
        drafter = method(**given, **_tokenizer(method, checkpoint))
    return drafter


def _tokenizer(method: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"tokenizer": checkpoint.tokenizer} if "tokenizer" in method.model_fields else {}


def _shape(given: dict[str, Any]) -> Shape:
    """Take what says the shape of a draft model's tree out of its settings."""
    length, widths, acceptance = (given.pop(name, None) for name in ("length", "widths", "acceptance"))
    nodes = given.pop("nodes", None)
    if sum(value is not None for value in (length, widths, acceptance)) > 1:
        raise IntaglioError("--set length, widths and acceptance each say what the tree is like; give one of them")
    if nodes is not None and acceptance is None:
        raise IntaglioError("--set nodes belongs to acceptance: the best tree of so many nodes; give both")
    if acceptance is not None:
        return best(_numbers("acceptance", acceptance, float), 15 if nodes is None else nodes)
    if widths is not None:
        return by_widths(_numbers("widths", widths, int))
    check_count("--set length", length := 5 if length is None else length)
    return chain(length)


def _numbers(name: str, words: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError:
        raise IntaglioError(f"--set, {name}: {words!r} is not accepted, it should be numbers with commas") from None


def make_decoder(
    decoder: str,
    settings: Mapping[str, str],
    checkpoint: Checkpoint,
    streamer: Any = None,
    on_step: Callable[[Step], None] | None = None,
) -> Any:
    """What is given to `generate(custom_generate=...)`: the verify loop, or a method that may do without verifying.

    Args:
        decoder: one of `names()`.
        settings: from `read_settings`.
        checkpoint: the target.
        streamer: gets prompt and tokens.
        on_step: called with each row's `Step`.

    Raises:
        IntaglioError: as `make_drafter`.
    """
    drafter: Any = make_drafter(decoder, settings, checkpoint)
    if getattr(drafter, "lossless", True):
        prepack = getattr(drafter, "prepack", None)
        return Speculative(drafter, streamer=streamer, on_step=on_step, prepack=prepack)
    more = {"tokenizer": checkpoint.tokenizer, "streamer": streamer, "on_step": on_step}
    return drafter.model_copy(update=more)


def _reads_corpus(decoder: str) -> bool:
    return decoder in PUBLISHED and "corpus" in get_method(decoder).model_fields


def starts_empty(decoder: str, settings: Mapping[str, str], attachments: Mapping[str, Attachment]) -> bool:
    """Whether a method that reads a corpus has neither an attachment nor one.

    Args:
        decoder: one of `names()`.
        settings: from `read_settings`.
        attachments: of the checkpoint.
    """
    return _reads_corpus(decoder) and "corpus" not in settings and decoder not in attachments


class Painter:
    """Hands text on token by token, and says of each piece whether it was drafted; an `on_step` callback.

    Args:
        tokenizer: of the target.
        paint: called with a piece of text and whether its tokens were drafted and accepted.
    """

    def __init__(self, tokenizer: Any, paint: Callable[[str, bool], None]) -> None:
        self._tokenizer = tokenizer
        self._paint = paint
        self._ids: list[int] = []  # since the last line end
        self._shown = 0

    def __call__(self, step: Step) -> None:
        """Show what a pass emitted.

        Args:
            step: of the one row.
        """
        for place, token in enumerate(step.tokens):
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            # Half a character waits for its other half, unless nothing follows.
            last = step.done and place == len(step.tokens) - 1
            if len(text) > self._shown and (last or not text.endswith("\ufffd")):
                self._paint(text[self._shown :], place < step.drafted)
                self._shown = len(text)
                if text.endswith("\n"):
                    self._ids, self._shown = [], 0
