"""Dictionaries at inference: encoding and decoding, and sae_lens's files.

    DIR/cfg.json, DIR/sae_weights.safetensors

Dimension letters: N activations, D width, M latents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from intaglio import atomic_io
from intaglio.errors import IntaglioError, did_you_mean, first_line
from intaglio.modeling.sites import Site

Architecture = Literal["standard", "topk", "gated", "jumprelu"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SHAPES = {"W_enc": "DM", "W_dec": "MD", "b_dec": "D"}
_OWN: dict[Architecture, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
}
"""Tensors [M] of each architecture beside `W_enc`, `W_dec` and `b_dec`."""


@runtime_checkable
class Dictionary(Protocol):
    """Codes of activations: `x ≈ decode(encode(x))`, where few codes are not zero."""

    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the codes [N, M]."""
        ...

    def decode(self, codes_NM: Tensor) -> Tensor:
        """Return the reconstructions [N, D]."""
        ...


@dataclass(frozen=True, eq=False)
class SparseDictionary:
    """A trained sparse autoencoder in one of sae_lens's four forms.

    With p = (x - b_dec) W_enc + b:

        standard    z = ReLU(p)
        topk        z = ReLU(p) at the k largest p, else 0
        jumprelu    z = ReLU(p) where p > threshold, else 0
        gated       z = ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag) where (x - b_dec) W_enc + b_gate > 0, else 0
        x̂ = z W_dec + b_dec

    Args:
        architecture: one of the four.
        tensors: float32 `W_enc` [D, M], `W_dec` [M, D], `b_dec` [D], and [M]: `b_enc`; `threshold`; or `b_gate`,
            `b_mag`, `r_mag`.
        k: (topk) active latents of an input. Default 0.
        site: activation that it was trained on. Default None: unknown.
        subtracts: whether b_dec is subtracted from inputs. Default true.
        about: measurements of the fit, such as `max_activation`, and the model it belongs to.

    Raises:
        IntaglioError: a tensor is missing, has another shape or holds NaN.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    k: int = 0
    site: Site | None = None
    subtracts: bool = True
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in _OWN:
            raise IntaglioError(f"architecture is {self.architecture!r}; {did_you_mean(str(self.architecture), _OWN)}")
        shapes = _SHAPES | dict.fromkeys(_OWN[self.architecture], "M")
        encoder = self.tensors.get("W_enc")
        if encoder is None or encoder.dim() != 2:
            raise IntaglioError("the dictionary has no matrix W_enc")
        sizes = dict(zip("DM", encoder.shape, strict=True))
        for name, letters in shapes.items():
            tensor, expected = self.tensors.get(name), tuple(sizes[letter] for letter in letters)
            if tensor is None or tuple(tensor.shape) != expected:
                there = "missing" if tensor is None else list(tensor.shape)
                raise IntaglioError(f"the tensor {name} of the dictionary is {there}; {list(expected)} is expected")
            if not torch.isfinite(tensor).all():
                raise IntaglioError(f"the tensor {name} of the dictionary holds NaN or infinite values")
        if self.architecture == "topk" and not (isinstance(self.k, int) and 1 <= self.k <= self.width):
            raise IntaglioError(f"k of the dictionary is {self.k!r}; 1 to {self.width} latents is accepted")

    @property
    def inputs(self) -> int:
        """Width of the activations D."""
        return int(self.tensors["W_enc"].shape[0])

    @property
    def width(self) -> int:
        """Number of latents M."""
        return int(self.tensors["W_enc"].shape[1])

    @property
    def decoder_MD(self) -> Tensor:
        """The directions that latents add."""
        return self.tensors["W_dec"]

    def to(self, device: torch.device) -> SparseDictionary:
        """Return it with its tensors on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        """Return the codes [..., M] of activations [..., D], in float32.

        Raises:
            IntaglioError: the activations have another width.
        """
        if x_ND.shape[-1] != self.inputs:
            raise IntaglioError(
                f"the activations have the width {x_ND.shape[-1]}, the dictionary was trained on {self.inputs}"
            )
        t = self.tensors
        x_ND = x_ND.float()
        projected_NM = (x_ND - t["b_dec"] if self.subtracts else x_ND) @ t["W_enc"]
        if self.architecture == "gated":
            magnitude_NM = torch.relu(projected_NM * t["r_mag"].exp() + t["b_mag"])
            return magnitude_NM * (projected_NM + t["b_gate"] > 0)
        pre_NM = projected_NM + t["b_enc"]
        if self.architecture == "standard":
            return torch.relu(pre_NM)
        if self.architecture == "jumprelu":
            return torch.relu(pre_NM) * (pre_NM > t["threshold"])
        values, latents = pre_NM.topk(self.k, dim=-1)
        return torch.zeros_like(pre_NM).scatter_(-1, latents, torch.relu(values))

    @torch.no_grad()
    def decode(self, codes_NM: Tensor) -> Tensor:
        """Return the reconstructions [..., D] of codes [..., M]."""
        return codes_NM.float() @ self.tensors["W_dec"] + self.tensors["b_dec"]

    # --- files ------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Return what the tensors do not hold, as plain data; `from_parts` reads it."""
        return {
            "architecture": self.architecture,
            "k": self.k,
            "site": None if self.site is None else asdict(self.site),
            "subtracts": self.subtracts,
            "about": self.about,
        }

    @classmethod
    def from_parts(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> SparseDictionary:
        """Return the dictionary of `settings` and its tensors."""
        site = settings["site"]
        return cls(**{**settings, "site": None if site is None else Site(**site)}, tensors=tensors)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a directory that `sae_lens.SAE.load_from_disk` reads, atomically.

        Args:
            path: the directory to make.
            overwrite: replace an existing directory. Default False.

        Raises:
            IntaglioError: it exists or cannot be written.
        """
        metadata = {"intaglio": self.settings()}
        if self.site is not None and self.site.part == "residual":
            metadata |= {"hook_name": f"blocks.{self.site.layer}.hook_resid_post"}  # type: ignore[dict-item]
        if "model" in self.about:
            metadata["model_name"] = self.about["model"]
        config: dict[str, Any] = {
            "architecture": self.architecture,
            "d_in": self.inputs,
            "d_sae": self.width,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.subtracts,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": metadata,
        }
        if self.architecture == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        with atomic_io.directory(path, overwrite) as temporary:
            (temporary / CONFIG).write_text(atomic_io.to_json(config), encoding="utf-8")
            tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, temporary / WEIGHTS)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDictionary:
        """Read a directory of `save` or of sae_lens.

        Args:
            path: a directory with `cfg.json` and `sae_weights.safetensors`.

        Raises:
            IntaglioError: it is incomplete or damaged, or its architecture or normalisation is not one of those above.
        """
        folder = Path(path)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise IntaglioError(f"{folder} is no dictionary ({CONFIG} and {WEIGHTS} of sae_lens): {error}") from error
        metadata = (config.get("metadata") or {}) if isinstance(config, dict) else None
        if not isinstance(metadata, dict):
            raise IntaglioError(f"{folder / CONFIG} is no configuration of sae_lens")
        refused = {
            "architecture": (config.get("architecture"), get_args(Architecture)),
            "normalize_activations": (config.get("normalize_activations", "none"), ("none",)),
            "reshape_activations": (config.get("reshape_activations", "none"), ("none",)),
            "rescale_acts_by_decoder_norm": (config.get("rescale_acts_by_decoder_norm", False), (False,)),
        }
        for name, (value, accepted) in refused.items():
            if value not in accepted:
                names = ", ".join(map(str, accepted))
                raise IntaglioError(f"{name} of {folder / CONFIG} is {value!r}; accepted: {names}")
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        own = metadata.get("intaglio")
        if own is None:
            return cls(
                config["architecture"],
                tensors,
                k=config.get("k", 0) if config["architecture"] == "topk" else 0,
                site=_site_of(str(metadata.get("hook_name") or config.get("hook_name") or "")),
                subtracts=bool(config.get("apply_b_dec_to_input", True)),
            )
        try:
            return cls.from_parts(own, tensors)
        except (KeyError, TypeError) as error:
            raise IntaglioError(f"metadata.intaglio of {folder / CONFIG} is damaged: {first_line(error)}") from error


def _site_of(hook: str) -> Site | None:
    """Return the site of a hook of TransformerLens (`blocks.5.hook_resid_post`), None for other hooks."""
    words = hook.split(".")
    if len(words) == 3 and words[0] == "blocks" and words[1].isdigit() and words[2] == "hook_resid_post":
        return Site(int(words[1]))
    return None
