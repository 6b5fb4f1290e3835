"""One pruner, one network, one line of JSON: processor milliseconds of a step and of making the mask, peak memory.

    python benchmarks/bip/worker.py --side ours --size small

`ours`: a step of the weights under BiP's mask (one pass); `ours-bip`: a whole iteration (two passes);
`torch`: `torch.nn.utils.prune.global_unstructured` and the retraining loop that its tutorial shows (one pass). The same
weights, batches and optimizer everywhere; a mask is made anew where its side does so, and timed by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.bip import MaskedModel
from intaglio.methods.weights.bip.masked_model import score_gradients

SIDES = ("ours", "ours-bip", "torch")
SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 512, "depth": 4, "batch": 64, "steps": 60, "skip": 10},  # 1.1M weights
    "large": {"width": 2048, "depth": 6, "batch": 64, "steps": 12, "skip": 2},  # 25M
}
KEEP, RATE = 0.05, 0.01


def network(size: dict[str, int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(size["depth"]):
        layers += [nn.Linear(size["width"], size["width"]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(size["width"], 10))


def loss_fn(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def ours(net: nn.Sequential, batches: list[Any], *, both: bool) -> tuple[list[float], list[float]]:
    sgd = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    masks, steps = [], []
    began = time.process_time()
    masked = MaskedModel(net, 1 - KEEP)
    masks.append(time.process_time() - began)
    for first, second in pairwise(batches):
        began = time.process_time()
        sgd.zero_grad()
        loss_fn(net, first).backward()
        sgd.step()
        if both:
            with masked.gradient_probe() as leaves:
                gradients = score_gradients(loss_fn(net, second), leaves)
            masked.learn(gradients, 0.1)
        steps.append(time.process_time() - began)
    for _ in range(5):
        began = time.process_time()
        masked.refresh()
        masks.append(time.process_time() - began)
    masked.bake()
    return steps, masks


def torchs(net: nn.Sequential, batches: list[Any]) -> tuple[list[float], list[float]]:
    layers = [(module, "weight") for module in net if isinstance(module, nn.Linear)]
    masks, steps = [], []
    began = time.process_time()
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=1 - KEEP)
    masks.append(time.process_time() - began)
    sgd = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    for batch in batches[:-1]:
        began = time.process_time()
        sgd.zero_grad()
        loss = loss_fn(net, batch)
        loss.backward()
        sgd.step()
        float(loss.detach())
        steps.append(time.process_time() - began)
    for module, name in layers:
        torch_prune.remove(module, name)
    return steps, masks


def main() -> None:
    parser = argparse.ArgumentParser(description="One pruner on one network.")
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = SIZES[arguments.size]
    net, draws = network(size), torch.Generator().manual_seed(1)
    batches = []
    for _ in range(size["steps"] + size["skip"] + 1):
        x = torch.randn(size["batch"], size["width"], generator=draws)
        batches.append((x, x[:, :10].argmax(1)))
    with peak_memory(torch.device("cpu")) as peak:
        if arguments.side == "torch":
            steps, masks = torchs(net, batches)
        else:
            steps, masks = ours(net, batches, both=arguments.side == "ours-bip")
    layers = [module for module in net if isinstance(module, nn.Linear)]
    results = {
        "side": arguments.side,
        "size": arguments.size,
        "weights": sum(layer.weight.numel() for layer in layers),
        "kept": sum(int(layer.weight.count_nonzero()) for layer in layers),
        "ms": 1000 * median(steps[size["skip"] :]),
        "mask_ms": 1000 * median(masks),
        "peak_bytes": peak.bytes,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
