"""Attachments: what a decoder, a drafter or a dictionary owns, kept beside the weights it was made for.

    OUT/attachments/SLUG.safetensors
    OUT/attachments/SLUG.safetensors.index.json, SLUG-00001-of-00002.safetensors, ...      (the same in shards)

A `fit` step makes one. The weights are not touched; the file says to which weights it belongs, and so does every shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from intaglio.atomic_io import to_json
from intaglio.checkpoint.sharding import INDEX, read_index
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Progress, Workload, no_progress

if TYPE_CHECKING:
    from torch import Tensor

    from intaglio.checkpoint import Checkpoint
    from intaglio.data.texts import Corpus

FOLDER = "attachments"
KEY = "intaglio"
"""Where a file says everything about itself, as one JSON object: the order of several keys would change by chance."""


@dataclass(frozen=True)
class Attachment:
    """What one `fit` made.

    Args:
        slug: of the method.
        tensors: its content.
        parameters: the hyperparameters it was fitted with.
        step: index of the fit in the checkpoint's record.
        about: what else the method wants to know when it reads it again.
        base: digest of the weights' files that it belongs to (`weights_digest`); empty until they were saved once.
    """

    slug: str
    tensors: dict[str, Tensor]
    parameters: dict[str, Any]
    step: int
    about: dict[str, Any] = field(default_factory=dict)
    base: str = ""

    def of(self, base: str) -> Attachment:
        """The same, for weights with a digest, unless it belongs to some already.

        Args:
            base: `weights_digest` of a directory.
        """
        return self if self.base else replace(self, base=base)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path, most: int | None = None) -> None:
        """Write `SLUG.safetensors` into a folder that is there, or shards and their index.

        Args:
            folder: `attachments` of a directory that the writer made.
            most: bytes of tensors in a file. Default: no limit, so one file.

        Raises:
            IntaglioError: a tensor is larger than a file may be.
        """
        from safetensors.torch import save_file

        own = {"slug": self.slug, "base": self.base, "step": self.step, "parameters": self.parameters}
        metadata = encode_metadata({**self.about, "attachment": own})
        parts = [self.tensors] if most is None else _parts(self.tensors, most)
        if len(parts) == 1:
            save_file(parts[0], folder / f"{self.slug}.safetensors", metadata)
            return
        where: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            name = f"{self.slug}-{number:05d}-of-{len(parts):05d}.safetensors"
            save_file(part, folder / name, metadata)
            where |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{self.slug}{INDEX}").write_text(to_json(index), encoding="utf-8")


def _parts(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in the order of their names, as many to a part as it may hold."""
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in sorted(tensors.items()):
        if tensor.nbytes > most:
            raise IntaglioError(f"the tensor {name} has {tensor.nbytes} bytes; a file may hold {most} at the most")
        if tensor.nbytes > room:
            parts.append({})
            room = most
        parts[-1][name] = tensor
        room -= tensor.nbytes
    return parts


def encode_metadata(about: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file.

    Args:
        about: anything `json.dumps` takes.
    """
    return {KEY: json.dumps(about, sort_keys=True)}


def decode_metadata(metadata: dict[str, str] | None) -> dict[str, Any]:
    """What `described` was given; empty where it was not used.

    Args:
        metadata: of a safetensors file.
    """
    try:
        found = json.loads((metadata or {}).get(KEY, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_attachments(directory: Path) -> dict[str, Attachment]:
    """The attachments of a checkpoint directory, by slug.

    Args:
        directory: holds the weights.

    Raises:
        IntaglioError: a file is no attachment, or damaged; or a shard is missing.
    """
    folder = directory / FOLDER
    sharded = {index.name.removesuffix(INDEX): read_index(index) for index in sorted(folder.glob(f"*{INDEX}"))}
    shards = {shard for where in sharded.values() for shard in where.values()}
    whole = {path.stem for path in folder.glob("*.safetensors") if path.name not in shards}
    return {slug: read_attachment(folder, slug) for slug in sorted(whole | sharded.keys())}


def read_attachment(folder: Path, slug: str) -> Attachment:
    """One attachment, in one file or in shards.

    Args:
        folder: that it is in.
        slug: of the method.

    Raises:
        IntaglioError: it is none, or damaged; or a shard is missing.
    """
    index = folder / f"{slug}{INDEX}"
    if not index.is_file():
        path = folder / f"{slug}.safetensors"
        shard = _SHARD.fullmatch(path.name)
        if shard is not None:
            raise IntaglioError(f"{folder} is incomplete: {shard[1]}{INDEX} is missing")
        return _read(path, slug)
    where = read_index(index)
    if (folder / f"{slug}.safetensors").is_file():
        raise IntaglioError(f"{folder} has {slug} twice, in one file and in shards; remove one of the two")
    parts = [_read(folder / name, slug) for name in sorted(set(where.values()))]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    if any(replace(part, tensors={}) != replace(parts[0], tensors={}) for part in parts) or (
        tensors.keys() != where.keys() or len(tensors) != sum(len(part.tensors) for part in parts)
    ):
        raise IntaglioError(f"the shards that {index} names do not belong together; one of them is of another fit")
    return replace(parts[0], tensors=tensors)


_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


def _read(path: Path, slug: str) -> Attachment:
    """What one file says and holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = decode_metadata(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        own = about.pop("attachment")
        found = Attachment(own["slug"], tensors, own["parameters"], int(own["step"]), about, own["base"])
    except (SafetensorError, OSError) as error:
        raise IntaglioError(f"{path} is damaged or truncated: {error}") from error
    except (KeyError, TypeError, ValueError):
        raise IntaglioError(f"{path} is no attachment of Intaglio; a fit step of a recipe makes one") from None
    if found.slug != slug:
        raise IntaglioError(f"{path} is the attachment of {found.slug}; its name must be {found.slug}.safetensors")
    return found


@runtime_checkable
class Fittable(Protocol):
    """A method with something to build or train that leaves the weights alone: what a `fit` step runs."""

    def fit(
        self,
        checkpoint: Checkpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Make it, note the step (`verb="fit"`), attach it to `checkpoint` and return that.

        What takes long keeps its state in `directory`, and goes on with what is there if `resume`; the rest ignores
        both.
        """

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """The method, ready, out of what `fit` attached; `fields` win over those it was fitted with."""

    def estimate_fit(self, workload: Workload, texts: Corpus) -> Cost:
        """Say what `fit` on these texts will take."""
