"""Mixed batches and losses of timm and torchvision: `worker_mixing.py INPUTS OUTPUTS`.

timm pairs row n with row B - 1 - n, torchvision with row n - 1; each mixes the batch of the file once a kind.

Dimension letters: B rows, C classes, H and W pixels.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

SMOOTHING, REPEATS = 0.1, 50


def main() -> None:
    """Mix the batch by each peer, and save inputs, targets and losses of the given logits."""
    torch.set_num_threads(1)
    given = load_file(sys.argv[1])
    pixels_BCHW, labels_B, logits_BC = given["pixels"], given["labels"], given["logits"]
    classes, results = logits_BC.shape[1], {}
    losses = {"cross": SoftTargetCrossEntropy(), "binary": BinaryCrossEntropy(smoothing=0.0, sum_classes=True)}
    for name, options in (("mixup", {"mixup_alpha": 1.0}), ("cutmix", {"mixup_alpha": 0.0, "cutmix_alpha": 1.0})):
        np.random.seed(1)
        torch.manual_seed(1)
        for smoothing in (0.0, SMOOTHING):
            peer = Mixup(label_smoothing=smoothing, num_classes=classes, **options)
            np.random.seed(1)
            mixed, targets_BC = peer(pixels_BCHW.clone(), labels_B)
            key = f"timm.{name}" + (".smooth" if smoothing else "")
            results |= {f"{key}.pixels": mixed, f"{key}.targets": targets_BC.float()}
            results |= {f"{key}.{loss}": f(logits_BC, targets_BC.float()) for loss, f in losses.items()}
        vision = (v2.MixUp if name == "mixup" else v2.CutMix)(alpha=1.0, num_classes=classes)
        mixed, targets_BC = vision(pixels_BCHW, labels_B)
        results |= {f"torchvision.{name}.pixels": mixed, f"torchvision.{name}.targets": targets_BC.float()}
        results[f"torchvision.{name}.cross"] = F.cross_entropy(logits_BC, targets_BC.float())
    peer = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=classes)
    start = time.perf_counter()
    for _ in range(REPEATS):
        mixed, targets_BC = peer(pixels_BCHW.clone(), labels_B)
        losses["cross"](logits_BC, targets_BC)
    results["seconds"] = torch.tensor((time.perf_counter() - start) / REPEATS)
    tensors: dict[str, Tensor] = {name: value.detach().contiguous() for name, value in results.items()}
    save_file(tensors, sys.argv[2])


if __name__ == "__main__":
    main()
