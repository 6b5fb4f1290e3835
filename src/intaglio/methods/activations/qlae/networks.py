"""Encoders and decoders of images: convolutions with a StyleGAN-like decoder, a smaller pair, and perceptrons.

Dimension letters: B rows, C channels, H and W pixels, I inputs of a latent space, F features.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from intaglio.errors import IntaglioError

NetworkName = Literal["conv", "conv_small", "dense"]
Shape = tuple[int, int, int]
SMALLEST = 4
"""Pixels of a side at which convolutions stop: instance norm of a single pixel is zero."""


class Encoder(nn.Module):
    """Image to features, and features to the inputs of a latent space by a linear head.

    Args:
        name: `conv` (three layers for each halving of the side, 32 to 256 channels), `conv_small` (one, 64 to 512
            channels) or `dense`.
        shape: C, H, W.
        inputs: I.
        width: F under `dense` (two layers); 256 and 512 in the others, as in the official code. Default 256.
    """

    def __init__(self, name: NetworkName, shape: Shape, inputs: int, width: int = 256) -> None:
        super().__init__()
        self.body, self.map_shape, count = _encoder_body(name, shape)
        sizes = {"conv": [256, 256], "conv_small": [512], "dense": [width, width]}[name]
        self.dense = _dense(count, sizes)
        self.features = sizes[-1]
        self.head = nn.Linear(self.features, inputs)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the latent space [B, I] and the features [B, F]."""
        features_BF = self.dense(self.body(image_BCHW))
        return self.head(features_BF), features_BF


class Decoder(nn.Module):
    """Latents to logits of an image.

    Under `conv` a learned constant map passes through transposed convolutions; after each of them instance norm, and a
    scale and a shift read from the latents by a dense layer with ReLU, so that scales are never negative.
    """

    def __init__(
        self, name: NetworkName, shape: Shape, inputs: int, map_shape: tuple[int, int], width: int = 256
    ) -> None:
        super().__init__()
        self.shape = shape
        if name == "dense":
            self.body: nn.Module = nn.Sequential(_dense(inputs, [width, width]), nn.Linear(width, math.prod(shape)))
            return
        sizes = [256, 256] if name == "conv" else [512]
        layers = _layers(name, shape)
        widths = [256 if name == "conv" else 512, *(layer[0] for layer in reversed(layers))]
        self.body = _StyleDecoder(inputs, sizes, widths, [layer[1:] for layer in _upwards(name, layers)], map_shape)
        self.last = nn.Conv2d(widths[-1], shape[0], 3, padding=1, bias=False)

    def forward(self, z_BI: Tensor) -> Tensor:
        """Return logits [B, C, H, W]."""
        out: Tensor = self.body(z_BI)
        return out.unflatten(1, self.shape) if out.ndim == 2 else self.last(out)


class _StyleDecoder(nn.Module):
    def __init__(
        self,
        inputs: int,
        sizes: list[int],
        widths: list[int],
        kernels: list[tuple[int, int]],
        map_shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.dense = _dense(inputs, sizes)
        self.map = nn.Parameter(0.1 * torch.ones(1, widths[0], *map_shape))
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel, stride, padding=1, bias=False)
            for before, after, (kernel, stride) in zip(widths, widths[1:], kernels, strict=False)
        )
        self.styles = nn.ModuleList(nn.Linear(sizes[-1], 2 * after) for after in widths[1:])

    def forward(self, z_BI: Tensor) -> Tensor:
        w_BF = self.dense(z_BI)
        x_BCHW = self.map.expand(len(z_BI), -1, -1, -1)
        for convolution, style in zip(self.convolutions, self.styles, strict=True):
            x_BCHW = nn.functional.leaky_relu(convolution(x_BCHW))
            x_BCHW = nn.functional.instance_norm(x_BCHW, eps=1e-6)
            scale_BC, shift_BC = style(w_BF).relu().chunk(2, dim=1)
            x_BCHW = x_BCHW * scale_BC[..., None, None] + shift_BC[..., None, None]
        return x_BCHW


class Critic(nn.Module):
    """Encoder of an adversarial model: its features also give a value, by a linear layer."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.value = nn.Linear(encoder.features, 1)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the latent space [B, I] and the value of each image [B]."""
        x_BI, features_BF = self.encoder(image_BCHW)
        return x_BI, self.value(features_BF)[:, 0]


def _dense(inputs: int, sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *sizes], sizes, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def _layers(name: NetworkName, shape: Shape) -> list[tuple[int, int, int]]:
    """Return channels, kernel and stride of the encoder's convolutions."""
    side = shape[1]
    if shape[2] != side or side < 2 * SMALLEST or side & (side - 1):
        raise IntaglioError(
            f"the images have {shape[1]} x {shape[2]} pixels; {name} needs squares of {2 * SMALLEST}, 16, 32, ... "
            "(network: dense takes any)"
        )
    stages = int(math.log2(side // SMALLEST))
    if name == "conv_small":
        return [(min(64 << stage, 512), 4, 2) for stage in range(stages)]
    return [(min(32 << stage, 256), *kernel) for stage in range(stages) for kernel in ((3, 1), (3, 1), (4, 2))]


def _upwards(name: NetworkName, layers: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the decoder's layers: the stages in reverse, each with its stride last, as in the official configs."""
    step = 3 if name == "conv" else 1
    stages = [layers[start : start + step] for start in range(0, len(layers), step)]
    return [layer for stage in reversed(stages) for layer in stage]


def _encoder_body(name: NetworkName, shape: Shape) -> tuple[nn.Module, tuple[int, int], int]:
    """Return the layers before the dense ones, the size of their last map, and the number of their outputs."""
    if name == "dense":
        return nn.Flatten(), (0, 0), math.prod(shape)
    modules: list[nn.Module] = []
    before = shape[0]
    for channels, kernel, stride in _layers(name, shape):
        modules += [
            nn.Conv2d(before, channels, kernel, stride, padding=1, bias=False),
            nn.InstanceNorm2d(channels, affine=True),
            nn.LeakyReLU(),
        ]
        before = channels
    return nn.Sequential(*modules, nn.Flatten()), (SMALLEST, SMALLEST), before * SMALLEST**2
