"""Dynamic mixing of images: each image gives the blocks in which the network's gradient is larger.

PuzzleMix (Kim et al., ICML 2020) without its transport and smoothness terms: an image's saliency is the norm of the
loss's gradient over the channels, averaged over blocks; of the blocks, the partner gives those with the largest
difference of saliencies, as many as its share. It costs one more forward and backward pass a step.

Dimension letters: B rows, C channels, H and W pixels, S blocks a side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.trainer.mixing import Mix, Mixing, MixingSession, mixed_inputs
from intaglio.trainer.protocols import Batch, TrainingRun
from intaglio.trainer.shown_examples import PIXELS


class SaliencyMix(Mixing, slug="saliency_mix"):
    """Mixing by saliency. `blocks`: blocks of a side."""

    blocks: int = 4

    def attach(self, run: TrainingRun) -> SaliencySession:
        """Begin mixing."""
        return SaliencySession(self, run)


class SaliencySession(MixingSession):
    """Saliency mixing at work."""

    def __init__(self, method: SaliencyMix, run: TrainingRun) -> None:
        super().__init__(run, method.slug)
        self.method = method

    def change_batch(self, model: nn.Module, batch: Batch) -> Batch:
        """Return the mixed batch."""
        self.mix, self.unmixed = None, batch
        drawn = self.method.draw(len(batch["labels"]), self.rng(batch))
        if drawn is None:
            return batch
        pasted_BHW = self._pasted(batch, drawn)
        area_B = pasted_BHW.float().mean((1, 2))
        self.mix = Mix(drawn.rows_BK, torch.stack([1 - area_B, area_B], 1), pasted_BHW)
        changed: dict[str, Any] = mixed_inputs(batch, self.mix)
        return {**changed, "targets": self.targets(model, batch, self.mix)}

    def _pasted(self, batch: Batch, mix: Mix) -> Tensor:
        """Return the pixels that come from the partner, bool [B, H, W]."""
        pixels_BCHW = batch[PIXELS].detach().requires_grad_()
        rows = {name: value for name, value in batch.items() if name != "id"}
        with torch.enable_grad():
            (gradient_BCHW,) = torch.autograd.grad(self.run.loss({**rows, PIXELS: pixels_BCHW}).total, pixels_BCHW)
        side = self.method.blocks
        salient_BSS = F.adaptive_avg_pool2d(gradient_BCHW.norm(dim=1, keepdim=True), side)[:, 0]
        salient_BSS = salient_BSS / salient_BSS.sum((1, 2), keepdim=True).clamp(min=1e-12)
        gain_BS = (salient_BSS[mix.rows_BK[:, 1]] - salient_BSS).flatten(1)
        count_B = (mix.shares_BK[:, 1] * side**2).round()
        rank_BS = gain_BS.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen_BSS = (rank_BS < count_B[:, None]).reshape(-1, 1, side, side).float()
        return F.interpolate(chosen_BSS, size=pixels_BCHW.shape[-2:], mode="nearest")[:, 0].bool()
