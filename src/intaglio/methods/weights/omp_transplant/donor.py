"""The donor model: its tokenizer, its token ids, its embedding and its head; other weights are not read."""

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
from intaglio.methods.weights.omp_transplant.matching_pursuit import Rope
from intaglio.modeling.anatomy import anatomy

IDS = ("pad", "bos", "eos", "unk", "mask", "sep", "cls")
"""Special tokens whose ids a config may hold."""


@dataclass(frozen=True, eq=False)
class Donor:
    """The transplanted parts of a donor; `head_VD` is None where it is tied or missing."""

    name: str
    tokenizer: Any
    config: Any
    generation: Any
    embedding_VD: Tensor
    head_VD: Tensor | None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Donor:
        """Take the parts of a loaded checkpoint."""
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
    def load(cls, name: str) -> Donor:
        """Read a donor's tokenizer and its two matrices by name, directory or hub id."""
        config, tokenizer = load_config_and_tokenizer(name)
        source, full_config = load_config(name)
        _, revision = split_revision(name)
        with torch.device("meta"):
            meta_model = model_class(full_config, name)(full_config)
        embedding, head = meta_model.get_input_embeddings(), meta_model.get_output_embeddings()
        keys = [_weight_name(meta_model, module) for module in (embedding, head) if module is not None]
        tensors = _read_tensors(source, revision, keys)
        if keys[0] not in tensors:  # the family stores it under another name, which transformers maps
            return cls.from_checkpoint(load(name))
        return cls(
            name,
            tokenizer,
            config,
            _load_generation_config(source, revision),
            tensors[keys[0]],
            # Without a tensor of its own the head is tied.
            None if len(keys) == 1 or anatomy(meta_model).tied else tensors.get(keys[1]),
        )

    @property
    def ids(self) -> dict[str, Any]:
        """Return `{eos_token_id: 2, ...}` from its config, or else its tokenizer; None where neither has the id."""
        ids = {}
        for role in IDS:
            field = f"{role}_token_id"
            value = getattr(self.config, field, None)
            ids[field] = getattr(self.tokenizer, field, None) if value is None else value
        return ids

    @property
    def rope(self) -> Rope | None:
        """Return the rotation of its attention heads; see `rope_of`."""
        return rope_of(self.config)


def rope_of(config: Any) -> Rope | None:
    """Return the rotation of a model's attention heads, or None without rotary positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, Mapping) and "rope_theta" not in rope:  # nested by layer type
        rope = next((part for part in rope.values() if isinstance(part, Mapping)), {})
    base = rope.get("rope_theta", getattr(config, "rope_theta", None))
    return None if base is None else Rope(int(config.num_attention_heads), float(base))


def load_config_and_tokenizer(name: str) -> tuple[Any, Any]:
    """Return a donor's text config and tokenizer, without any weights."""
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
        raise IntaglioError(f"donor: {name} has no tokenizer")


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module's weight."""
    names = [name for name, other in model.named_modules() if other is module]
    return f"{names[0]}.weight"


def _read_tensors(source: str, revision: str | None, keys: list[str]) -> dict[str, Tensor]:
    """Read the named tensors that a checkpoint's files contain."""

    def file(name: str) -> Path | None:
        with silence_transformers():
            tensors = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if tensors is None else Path(tensors)

    shards: dict[str, str] = {}
    for stem in ("model", LIVE_WEIGHTS.removesuffix(".safetensors")):
        if (index := file(f"{stem}{INDEX}")) is not None:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (whole := file(f"{stem}.safetensors")) is not None:
            with safe_open(whole, framework="pt") as handle:
                shards = dict.fromkeys(handle.keys(), whole.name)
        if shards:
            break
    tensors = {}
    for key in keys:
        stored = _stored_name(key, list(shards))
        shard = None if stored is None else file(shards[stored])
        if shard is not None:
            with safe_open(shard, framework="pt") as handle:
                tensors[key] = handle.get_tensor(stored)
    return tensors


def _stored_name(key: str, names: list[str]) -> str | None:
    """Return a parameter's name in the files: its own, or one that differs by a base model's prefix."""
    if key in names:
        return key
    matches = [name for name in names if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return matches[0] if len(matches) == 1 else None


def _load_generation_config(source: str, revision: str | None) -> Any:
    with silence_transformers():
        file = cached_file(
            source, "generation_config.json", revision=revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    return None if file is None else GenerationConfig.from_pretrained(str(Path(file).parent))


def check_matrix(matrix_VD: Tensor, whose: str) -> None:
    """Refuse a matrix that is packed or holds NaN or infinite values."""
    if matrix_VD.dim() != 2 or matrix_VD.dtype not in DTYPES.values():
        raise IntaglioError(
            f"{whose} is stored as {str(matrix_VD.dtype).removeprefix('torch.')}, not in a plain floating-point dtype"
        )
    if not torch.isfinite(matrix_VD.float().sum()) and not torch.isfinite(matrix_VD).all():
        row = int((~torch.isfinite(matrix_VD)).any(1).nonzero()[0])
        raise IntaglioError(f"{whose} holds NaN or infinite values, first in row {row}")
