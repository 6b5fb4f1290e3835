"""Pretrained draft heads that come with the package, for the unmodified bundled models, in the attachment format.

    pretrained/MODEL/SLUG.json                             model fingerprints, training settings, acceptance
    pretrained/MODEL/SLUG.safetensors (or in shards)       the heads, in bfloat16

`Checkpoint.decoder` uses them if nothing is attached and the model's fingerprint matches.
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
MAX_BYTES = 24_000_000
"""Most bytes of a drafter's heads."""
SHARD_BYTES = 15_900_000
"""Most bytes of tensors in a file, so that with its header it stays below 16 MB."""


@dataclass(frozen=True)
class BundledHeads:
    """Description of bundled heads, without their tensors.

    Args:
        slug: of the method.
        model: name of the model.
        base: digest of the weights' files that they were fitted to.
        bytes: of the tensors.
        parameters: the hyperparameters of the fit.
        about: metadata for the method; its `model` and `float16` are fingerprints of the model (the second: of the same
            model loaded in that precision).
        acceptance: results on held-out prompts, greedily: `prompts`, `new_tokens` of each, `nodes` of a tree,
            `tokens_a_pass` over all of them and by kind (`kinds`).
        folder: of the files.
    """

    slug: str
    model: str
    base: str
    bytes: int
    parameters: dict[str, Any]
    about: dict[str, Any]
    acceptance: dict[str, Any]
    folder: Path

    def summary(self) -> dict[str, Any]:
        """Return the part that `intaglio show --json` prints."""
        return {"model": self.model, "bytes": self.bytes, "acceptance": self.acceptance}

    def sentence(self) -> str:
        """Return the line that `intaglio show` prints."""
        measured = self.acceptance
        kinds = ", ".join(f"{kind} {rate:.2f}" for kind, rate in measured["kinds"].items())
        return (
            f"heads for {self.model} come with the package ({self.bytes / 1e6:.1f} MB): "
            f"{measured['tokens_a_pass']:.2f} tokens a pass on {measured['prompts']} held-out prompts, "
            f"{measured['nodes']} drafted tokens in each ({kinds})"
        )

    def matches(self, fingerprint: str) -> bool:
        """Return whether the heads belong to the loaded model with this fingerprint."""
        return fingerprint in (self.about.get("model"), self.about.get("float16"))

    def attachment(self) -> Attachment:
        """Return the heads as if they were attached to the model.

        Raises:
            IntaglioError: a file is missing or damaged, or does not match its description.
        """
        heads = read_attachment(self.folder, self.slug)
        if (heads.parameters, heads.base, heads.bytes) != (self.parameters, self.base, self.bytes):
            raise IntaglioError(f"the heads in {self.folder} are not those that {self.slug}.json describes")
        # The cost of a drafted token is the machine's that runs the heads, not that of the machine that fitted them.
        parameters = self.parameters | {"token_cost": None}
        return Attachment(self.slug, heads.tensors, parameters, -1, self.about, self.base)


def bundled_heads(slug: str, root: Path | None = None) -> list[BundledHeads]:
    """Return the bundled heads of a method, ordered by model.

    Args:
        slug: of the method.
        root: directory with a folder per model. Default: the package's own.

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
    """Return heads in bfloat16, as they are bundled.

    Raises:
        IntaglioError: more than 24 MB.
    """
    import torch

    tensors = {
        name: tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in attachment.tensors.items()
    }
    heads = Attachment(attachment.slug, tensors, attachment.parameters, 0, attachment.about, attachment.base)
    if heads.bytes > MAX_BYTES:
        raise IntaglioError(
            f"the heads of {heads.slug} have {heads.bytes / 1e6:.1f} MB in bfloat16; at most {MAX_BYTES / 1e6:.0f} MB "
            "are accepted"
        )
    return heads


def write_bundled(
    attachment: Attachment, model: str, acceptance: dict[str, Any], root: Path | None = None
) -> BundledHeads:
    """Write the heads of a fit to the package, replacing those of the same method and model.

    Raises:
        IntaglioError: more than 24 MB.
    """
    heads = to_bfloat16(attachment)
    target = (ROOT if root is None else root) / model
    bundled = BundledHeads(
        heads.slug, model, heads.base, heads.bytes, heads.parameters, heads.about, acceptance, target
    )
    with atomic_io.directory(target, overwrite=True) as folder:
        for path in target.glob("*") if target.is_dir() else ():
            if path.name.partition(".")[0].partition("-")[0] != heads.slug:
                shutil.copy2(path, folder / path.name)
        heads.write(folder, SHARD_BYTES)
        plain = asdict(bundled)
        del plain["folder"]
        atomic_io.write_json(folder / f"{heads.slug}.json", plain)
    return bundled


__all__ = ["MAX_BYTES", "ROOT", "SHARD_BYTES", "BundledHeads", "bundled_heads", "to_bfloat16", "write_bundled"]
