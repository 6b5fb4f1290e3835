"""Dual vision encoder of POINTS: features of two encoders fused by a weighted mean, shuffled to fewer, wider tokens.

Dimension letters: B tiles, T tokens of a tile (a square grid), D width of a token, O width of the language model, C
channels, H and W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from intaglio.errors import IntaglioError


def pixel_shuffle(features_BTD: Tensor, factor: int = 2) -> Tensor:
    """Return tokens of `factor` x `factor` neighbours each, their features side by side: space to depth.

    A permutation: 576 x 1,024 becomes 144 x 4,096 with the same sum of squares.

    Args:
        features_BTD: tokens of square grids, row by row.
        factor: tokens of a side that are joined. Default 2, a scale of 0.5 per side.

    Returns:
        [B, T / factor^2, D factor^2], row by row.

    Raises:
        IntaglioError: the tokens form no square grid, or the factor does not divide its side.
    """
    tiles, tokens, width = features_BTD.shape
    side = math.isqrt(tokens)
    if side * side != tokens or side % factor:
        raise IntaglioError(f"{tokens} tokens form no square grid whose side {factor} divides")
    grid = features_BTD.reshape(tiles, side // factor, factor, side // factor, factor, width)
    return grid.transpose(2, 3).reshape(tiles, tokens // factor**2, width * factor**2)


class DualEncoder(nn.Module):
    """Two stock vision encoders, fused, shuffled and projected into the token space of a language model.

        F = alpha F_general + (1 - alpha) F_ocr,    tokens = W_2 gelu(W_1 pixel_shuffle(F))

    F are patch features of the penultimate layer, without the class token. In POINTS both encoders are CLIP
    ViT-L/14-336, the second trained on text in images. The fusion weight is in neither paper nor code.

    Args:
        general: a vision encoder of transformers, such as `CLIPVisionModel`.
        ocr: another one with features of the same shape.
        hidden_size: width O of the language model.
        fusion_weight: alpha, from 0 to 1. Default 0.5.
        factor: of `pixel_shuffle`. Default 2.
        layer: index of the hidden states that are taken. Default -2, the penultimate.

    Raises:
        IntaglioError: the fusion weight is not from 0 to 1, or the encoders differ in width.

    Source: Liu et al., POINTS, arXiv 2409.04828, section 3.1.
    """

    def __init__(
        self,
        general: nn.Module,
        ocr: nn.Module,
        hidden_size: int,
        fusion_weight: float = 0.5,
        factor: int = 2,
        layer: int = -2,
    ) -> None:
        super().__init__()
        if not 0 <= fusion_weight <= 1:
            raise IntaglioError(f"fusion_weight is {fusion_weight}; a number from 0 to 1 is accepted")
        width, other = (int(encoder.config.hidden_size) for encoder in (general, ocr))  # type: ignore[union-attr, arg-type]
        if width != other:
            raise IntaglioError(f"the encoders' hidden sizes are {width} and {other}; equal ones are accepted")
        self.general, self.ocr = general, ocr
        self.fusion_weight, self.factor, self.layer = fusion_weight, factor, layer
        inner = width * factor**2
        self.projector = nn.Sequential(nn.Linear(inner, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the fused patch features [B, T, D]."""
        general_BTD, ocr_BTD = (self._patches(encoder, pixels_BCHW) for encoder in (self.general, self.ocr))
        return torch.lerp(ocr_BTD, general_BTD, self.fusion_weight)

    def _patches(self, encoder: nn.Module, pixels_BCHW: Tensor) -> Tensor:
        states_BTD: Tensor = encoder(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[self.layer]
        # A class token comes first where the grid of patches leaves one over.
        return states_BTD[:, states_BTD.shape[1] - math.isqrt(states_BTD.shape[1]) ** 2 :]

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens of the language model, [B, T / factor^2, O]."""
        tokens_BTO: Tensor = self.projector(pixel_shuffle(self.features(pixels_BCHW), self.factor))
        return tokens_BTO
