"""Attachments: fitted parts of a decoder, drafter or dictionary, stored beside the weights they belong to.

    OUT/attachments/SLUG.safetensors
    OUT/attachments/SLUG.safetensors.index.json, SLUG-00001-of-00002.safetensors, ...      (the same in shards)

A `fit` step makes an attachment. The weights are unchanged; the file, and every shard, names the weights it belongs to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from intaglio.atomic_io import to_json
from intaglio.checkpoint.sharding import INDEX, read_index
from intaglio.errors import IntaglioError

FOLDER = "attachments"
KEY = "intaglio"
"""Metadata key for one JSON object: with several keys their order would be random."""


Restored = TypeVar("Restored")


def to_store(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return copies of tensors on the CPU, as files hold them, their names with a prefix."""
    return {f"{prefix}{name}": value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


@dataclass(frozen=True)
class Attachment:
    """Result of a `fit` step, stored beside the weights.

    Args:
        slug: of the method.
        tensors: its content.
        parameters: the hyperparameters of the fit.
        step: index of the fit in the checkpoint's record.
        about: further data of the method.
        base: digest of the weight files it belongs to (`weights_digest`); empty until they are saved.
        vocabulary: rows of the token embedding in the fit; 0: none, or unknown.
    """

    slug: str
    tensors: dict[str, Tensor]
    parameters: dict[str, Any]
    step: int
    about: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    vocabulary: int = 0

    def restored(self, cls: type[Restored], fields: Mapping[str, Any], changeable: Collection[str]) -> Restored:
        """Return the method with the hyperparameters of the fit, overridden by `fields`.

        Raises:
            IntaglioError: a field is not `changeable`.
        """
        fixed = sorted(name for name in fields if name not in changeable)
        if fixed:
            raise IntaglioError(f"{fixed[0]} cannot change after the fit; fit {self.slug} again")
        return cls(**{**self.parameters, **fields})

    def of(self, base: str) -> Attachment:
        """Return it with the weights' digest set, unless it has one."""
        return self if self.base else replace(self, base=base)

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, most: int | None = None) -> None:
        """Write `SLUG.safetensors` into an existing folder, or shards and their index."""
        from safetensors.torch import save_file

        own = {"slug": self.slug, "base": self.base, "step": self.step, "parameters": self.parameters}
        own |= {"vocabulary": self.vocabulary} if self.vocabulary else {}
        metadata = encode_metadata({**self.about, "attachment": own})
        parts = [self.tensors] if most is None else _parts(self.tensors, most)
        if len(parts) == 1:
            save_file(parts[0], folder / f"{self.slug}.safetensors", metadata)
            return
        shard_of: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            name = f"{self.slug}-{number:05d}-of-{len(parts):05d}.safetensors"
            save_file(part, folder / name, metadata)
            shard_of |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(shard_of.items()))}
        (folder / f"{self.slug}{INDEX}").write_text(to_json(index), encoding="utf-8")


def _parts(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Yield groups of tensors in the order of their names, each up to the shard size."""
    parts: list[dict[str, Tensor]] = [{}]
    remaining = max_bytes
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes > max_bytes:
            raise IntaglioError(f"the tensor {name} has {tensor.nbytes} bytes; a file may hold {max_bytes} at the most")
        if tensor.nbytes > remaining:
            parts.append({})
            remaining = max_bytes
        parts[-1][name] = tensor
        remaining -= tensor.nbytes
    return parts


def encode_metadata(about: dict[str, Any]) -> dict[str, str]:
    """Encode metadata for a safetensors file."""
    return {KEY: json.dumps(about, sort_keys=True)}


def decode_metadata(metadata: dict[str, str] | None) -> dict[str, Any]:
    """Decode the metadata written by `described`; empty for other files."""
    try:
        decoded = json.loads((metadata or {}).get(KEY, "{}"))
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def read_attachments(directory: Path) -> dict[str, Attachment]:
    """Read the attachments of a checkpoint directory, by slug."""
    folder = directory / FOLDER
    sharded = {index.name.removesuffix(INDEX): read_index(index) for index in sorted(folder.glob(f"*{INDEX}"))}
    shards = {shard for shard_of in sharded.values() for shard in shard_of.values()}
    single = {path.stem for path in folder.glob("*.safetensors") if path.name not in shards}
    return {slug: read_attachment(folder, slug) for slug in sorted(single | sharded.keys())}


def read_attachment(folder: Path, slug: str) -> Attachment:
    """Read an attachment from a file or shards."""
    index = folder / f"{slug}{INDEX}"
    if not index.is_file():
        path = folder / f"{slug}.safetensors"
        shard = _SHARD.fullmatch(path.name)
        if shard is not None:
            raise IntaglioError(f"{folder} is incomplete: {shard[1]}{INDEX} is missing")
        return _read(path, slug)
    shard_of = read_index(index)
    if (folder / f"{slug}.safetensors").is_file():
        raise IntaglioError(f"{folder} has {slug} twice, in one file and in shards; remove one of the two")
    parts = [_read(folder / name, slug) for name in sorted(set(shard_of.values()))]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    if any(replace(part, tensors={}) != replace(parts[0], tensors={}) for part in parts) or (
        tensors.keys() != shard_of.keys() or len(tensors) != sum(len(part.tensors) for part in parts)
    ):
        raise IntaglioError(f"the shards in {index} do not belong together: one is from another fit")
    return replace(parts[0], tensors=tensors)


_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


def _read(path: Path, slug: str) -> Attachment:
    """Read metadata and tensors of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = decode_metadata(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        own = about.pop("attachment")
        known = (own["parameters"], int(own["step"]), about, own["base"], int(own.get("vocabulary", 0)))
        attachment = Attachment(own["slug"], tensors, *known)
    except (SafetensorError, OSError) as error:
        raise IntaglioError(f"{path} is damaged or truncated: {error}") from error
    except (KeyError, TypeError, ValueError):
        raise IntaglioError(f"{path} is not an attachment of Intaglio; a fit step of a recipe makes one") from None
    if attachment.slug != slug:
        raise IntaglioError(
            f"{path} is the attachment of {attachment.slug}; its name must be {attachment.slug}.safetensors"
        )
    return attachment
