"""The cost of N:M training per step: ours against plain SR-STE and the dense model, alternated on the same rows.

    python benchmarks/nm/run.py                                # one thread, 1:16 and 2:4
    python benchmarks/nm/run.py --patterns 1:8 --steps 20 --sizes small

SR-STE is implemented from its published equation (Zhou et al., ICLR 2021, equation 7) in the obvious way: an autograd
function that sorts each group by magnitude in every forward pass. Each variant is a copy of the same model; in each
round all take a step on the same rows, in rotating order. Reported are medians of CPU time (wall time beyond one
thread), their ratios, and the losses; ours and the reference's SR-STE must agree.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intaglio
from intaglio.methods.weights.progressive_nm import ProgressiveNM
from intaglio.trainer import TrainingRun

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 128, "depth": 4, "inner": 384, "batch": 8, "length": 128},
    "wide": {"width": 576, "depth": 2, "inner": 1536, "batch": 4, "length": 256},  # SmolLM2's layers
}
LAMBDA = 2e-4
SKIP = 2


class SRSTE(torch.autograd.Function):
    """Forward m w, backward g + lambda (1 - m) w."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int) -> Tensor:
        """Return the masked weight."""
        pruned = weight.detach().abs().reshape(-1, m).argsort(dim=1)[:, : m - n]
        mask = torch.ones(weight.numel() // m, m, device=weight.device).scatter_(1, pruned, 0.0).reshape(weight.shape)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the dense weight."""
        weight, mask = ctx.saved_tensors
        return gradients[0] + LAMBDA * (1 - mask) * weight, None, None


class SparseLinear(nn.Linear):
    """Linear layer with SR-STE."""

    pattern: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return F.linear(input, SRSTE.apply(self.weight, *self.pattern), self.bias)


class Variant:
    """A model with its optimizer and masks."""

    def __init__(self, model: Any, before: Callable[[int], None] = lambda t: None) -> None:
        self.model, self.before = model.train(), before
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        self.spans: list[float] = []
        self.loss = 0.0

    def step(self, t: int, ids: Tensor, clock: Callable[[], float]) -> None:
        """Train one step on some rows and return its seconds."""
        began = clock()
        self.before(t)
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = float(loss.detach())
        self.spans.append(clock() - began)


def variants(size: dict[str, int], pattern: tuple[int, int], steps: int) -> dict[str, Variant]:
    """Return every variant of a model."""
    sizes = {"width": size["width"], "depth": size["depth"], "context": size["length"]}
    base = intaglio.new("llama", **sizes, intermediate_size=size["inner"]).model
    peer = copy.deepcopy(base)
    for name, module in peer.named_modules():
        if ".mlp." in name and isinstance(module, nn.Linear):
            module.__class__, module.pattern = SparseLinear, pattern
    results = {"dense": Variant(copy.deepcopy(base)), "SR-STE, reference": Variant(peer)}
    for name, recipe in (("SR-STE, ours", "sr-ste"), ("MdGf-Exponential, z > 0", "mdgf-exp")):
        model = copy.deepcopy(base)
        method = ProgressiveNM(pattern="{}:{}".format(*pattern), recipe=recipe, dense=0.0, finetune=0.0)  # type: ignore[arg-type]
        run = TrainingRun(intaglio.Checkpoint(model), steps, None, 0, lambda batch: None)  # type: ignore[arg-type, return-value]
        session = method.attach(run)
        results[name] = Variant(model, lambda step, session=session: session.before_step(step, {}))
    return results


def measure(
    size: dict[str, int], pattern: tuple[int, int], steps: int, clock: Callable[[], float]
) -> dict[str, Variant]:
    """Alternate the variants."""
    results = variants(size, pattern, steps + SKIP)
    ids_NT = torch.randint(256, (size["batch"], size["length"]), generator=torch.Generator().manual_seed(0))
    names = list(results)
    for t in range(1, steps + SKIP + 1):
        for name in (*names[t % len(names) :], *names[: t % len(names)]):
            results[name].step(t, ids_NT, clock)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="What N:M training costs a step.")
    parser.add_argument("--patterns", default="1:16,2:4", help="comma-separated; default: %(default)s")
    parser.add_argument("--sizes", default="small,wide", help="comma-separated; default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="that count; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print("| size | pattern | variant | ms per step | over dense | over the reference | last loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.sizes.split(","):
        for word in arguments.patterns.split(","):
            keep, of = map(int, word.split(":"))
            results = measure(SIZES[name], (keep, of), arguments.steps, clock)
            times = {variant: 1e3 * median(its.spans[SKIP:]) for variant, its in results.items()}
            for variant, ms in times.items():
                over = f"{ms / times['dense']:.2f} | {ms / times['SR-STE, reference']:.2f}"
                print(f"| {name} | {word} | {variant} | {ms:.1f} | {over} | {results[variant].loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
