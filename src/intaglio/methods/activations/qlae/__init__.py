"""QLAE (Hsu et al., NeurIPS 2023): an autoencoder with a scalar codebook for each latent and high weight decay.

    model = intaglio.QLAE(num_latents=12).fit(images)          # images [N, C, H, W], 0 to 1
    codes = model.encode(images)                               # int64 [N, 12]
    infomec(sources, codes.numpy(), discrete=True)             # intaglio.measures.infomec
    QLAE.gan(num_latents=12).fit(images)                       # QLInfoWGAN-GP

- `latents.py`: the latent spaces; `networks.py`: encoders, decoders, the critic
- `training.py`: losses, parameter groups and loops
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from intaglio import atomic_io
from intaglio.checkpoint.attachments import decode_metadata, encode_metadata
from intaglio.errors import IntaglioError, shorten
from intaglio.methods.activations.qlae.latents import (
    Continuous,
    Latent,
    LatentName,
    ScalarQuantizer,
    VectorQuantizer,
)
from intaglio.methods.activations.qlae.networks import Critic, Decoder, Encoder, NetworkName, Shape
from intaglio.methods.activations.qlae.training import (
    Autoencoder,
    Losses,
    qlae_loss,
    train_autoencoder,
    train_info_gan,
)
from intaglio.methods.base import Method, Progress, no_progress
from intaglio.trainer.rng import generator


class QLAE(Method, slug="qlae"):
    """Quantized-latent autoencoder: each latent takes few values, and weights decay strongly.

        idx_j = argmin_k |x_j - v_{j,k}|,   q_j = v_{j, idx_j},   hat_j = x_j + stopgrad(q_j - x_j)
        L = BCE(decoder(hat), image) + 0.01 mean (stopgrad(x) - q)² + 0.01 mean (x - stopgrad(q))²

    BCE is a mean over pixels. AdamW decays the weights of encoder and decoder; biases and codebooks have no decay.

    Args:
        latent: `scalar` (default), `global` (one codebook for all latents), `vector` (VQ-VAE's) or `continuous` (none).
        num_latents: latents Z; the paper takes twice the number of sources. Default 10.
        num_values: values V of a codebook, or one number for each latent. Default 10.
        value_limit: last value of a new scalar codebook, whose first is its negative. Default 0.5.
        learn_values: whether scalar codebooks are trained. Default true.
        vector_dim: width of a latent under `vector`. Default 8.
        network: `conv` (default), `conv_small` (squares of 8, 16, 32, ... pixels) or `dense`.
        width: hidden width under `dense`. Default 256.
        training: `autoencoder` (default), or `gan` (QLInfoWGAN-GP): a generator, and a critic that reads its latents.
        quantization_weight: weight of the loss that moves the codebooks. Default 0.01.
        commitment_weight: weight of the loss that moves the encoder. Default 0.01.
        weight_decay: decoupled, of the weights. Each step multiplies them by 1 - learning_rate * weight_decay; the
            paper's run has 20 e-foldings, so shorter ones need more. Default 0.1.
        learning_rate: of Adam. Default 1e-3.
        clip: largest absolute value of an element of the decayed weights' gradients; 0: none. Default 1.
        steps: optimizer steps; of the critic under `gan`. Default 200,000.
        batch_size: images of a step. Default 128.
        latent_weight: (gan) of the squared error of recovered latents. Default 200.
        gradient_weight: (gan) of the gradient penalty. Default 10.
        generator_period: (gan) steps of the critic for one of the generator. Default 5.

    Raises:
        IntaglioError: (in `fit`) images that are not [N, C, H, W] from 0 to 1, or of a size that does not fit.

    Source: Hsu et al., Disentanglement via Latent Quantization, NeurIPS 2023, section 3, and its code.
    """

    kinds = ("autoencoder",)
    summary = "autoencodes images into latents of few values each, for disentangled factors"
    citation = "Hsu et al., Disentanglement via Latent Quantization, NeurIPS 2023"
    url = "https://arxiv.org/abs/2305.18378"

    FORMAT: ClassVar[str] = "qlae"

    latent: LatentName = "scalar"
    num_latents: Annotated[int, Field(ge=1)] = 10
    num_values: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = 10
    value_limit: Annotated[float, Field(gt=0)] = 0.5
    learn_values: bool = True
    vector_dim: Annotated[int, Field(ge=1)] = 8
    network: NetworkName = "conv"
    width: Annotated[int, Field(ge=1)] = 256
    training: Literal["autoencoder", "gan"] = "autoencoder"
    quantization_weight: Annotated[float, Field(ge=0)] = 0.01
    commitment_weight: Annotated[float, Field(ge=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    clip: Annotated[float, Field(ge=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 200_000
    batch_size: Annotated[int, Field(ge=1)] = 128
    latent_weight: Annotated[float, Field(ge=0)] = 200.0
    gradient_weight: Annotated[float, Field(ge=0)] = 10.0
    generator_period: Annotated[int, Field(ge=1)] = 5

    @model_validator(mode="after")
    def _fits(self) -> Self:
        counts = self.num_values
        if isinstance(counts, list) and (self.latent != "scalar" or len(counts) != self.num_latents):
            raise ValueError(
                f"num_values has {len(counts)} numbers; one for each of the {self.num_latents} latents is accepted, "
                "under latent: scalar"
            )
        return self

    @classmethod
    def gan(cls, **overrides: Any) -> Self:
        """Return QLInfoWGAN-GP with the official settings."""
        given = {"training": "gan", "learning_rate": 2e-4, "weight_decay": 1e-4, "batch_size": 64}
        return cls(**{**given, **overrides})

    # --- model ------------------------------------------------------------------------------------------------------

    def make_latent(self, seed: int = 0) -> Latent:
        """Return a new latent space."""
        if self.latent == "continuous":
            return Continuous(self.num_latents)
        if self.latent == "vector":
            assert isinstance(self.num_values, int)
            return VectorQuantizer(self.num_latents, self.num_values, self.vector_dim, generator(seed, "codebook"))
        limits = (-self.value_limit, self.value_limit)
        shared = self.latent == "global"
        return ScalarQuantizer(self.num_latents, self.num_values, limits, self.learn_values, shared)

    def make(self, shape: Shape, seed: int = 0) -> Autoencoder:
        """Return an untrained model of images [C, H, W]; with `training: gan` its encoder is a `Critic`.

        Raises:
            IntaglioError: the network does not take images of this size.
        """
        latent = self.make_latent(seed)

        def networks() -> tuple[nn.Module, nn.Module]:
            encoder = Encoder(self.network, shape, latent.inputs, self.width)
            decoder = Decoder(self.network, shape, latent.inputs, encoder.map_shape, self.width)
            return Critic(encoder) if self.training == "gan" else encoder, decoder

        encoder, decoder = seeded(seed, networks)
        return Autoencoder(encoder, latent, decoder)

    def loss(self, model: Autoencoder, images: Tensor) -> Losses:
        """Return the autoencoder's loss and its parts."""
        return qlae_loss(model, images, self.quantization_weight, self.commitment_weight)

    def fit(self, images: Tensor, *, seed: int = 0, progress: Progress = no_progress) -> Autoencoder:
        """Train a new model on images and return it, in evaluation mode.

        Args:
            images: float [N, C, H, W], 0 to 1; on the device to train on.
            seed: of weights, batches and sampled latents. Default 0.
            progress: called now and then.

        Raises:
            IntaglioError: see the class.
        """
        self.check_images(images)
        model = self.make((images.shape[1], images.shape[2], images.shape[3]), seed).to(images.device)
        names = ["steps", "batch_size", "learning_rate", "weight_decay", "clip"]
        if self.training == "gan":
            names += ["latent_weight", "gradient_weight", "generator_period"]
            names += ["quantization_weight", "commitment_weight"]
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        settings |= {"seed": seed, "progress": progress}
        if self.training == "gan":
            model.losses = train_info_gan(model, images, **settings)
        else:
            model.losses = train_autoencoder(model, images, self.loss, **settings)
        return model.eval()

    @staticmethod
    def check_images(images: Tensor) -> None:
        """Refuse what is no batch of images from 0 to 1."""
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise IntaglioError(
                f"the images are {images.dtype} {list(images.shape)}; float [N, C, H, W] with at least one is accepted"
            )
        low, high = float(images.min()), float(images.max())
        if not 0 <= low <= high <= 1:
            raise IntaglioError(f"the images have values from {low:g} to {high:g}; 0 to 1 is accepted")

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, model: Autoencoder, path: str | os.PathLike[str]) -> Path:
        """Write a trained model to a safetensors file, with these hyperparameters."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        about = {"format": self.FORMAT, "shape": list(_shape(model)), "parameters": self.model_dump()}
        atomic_io.write_bytes(path, save(tensors, encode_metadata(about)))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Self, Autoencoder]:
        """Return the method and the trained model of a file.

        Raises:
            IntaglioError: it cannot be read, or is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = decode_metadata(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise IntaglioError(f"cannot read the model {os.fspath(path)}: {shorten(str(error))}") from None
        if about.get("format") != cls.FORMAT:
            raise IntaglioError(f"{os.fspath(path)} is not a model that QLAE.save has written")
        try:
            method = cls(**about["parameters"])
            channels, height, width = about["shape"]
            model = method.make((channels, height, width))
            model.load_state_dict(tensors)
        except (KeyError, ValueError, RuntimeError):
            raise IntaglioError(
                f"the model {os.fspath(path)} is damaged: its tensors and hyperparameters do not belong together"
            ) from None
        return method, model.eval()


def _shape(model: Autoencoder) -> Iterable[int]:
    shape: Iterable[int] = model.decoder.shape  # type: ignore[assignment]
    return shape


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Return what `build` makes with torch's global generator seeded, and leave that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


__all__ = ["QLAE", "Autoencoder", "qlae_loss"]
