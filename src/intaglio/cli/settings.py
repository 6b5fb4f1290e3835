"""Settings of a decoder from `--set key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intaglio.checkpoint.attachments import Attachment
from intaglio.errors import IntaglioError
from intaglio.recipe.schema import from_cli
from intaglio.speculative.factory import reads_corpus, settings_model


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """Return `{key: value}` of the `key=value` words given with `--set`.

    Raises:
        IntaglioError: a word without `=`, or a repeated key.
    """
    settings: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not (key and sign):
            raise IntaglioError(f"--set {word!r} is not accepted; write key=value, such as nodes=7")
        if key in settings:
            raise IntaglioError(f"--set {key} is given twice; give it once")
        settings[key] = value
    return settings


def check_settings(decoder: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a drafting decoder, converted to the types of its fields.

    Raises:
        IntaglioError: one sentence on the first setting that is wrong or missing.
    """
    model = settings_model(decoder)
    for name, field in model.model_fields.items():
        if field.is_required() and name not in settings:
            raise IntaglioError(f"the decoder {decoder} needs a {name}; give it with --set {name}=...")
    values = from_cli(model, dict(settings), "--set")
    return {name: getattr(values, name) for name in settings}


def starts_empty(decoder: str, settings: Mapping[str, str], attachments: Mapping[str, Attachment]) -> bool:
    """Return whether a method that reads a corpus has neither a corpus nor an attachment."""
    return reads_corpus(decoder) and "corpus" not in settings and decoder not in attachments
