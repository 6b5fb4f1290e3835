"""Steering: a feature of a dictionary added to a model's activations, as a runtime step of a recipe.

    - steer: {feature: 123, scale: 2}

Dimension letters: B batch, L sequence, D width, M latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.sources import check_feature, check_index, find_dictionary
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, add_hook

SLUG = "steer"


class Steer(Method, slug=SLUG):
    """Add a feature of a dictionary to a model's activations, as a recipe step.

        add      x + s m_f w_f              at every token
        clamp    x + (s m_f - z_f(x)) w_f   so that the feature's part of the reconstruction is s m_f w_f

    w_f is the feature's decoder row, z_f its code and m_f its highest code on the held-out text of the fit (1 for a
    dictionary without measurements). Weights stay as they are: the checkpoint becomes a runtime one, which
    `intaglio.load` reads. Several steps add up.

    Args:
        feature: index of the latent, from 0.
        scale: s, in units of the feature's highest code; negative values steer away. `clamp` with 0 removes the
            feature. Default 1.
        mode: `add` (default) or `clamp`.
        dictionary: name of an attached dictionary, or a directory of `SparseDictionary.save` or sae_lens. Default: the
            first attached one.

    Raises:
        IntaglioError: there is no such dictionary or feature, the dictionary belongs to another model, or the feature
            never fired.
    """

    kinds = ("carving",)
    summary = "adds a feature of a dictionary to a model's activations"
    storage: ClassVar[Literal["runtime"]] = "runtime"
    needs_calibration: ClassVar[bool] = False
    changes: ClassVar[frozenset[ModelAspect]] = frozenset({"activations"})
    keeps_fits: ClassVar[bool] = True

    feature: Annotated[int, Field(ge=0)]
    scale: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    mode: Literal["add", "clamp"] = "add"
    dictionary: str | None = None

    def check(self, linears: Sequence[tuple[str, int, int]]) -> None:
        """Accept any projections."""

    def check_fits(self, checkpoint: Checkpoint, fits: Sequence[Method]) -> None:
        """Refuse a dictionary or a feature that is not there after the fits."""
        check_feature(checkpoint, self.dictionary, self.feature, fits)

    def estimate(self, workload: Workload) -> Cost:
        """Return no cost."""
        return Cost(extra_bytes=4 * workload.hidden)

    def apply(
        self,
        checkpoint: Checkpoint,
        calibration: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Steer `checkpoint` and return it.

        Args:
            checkpoint: steered from now on.
            calibration: ignored.
            seed: ignored.
            batch_size: ignored.
            progress: ignored.

        Raises:
            IntaglioError: see the class.
        """
        name, dictionary = find_dictionary(checkpoint, self.dictionary)
        check_index(name, self.feature, dictionary.width)
        if dictionary.site is None:
            raise IntaglioError(f"{name} does not name the activation that it was trained on, so it cannot steer")
        highest = dictionary.about.get("max_activation")
        strength = 1.0 if highest is None else float(highest[self.feature])
        if strength == 0:
            raise IntaglioError(f"feature {self.feature} of {name} fired for no held-out token, so it has no strength")
        push = Push.from_feature(dictionary, self.feature, self.scale * strength, self.mode)
        earlier = checkpoint.attachments.get(SLUG)
        tensors = {} if earlier is None else dict(earlier.tensors)
        pushes = [] if earlier is None else list(earlier.about["pushes"])
        tensors |= {f"{len(pushes)}:{key}": tensor for key, tensor in push.tensors().items()}
        pushes.append(push.settings())
        chosen = {"dictionary": name, "site": dictionary.site.name, "strength": strength}
        checkpoint.record_step(self.slug, self.model_dump(), chosen=chosen)
        checkpoint.attach(SLUG, tensors, self.model_dump(), {"pushes": pushes})
        checkpoint.set_runtime_state(SLUG, {"count": len(pushes)})
        add_hook(anatomy(checkpoint.model), push.site, push)
        return checkpoint

    @classmethod
    def restore_runtime(cls, part: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Steer a model that was just loaded."""
        attachment = checkpoint.attachments.get(SLUG)
        if attachment is None or len(attachment.about["pushes"]) != part["count"]:
            raise IntaglioError(f"{checkpoint.source} is steered, and its attachments/{SLUG}.safetensors is missing")
        parts = anatomy(checkpoint.model)
        for index, settings in enumerate(attachment.about["pushes"]):
            tensors = {
                key.removeprefix(f"{index}:"): tensor
                for key, tensor in attachment.tensors.items()
                if key.startswith(f"{index}:")
            }
            push = Push.from_settings(settings, tensors)
            add_hook(parts, push.site, push)


class Push:
    """Addition of one step to a site.

    Args:
        site: what is steered.
        row_D: the feature's decoder row.
        amount: code that is added, or that replaces the feature's code.
        encoder: (clamp) gives the feature's code. Default None: the row is added.
        feature: (clamp) index of the feature.
    """

    def __init__(
        self, site: Site, row_D: Tensor, amount: float, encoder: SparseDictionary | None = None, feature: int = 0
    ) -> None:
        self.site, self.row_D, self.amount, self.encoder, self.feature = site, row_D, amount, encoder, feature

    @classmethod
    def from_feature(cls, dictionary: SparseDictionary, feature: int, amount: float, mode: str = "add") -> Push:
        """Return the push of a feature of a dictionary with a known site."""
        assert dictionary.site is not None
        row_D = dictionary.decoder_MD[feature].clone()
        return cls(dictionary.site, row_D, amount, dictionary if mode == "clamp" else None, feature)

    def __call__(self, x_BLD: Tensor) -> Tensor:
        """Return the steered activations."""
        if self.row_D.device != x_BLD.device:
            self.row_D = self.row_D.to(x_BLD.device)
            self.encoder = None if self.encoder is None else self.encoder.to(x_BLD.device)
        if self.encoder is None:
            return x_BLD + (self.amount * self.row_D).to(x_BLD.dtype)
        missing_BL = self.amount - self.encoder.encode(x_BLD)[..., self.feature]
        return x_BLD + (missing_BL[..., None] * self.row_D).to(x_BLD.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of its tensors."""
        own = {"row": self.row_D} | ({} if self.encoder is None else self.encoder.tensors)
        return {name: tensor.detach().cpu().clone() for name, tensor in own.items()}

    def settings(self) -> dict[str, Any]:
        """Return everything else as plain data."""
        encoder = None if self.encoder is None else replace(self.encoder, about={}).settings()
        return {"site": asdict(self.site), "amount": self.amount, "encoder": encoder, "feature": self.feature}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Push:
        """Return the push of `settings` and `tensors`."""
        own = dict(tensors)
        row_D, encoder = own.pop("row"), settings["encoder"]
        dictionary = None if encoder is None else SparseDictionary.from_parts(encoder, own)
        return cls(Site(**settings["site"]), row_D, settings["amount"], dictionary, settings["feature"])
