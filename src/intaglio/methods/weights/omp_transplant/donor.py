"""The donor: its tokenizer, its ids, and of its weights the embedding and the head alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from intaglio.checkpoint import DTYPES, LIVE_WEIGHTS, Checkpoint, load, load_config, load_tokenizer, model_class
from intaglio.checkpoint.resolve import silence_transformers, split_revision
from intaglio.checkpoint.sharding import INDEX
from intaglio.errors import IntaglioError
from intaglio.methods.weights.omp_transplant.pursuit import Rope
from intaglio.modeling.anatomy import anatomy

IDS = ("pad", "bos", "eos", "unk", "mask", "sep", "cls")
"""Tokens whose ids a configuration may name."""


@dataclass(frozen=True, eq=False)
class Donor:
    """What is taken from the donor.

    Args:
        name: as the user gave it.
        tokenizer: its own.
        config: of its text part.
        generation: its generation config, or None.
        embedding_VD: its input embedding.
        head_VD: its head, or None where that is the embedding, or where it has none.
    """

    name: str
    tokenizer: Any
    config: Any
    generation: Any
    embedding_VD: Tensor
    head_VD: Tensor | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Donor:
        """A checkpoint that is loaded.

        Args:
            checkpoint: the donor.

        Raises:
            IntaglioError: it has no tokenizer.
        """
        parts = anatomy(checkpoint.model)
        _check_tokenizer(checkpoint.tokenizer, checkpoint.source)
        embedding: Any = parts.embedding
        head: Any = parts.head
        return cls(
            checkpoint.source,
            checkpoint.tokenizer,
            parts.config,
            getattr(checkpoint.model, "generation_config", None),
            embedding.weight.detach(),
            None if head is None or parts.tied else head.weight.detach(),
        )

    @classmethod
    def read(cls, name: str) -> Donor:
        """Read a donor's tokenizer and its two matrices; its other weights are not touched.

        Args:
            name: a bundled name, a directory or a hub id, as in `intaglio.load`.

        Raises:
            IntaglioError: as `intaglio.load`, or it has no tokenizer.
        """
        config, tokenizer = about(name)
        source, whole = load_config(name)
        _, revision = split_revision(name)
        with torch.device("meta"):
            skeleton = model_class(whole, name)(whole)
        embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
        keys = [_parameter(skeleton, module) for module in (embedding, head) if module is not None]
        found = _tensors(source, revision, keys)
        if keys[0] not in found:  # a family whose files name it otherwise: transformers knows how
            return cls.of(load(name))
        return cls(
            name,
            tokenizer,
            config,
            _generation(source, revision),
            found[keys[0]],
            # A file without the head's own tensor is one of tied weights.
            None if len(keys) == 1 or anatomy(skeleton).tied else found.get(keys[1]),
        )

    @property
    def ids(self) -> dict[str, Any]:
        """`{eos_token_id: 2, ...}`: what its configuration says, or else its tokenizer; None where neither has one."""
        found = {}
        for role in IDS:
            field = f"{role}_token_id"
            own = getattr(self.config, field, None)
            found[field] = getattr(self.tokenizer, field, None) if own is None else own
        return found

    @property
    def rope(self) -> Rope | None:
        """How its attention rotates its heads; see `rope_of`."""
        return rope_of(self.config)


def rope_of(config: Any) -> Rope | None:
    """The rotation of a model's heads, or None where positions are told otherwise.

    Args:
        config: of its text part.
    """
    found = getattr(config, "rope_parameters", None) or {}
    if isinstance(found, Mapping) and "rope_theta" not in found:  # one for each kind of layer
        found = next((part for part in found.values() if isinstance(part, Mapping)), {})
    base = found.get("rope_theta", getattr(config, "rope_theta", None))
    return None if base is None else Rope(int(config.num_attention_heads), float(base))


def about(name: str) -> tuple[Any, Any]:
    """A donor's configuration and tokenizer, without any weights.

    Args:
        name: as in `intaglio.load`.

    Raises:
        IntaglioError: there is no such model, or it has no tokenizer.
    """
    try:
        source, config = load_config(name)
        model_class(config, name)
        _, revision = split_revision(name)
        tokenizer = load_tokenizer(source, revision)
    except IntaglioError as error:
        raise IntaglioError(f"donor: {error}") from error
    _check_tokenizer(tokenizer, name)
    return config.get_text_config(), tokenizer


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if tokenizer is None or not tokenizer.get_vocab():
        raise IntaglioError(f"donor: {name} has no tokenizer to give")


def _parameter(model: nn.Module, module: nn.Module) -> str:
    """The name of a module's weight."""
    found = [name for name, other in model.named_modules() if other is module]
    return f"{found[0]}.weight"


def _tensors(source: str, revision: str | None, keys: list[str]) -> dict[str, Tensor]:
    """Those of the named tensors that are in a checkpoint's files, by name; their other tensors are not read."""

    def file(name: str) -> Path | None:
        with silence_transformers():
            found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    places: dict[str, str] = {}
    for stem in ("model", LIVE_WEIGHTS.removesuffix(".safetensors")):
        if (index := file(f"{stem}{INDEX}")) is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (whole := file(f"{stem}.safetensors")) is not None:
            with safe_open(whole, framework="pt") as handle:
                places = dict.fromkeys(handle.keys(), whole.name)
        if places:
            break
    found = {}
    for key in keys:
        stored = _stored(key, list(places))
        shard = None if stored is None else file(places[stored])
        if shard is not None:
            with safe_open(shard, framework="pt") as handle:
                found[key] = handle.get_tensor(stored)
    return found


def _stored(key: str, names: list[str]) -> str | None:
    """What a parameter is called in the files: its own name, or with a base model's name more or less before it."""
    if key in names:
        return key
    near = [name for name in names if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return near[0] if len(near) == 1 else None


def _generation(source: str, revision: str | None) -> Any:
    with silence_transformers():
        file = cached_file(
            source, "generation_config.json", revision=revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    return None if file is None else GenerationConfig.from_pretrained(str(Path(file).parent))


def check_matrix(matrix_VD: Tensor, whose: str) -> None:
    """Refuse a matrix that is none of plain finite numbers.

    Args:
        matrix_VD: an embedding or a head.
        whose: for the sentence.

    Raises:
        IntaglioError: packed numbers, or NaN or infinite ones.
    """
    if matrix_VD.dim() != 2 or matrix_VD.dtype not in DTYPES.values():
        raise IntaglioError(f"{whose} is stored as {str(matrix_VD.dtype).removeprefix('torch.')}, not as plain numbers")
    if not torch.isfinite(matrix_VD.float().sum()) and not torch.isfinite(matrix_VD).all():
        row = int((~torch.isfinite(matrix_VD)).any(1).nonzero()[0])
        raise IntaglioError(f"{whose} holds NaN or infinite values, first in row {row}")
