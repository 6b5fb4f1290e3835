"""Quality of N:M training at an equal number of steps: ours against torch.ao.pruning's sparsifier and the dense model.

    python benchmarks/nm/quality.py                            # one thread, 1:16 and 2:4, two seeds
    python benchmarks/nm/quality.py --patterns 1:16 --steps 100 --seeds 1 --rates 0.004

A byte-level Llama is trained on Python's standard library with its feed-forward layers pruned N:M. The peer makes its
mask in `WeightNormSparsifier.step` and restores no pruned weight, so it is used in the three ways its interface offers:
one mask before the first step; one after half of the steps, then fine-tuning; and with `CubicSL`, which prunes more
blocks of M at every tenth step until three quarters of the steps. Ours are the recipes with their defaults. Weights,
rows and their order, optimizer and steps are equal; each variant uses the learning rate that is best on validation
files for the first seed. Reported are bits per byte of the sparse model on other files, the zeros of each pruned layer,
and the median CPU time of a step over the dense one's.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from torch.ao.pruning import CubicSL, WeightNormSparsifier

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.environment import versions
from intaglio.evidence.testbeds.source_code import SourceCode
from intaglio.measures.language_modeling import quality
from intaglio.methods.weights.progressive_nm import ProgressiveNM
from intaglio.trainer import TrainingRun

HERE = Path(__file__).resolve().parent
EVERY = 10  # steps between two masks of CubicSL
WARM_UP = 0.1
INNER = 384  # inner width of the feed-forward layers: a multiple of 16, which 8/3 of the width is not
BED = SourceCode(width=128, depth=4, context=128, steps=600, batch=4, tokens=128, documents_run=110, documents_pilot=50)

Hook = Callable[[int], None]
"""Called with the step, from 1, before its forward pass."""


def idle(step: int) -> None:
    """Do nothing."""


def layers(model: nn.Module) -> list[str]:
    """Return the names of the feed-forward layers."""
    return [name for name, module in model.named_modules() if ".mlp." in name and isinstance(module, nn.Linear)]


def torch_once(model: nn.Module, n: int, m: int, steps: int, share: float) -> tuple[Hook, Callable[[], None]]:
    """Return the peer with a single mask, made after `share` of the steps."""
    sparsifier = prepared(model, n, m)
    at = 1 + int(share * steps)

    def before(step: int) -> None:
        if step == at:
            sparsifier.step()

    return before, sparsifier.squash_mask


def torch_cubic(model: nn.Module, n: int, m: int, steps: int) -> tuple[Hook, Callable[[], None]]:
    """Return the peer that prunes more blocks at every tenth step, all of them after three quarters of the steps."""
    sparsifier = prepared(model, n, m)
    last = int(0.75 * steps)
    scheduler = CubicSL(sparsifier, init_sl=0.0, delta_t=1, total_t=last // EVERY - 1)

    def before(step: int) -> None:
        if step % EVERY == 0 and step <= last:
            sparsifier.step()
            scheduler.step()

    return before, sparsifier.squash_mask


def prepared(model: nn.Module, n: int, m: int) -> Any:
    """Return the peer's sparsifier with an all-true mask on each layer."""
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers(model)])
    return sparsifier


def ours(model: nn.Module, n: int, m: int, steps: int, recipe: Any) -> tuple[Hook, Callable[[], object]]:
    """One of our recipes."""
    run = TrainingRun(Checkpoint(model), steps, None, 0, lambda batch: None)  # type: ignore[arg-type, return-value]
    session = ProgressiveNM(pattern=f"{n}:{m}", recipe=recipe).attach(run)
    return lambda step: session.before_step(step, {}), session.detach


VARIANTS: dict[str, Any] = {
    "dense": None,
    "torch, mask before the first step": partial(torch_once, share=0.0),
    "torch, mask after half of the steps": partial(torch_once, share=0.5),
    "torch, CubicSL": torch_cubic,
    "ours, SR-STE": partial(ours, recipe="sr-ste"),
    "ours, MdGf-Exponential": partial(ours, recipe="mdgf-exp"),
    "ours, SdGf-Stepwise": partial(ours, recipe="sdgf-stepwise"),
}


@dataclass
class Trained:
    """Result of a training."""

    checkpoint: Checkpoint
    zeros: float
    ms: float


def train(name: str, bed: SourceCode, pattern: tuple[int, int], rate: float, seed: int) -> Trained:
    """Train one variant and turn it into a plain sparse model."""
    checkpoint = bed.new(seed, intermediate_size=INNER)
    model: Any = checkpoint.model.train()
    made = VARIANTS[name]
    before, finish = (idle, lambda: None) if made is None else made(model, *pattern, bed.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warm = max(1, int(WARM_UP * bed.steps))
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, bed.steps - warm, 0.1 * rate),
        ],
        [warm],
    )
    rows_NT = bed.training(seed).ids_NT
    spans = []
    for step in range(1, bed.steps + 1):
        ids_BL = rows_NT[(step - 1) * bed.batch : step * bed.batch]
        began = time.process_time()
        before(step)
        model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spans.append(time.process_time() - began)
        scheduler.step()
    finish()
    model.eval()
    modules = dict(model.named_modules())
    zeros = fmean(float((modules[layer].weight == 0).float().mean()) for layer in layers(model))
    return Trained(checkpoint, zeros, 1e3 * median(spans))


def bits(results: Trained, windows: Any) -> float:
    """Return a model's bits per byte on some windows."""
    value = quality(results.checkpoint, windows.segments, batch_size=16).bits_per_byte
    return float("nan") if value is None else value


def measure(bed: SourceCode, pattern: tuple[int, int], rates: Sequence[float], seeds: int) -> list[dict[str, Any]]:
    """Return every variant with its learning rate, bits per byte for each seed, and times."""
    rows: list[dict[str, Any]] = []
    for name in VARIANTS:
        tried = {rate: train(name, bed, pattern, rate, 0) for rate in rates}
        rate = min(tried, key=lambda tested: bits(tried[tested], bed.documents("validation")))
        kept = [tried[rate], *(train(name, bed, pattern, rate, seed) for seed in range(1, seeds))]
        measured = [bits(results, bed.documents("evaluation")) for results in kept]
        row = {
            "pattern": "{}:{}".format(*pattern), "variant": name, "rate": rate, "bits a byte": measured,
            "zeros": fmean(results.zeros for results in kept), "ms a step": median(results.ms for results in kept),
        }  # fmt: skip
        rows.append(row)
        print(line(row, rows[0]["ms a step"]), flush=True)
    return rows


def line(row: dict[str, Any], dense: float) -> str:
    """Return a row of the table."""
    each = ", ".join(f"{value:.3f}" for value in row["bits a byte"])
    return (
        f"| {row['pattern']} | {row['variant']} | {row['rate']:g} | {fmean(row['bits a byte']):.3f} | {each} "
        f"| {100 * row['zeros']:.1f} % | {row['ms a step'] / dense:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What N:M training reaches beside torch.ao.pruning.")
    parser.add_argument("--patterns", default="1:16,2:4", help="comma-separated; default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of each training; default: %(default)s")
    parser.add_argument("--rates", default="0.002,0.004", help="learning rates, the best is kept; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="reported trainings per variant; default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "quality.json", help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch.ao.pruning")
    bed = replace(BED, steps=arguments.steps)
    rates = [float(word) for word in arguments.rates.split(",")]
    print("| pattern | variant | learning rate | bits per byte | each seed | zeros | step over dense |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for word in arguments.patterns.split(","):
        n, m = (int(part) for part in word.split(":"))
        rows += measure(bed, (n, m), rates, arguments.seeds)
    atomic_io.write_json(arguments.out, {"steps": arguments.steps, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
