"""Attachments: what a decoder, a drafter or a dictionary owns, kept beside the weights it was made for.

    OUT/attachments/SLUG.safetensors

A `fit` step makes one. The weights are not touched; the file says to which weights it belongs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from intaglio.errors import IntaglioError
from intaglio.method import Cost, Progress, Workload, silent

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

    def write(self, folder: Path) -> None:
        """Write `SLUG.safetensors` into a folder that is there.

        Args:
            folder: `attachments` of a directory that the writer made.
        """
        from safetensors.torch import save_file

        own = {"slug": self.slug, "base": self.base, "step": self.step, "parameters": self.parameters}
        save_file(self.tensors, folder / f"{self.slug}.safetensors", described({**self.about, "attachment": own}))


def described(about: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file.

    Args:
        about: anything `json.dumps` takes.
    """
    return {KEY: json.dumps(about, sort_keys=True)}


def description(metadata: dict[str, str] | None) -> dict[str, Any]:
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
        IntaglioError: a file is no attachment, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Attachment] = {}
    for path in sorted((directory / FOLDER).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                about = description(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            own = about.pop("attachment")
            slug = own["slug"]
            found[slug] = Attachment(slug, tensors, own["parameters"], int(own["step"]), about, own["base"])
        except (SafetensorError, OSError) as error:
            raise IntaglioError(f"{path} is damaged or truncated: {error}") from error
        except (KeyError, TypeError, ValueError):
            raise IntaglioError(f"{path} is no attachment of Intaglio; a fit step of a recipe makes one") from None
        if slug != path.stem:
            raise IntaglioError(f"{path} is the attachment of {slug}; its name must be {slug}.safetensors")
    return found


@runtime_checkable
class Fitting(Protocol):
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
        progress: Progress = silent,
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
