"""Trained heads that come with the package, for the bundled models as they are: data in the attachment format.

    pretrained/MODEL/SLUG.json                             what they belong to, how they were trained, what they were worth
    pretrained/MODEL/SLUG.safetensors (or in shards)       the heads, in bfloat16

`Checkpoint.decoder` takes them where nothing is attached and the model's fingerprint is theirs.
`benchmarks/decoding/ship.py` writes them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intaglio import atomic_io
from intaglio.checkpoint.attachments import Attachment, read_attachment
from intaglio.errors import IntaglioError

ROOT = Path(__file__).parent / "pretrained"
MOST = 24_000_000
"""Bytes of a drafter's heads at the most."""
SHARD = 15_900_000
"""Bytes of tensors in one file, so that with its header it stays below 16 MB."""


@dataclass(frozen=True)
class BundledHeads:
    """Heads that are there, without their tensors.

    Args:
        slug: of the method.
        model: the model's name.
        base: digest of the weights' files that they were fitted to.
        bytes: of the tensors.
        parameters: the hyperparameters that they were fitted with.
        about: what the method wants to know when it reads them: among it `model` and `float16`, the fingerprints of the
            model that they belong to (the other one: of the same model loaded in that precision).
        acceptance: what they were worth on held-out prompts, greedily: `prompts`, `new_tokens` of each, `nodes` of a
            tree, `tokens_a_pass` over all of them and by kind (`kinds`).
        folder: that the files are in.
    """

    slug: str
    model: str
    base: str
    bytes: int
    parameters: dict[str, Any]
    about: dict[str, Any]
    acceptance: dict[str, Any]
    folder: Path

    def told(self) -> dict[str, Any]:
        """What `intaglio show` says of them."""
        return {"model": self.model, "bytes": self.bytes, "acceptance": self.acceptance}

    def sentence(self) -> str:
        """The same in words."""
        found = self.acceptance
        kinds = ", ".join(f"{kind} {rate:.2f}" for kind, rate in found["kinds"].items())
        return (
            f"heads for {self.model} come with the package ({self.bytes / 1e6:.1f} MB): {found['tokens_a_pass']:.2f} "
            f"tokens a pass on {found['prompts']} held-out prompts, {found['nodes']} drafted tokens in each ({kinds})"
        )

    def fits(self, fingerprint: str) -> bool:
        """Whether the heads belong to a model.

        Args:
            fingerprint: of the model as it is loaded.
        """
        return fingerprint in (self.about.get("model"), self.about.get("float16"))

    def attachment(self) -> Attachment:
        """The heads, as if they were attached to the model.

        Raises:
            IntaglioError: a file is missing or damaged, or holds other heads than its description says.
        """
        found = read_attachment(self.folder, self.slug)
        if (found.parameters, found.base, found.bytes) != (self.parameters, self.base, self.bytes):
            raise IntaglioError(f"the heads in {self.folder} are not those that {self.slug}.json describes")
        return Attachment(self.slug, found.tensors, self.parameters, -1, self.about, self.base)


def bundled_heads(slug: str, root: Path | None = None) -> list[BundledHeads]:
    """The heads of a method that come with the package, by the names of their models.

    Args:
        slug: of the method.
        root: holds a folder a model. Default: the package's own.

    Raises:
        IntaglioError: a description is damaged.
    """
    return [_read(path) for path in sorted((ROOT if root is None else root).glob(f"*/{slug}.json"))]


def _read(path: Path) -> BundledHeads:
    try:
        return BundledHeads(**json.loads(path.read_text(encoding="utf-8")), folder=path.parent)
    except (OSError, ValueError, TypeError) as error:
        raise IntaglioError(f"{path} does not describe heads that come with the package: it is damaged") from error


def to_bfloat16(attachment: Attachment) -> Attachment:
    """Heads as they are shipped: in bfloat16.

    Args:
        attachment: what a fit step made.

    Raises:
        IntaglioError: more than 24 MB.
    """
    import torch

    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in attachment.tensors.items()
    }
    found = Attachment(attachment.slug, tensors, attachment.parameters, 0, attachment.about, attachment.base)
    if found.bytes > MOST:
        raise IntaglioError(
            f"the heads of {found.slug} have {found.bytes / 1e6:.1f} MB in bfloat16; at most {MOST / 1e6:.0f} MB are "
            "shipped"
        )
    return found


def bundle(
    attachment: Attachment,
    model: str,
    acceptance: dict[str, Any],
    root: Path | None = None,
) -> BundledHeads:
    """Write heads to where the package finds them, in the place of those of the same method and model.

    Args:
        attachment: what a fit step made.
        model: the model's name: of the folder.
        acceptance: as in `Shipped`.
        root: as in `shipped`.

    Raises:
        IntaglioError: more than 24 MB, or the disk refuses.
    """
    found = to_bfloat16(attachment)
    target = (ROOT if root is None else root) / model
    own = BundledHeads(found.slug, model, found.base, found.bytes, found.parameters, found.about, acceptance, target)
    with atomic_io.directory(target, overwrite=True) as folder:
        for path in target.glob("*") if target.is_dir() else ():
            if path.name.partition(".")[0].partition("-")[0] != found.slug:
                shutil.copy2(path, folder / path.name)
        found.write(folder, SHARD)
        plain = asdict(own)
        del plain["folder"]
        atomic_io.write_json(folder / f"{found.slug}.json", plain)
    return own


__all__ = ["MOST", "ROOT", "SHARD", "BundledHeads", "bundle", "bundled_heads", "to_bfloat16"]
