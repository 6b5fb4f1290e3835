"""Decoders by name: the methods of the catalogue that decode, and the plain drafters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.speculative._utils import check_count
from intaglio.speculative.decoder_mixin import SpeculativeDecoder
from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.loop import Speculative
from intaglio.speculative.protocols import Drafter, Step
from intaglio.speculative.static_tree import StaticTree, best_tree


def _settings(name: str, function: Callable[..., Any], *without: str, **more: Any) -> type[BaseModel]:
    """Return a model of a function's arguments with defaults, except some, and more fields."""
    hints, arguments = get_type_hints(function), inspect.signature(function).parameters.values()
    fields: dict[str, Any] = more | {
        a.name: (hints[a.name], a.default) for a in arguments if a.name not in without and a.default is not a.empty
    }
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    return model


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
"""Drafters outside the catalogue, and their settings. The draft model's tree is a chain of `length`, or has `widths`
(such as 4,2,1) children level by level, or is the best of `nodes` for the `acceptance` of the draft's first, second,
... choice (such as 0.5,0.2,0.1)."""


def drafter_names() -> list[str]:
    """Return the names of all drafters."""
    return [*(slug for slug, entry in PUBLISHED.items() if "drafter" in entry.kinds), *PLAIN]


def decoder_names() -> list[str]:
    """Return the names of all decoders, those that draft and others."""
    return [*(slug for slug, entry in PUBLISHED.items() if {"decoder", "drafter"} & set(entry.kinds)), *PLAIN]


def settings_model(name: str) -> type[BaseModel]:
    """Return the model of a decoder's settings."""
    return PLAIN[name] if name in PLAIN else get_method(name)


def reads_corpus(name: str) -> bool:
    """Return whether a drafter is a method that reads a corpus."""
    return name in PUBLISHED and "corpus" in get_method(name).model_fields


def make_drafter(name: str, fields: Mapping[str, Any], checkpoint: Checkpoint) -> Drafter:
    """Return a drafter, restored from the checkpoint's attachment if there is one and no corpus is set.

    Args:
        name: one of `drafter_names()`.
        fields: settings, as `settings_model` reads them.
        checkpoint: the target.

    Raises:
        IntaglioError: an unusable setting, corpus, attachment or draft model.
    """
    given = dict(fields)
    if name == "prompt_lookup":
        return PromptLookup(**given)
    if name == "ngram":
        texts = load_texts(given.pop("corpus"))
        ids = checkpoint.tokenizer(list(texts.documents), add_special_tokens=False, verbose=False)["input_ids"]
        return NGramStore.build(ids, checkpoint.vocabulary, **given)
    if name == "draft_model":
        dtype = next(checkpoint.model.parameters()).dtype
        model = load(given.pop("model"), device=checkpoint.device, dtype=dtype).model
        tree = _pop_tree(given)
        return DraftModel(model, shape=tree.parents, **given)
    method: Any = get_method(name)
    attached = name in checkpoint.attachments and given.get("corpus") is None
    if attached or (PUBLISHED[name].fitted and not reads_corpus(name) and not given.get("untrained")):
        restored: Drafter = checkpoint.decoder(name, **given)  # explains how to fit if nothing is attached
        return restored
    if "tokenizer" in method.model_fields:
        given["tokenizer"] = checkpoint.tokenizer
    drafter: Drafter = method(**given)
    return drafter


def make_decoder(
    name: str,
    fields: Mapping[str, Any],
    checkpoint: Checkpoint,
    streamer: Any = None,
    on_step: Callable[[Step], None] | None = None,
) -> Any:
    """Return the callable for `generate(custom_generate=...)`; arguments as `make_drafter` and `Speculative`.

    A decoder that drafts nothing takes `streamer` if it has a field of that name, and no `on_step`.
    """
    if name not in drafter_names():
        method: Any = get_method(name)
        decoder = method.for_checkpoint(checkpoint, **fields) if hasattr(method, "for_checkpoint") else method(**fields)
        return decoder.model_copy(update={"streamer": streamer}) if "streamer" in method.model_fields else decoder
    drafter = make_drafter(name, fields, checkpoint)
    if isinstance(drafter, SpeculativeDecoder):
        return drafter.model_copy(update={"streamer": streamer, "on_step": on_step})
    return Speculative(drafter, streamer=streamer, on_step=on_step)


def _pop_tree(given: dict[str, Any]) -> StaticTree:
    """Remove the settings of a draft model's tree and return the tree."""
    length, widths, acceptance, nodes = (given.pop(name, None) for name in ("length", "widths", "acceptance", "nodes"))
    if sum(value is not None for value in (length, widths, acceptance)) > 1:
        raise IntaglioError("length, widths and acceptance each define the tree; give only one of them")
    if nodes is not None and acceptance is None:
        raise IntaglioError("nodes belongs to acceptance: the best tree of so many nodes; give both")
    if acceptance is not None:
        return best_tree(_numbers("acceptance", acceptance, float), 15 if nodes is None else nodes)
    if widths is not None:
        return StaticTree.from_widths(_numbers("widths", widths, int))
    check_count("length", length := 5 if length is None else length)
    return StaticTree.from_widths((1,) * length)


def _numbers(name: str, words: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError:
        raise IntaglioError(f"{name} is {words!r}; numbers separated by commas are accepted") from None
