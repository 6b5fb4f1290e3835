"""Steering: a feature of a dictionary added to a model's activations, as a runtime step of a recipe.

    - steer: {feature: 123, scale: 2}

Dimension letters: B batch, L sequence, D width, M latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.sources import find_dictionary
from intaglio.errors import IntaglioError
from intaglio.methods.base import Cost, Method, ModelAspect, Progress, Workload, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import add_hook

SLUG = "steer"


class Steer(Method, slug=SLUG):
    """Add a feature of a dictionary to a model's activations, as a recipe step.

        add      x + s m_f w_f              at every token
        clamp    x + (s m_f - z_f(x)) w_f   so that the code of the feature is s m_f

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
        if self.feature >= dictionary.width:
            raise IntaglioError(f"feature is {self.feature}; {name} has the features 0 to {dictionary.width - 1}")
        if dictionary.site is None:
            raise IntaglioError(f"{name} does not name the activation that it was trained on, so it cannot steer")
        highest = dictionary.about.get("max_activation")
        strength = 1.0 if highest is None else float(highest[self.feature])
        if strength == 0:
            raise IntaglioError(f"feature {self.feature} of {name} fired for no held-out token, so it has no strength")
        push = Push(dictionary, self.feature, self.scale * strength, self.mode)
        earlier = checkpoint.attachments.get(SLUG)
        tensors = {} if earlier is None else dict(earlier.tensors)
        pushes = [] if earlier is None else list(earlier.about["pushes"])
        tensors |= {f"{len(pushes)}:{key}": tensor.cpu() for key, tensor in push.tensors().items()}
        pushes.append(push.settings())
        chosen = {"dictionary": name, "site": dictionary.site.name, "strength": strength}
        checkpoint.record_step(self.slug, self.model_dump(), chosen=chosen)
        checkpoint.attach(SLUG, tensors, self.model_dump(), {"pushes": pushes})
        checkpoint.set_runtime_state(SLUG, {"count": len(pushes)})
        add_hook(anatomy(checkpoint.model), dictionary.site, push)
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
            assert push.dictionary.site is not None
            add_hook(parts, push.dictionary.site, push)


class Push:
    """What one step adds to a site.

    Args:
        dictionary: of the feature.
        feature: its index.
        amount: code that is added, or that the feature's code becomes.
        mode: `add` or `clamp`.
    """

    def __init__(self, dictionary: SparseDictionary, feature: int, amount: float, mode: str) -> None:
        self.dictionary, self.feature, self.amount, self.mode = dictionary, feature, amount, mode

    def __call__(self, x_BLD: Tensor) -> Tensor:
        """Return the steered activations."""
        if self.dictionary.decoder_MD.device != x_BLD.device:
            self.dictionary = self.dictionary.to(x_BLD.device)
        row_D = self.dictionary.decoder_MD[self.feature]
        if self.mode == "add":
            return x_BLD + (self.amount * row_D).to(x_BLD.dtype)
        missing_BL = self.amount - self.dictionary.encode(x_BLD)[..., self.feature]
        return x_BLD + (missing_BL[..., None] * row_D).to(x_BLD.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the dictionary's tensors."""
        return self.dictionary.tensors

    def settings(self) -> dict[str, Any]:
        """Return everything else as plain data."""
        about = replace(self.dictionary, about={}).settings()
        return {"feature": self.feature, "amount": self.amount, "mode": self.mode, "dictionary": about}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> Push:
        """Return the push of `settings` and `tensors`."""
        dictionary = SparseDictionary.from_parts(settings["dictionary"], tensors)
        return cls(dictionary, settings["feature"], settings["amount"], settings["mode"])
