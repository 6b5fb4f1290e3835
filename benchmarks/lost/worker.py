"""Train a small Llama in one variant and report seconds per step and peak memory.

    python benchmarks/lost/worker.py --way lost --width 512 --depth 4 --steps 6 --threads 1

`sltrain` is SLTrain's formulation, W = (α / r) BA + S, with the matrix formed in every pass and again in backward: a
reimplementation of its equation, because the official layer is a C++ extension for CUDA. `sltrain-kept` is the same in
plain autograd, which keeps the matrix.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from intaglio.checkpoint.from_scratch import new
from intaglio.measures.memory import peak_memory
from intaglio.methods.weights.lost import LOST, ElementsLinear

WAYS = ("full", "low-rank", "lost", "sltrain", "sltrain-kept")


def _kept(self: ElementsLinear, x: Tensor) -> Tensor:
    low, sparse = self.config.scales
    weight = ((low * self.B) @ self.A).flatten().index_add(0, self.places, sparse * self.values)
    return F.linear(x, weight.view(self.out_features, self.in_features), self.up.bias)


def replace(checkpoint: Any, way: str) -> None:
    """Give the blocks the projections of a variant."""
    share = 0.03
    if way == "low-rank":
        LOST.low_rank().apply(checkpoint)
    elif way == "lost":
        LOST(columns=share, within_rank=True).apply(checkpoint)
    elif way.startswith("sltrain"):
        LOST.sltrain(elements=share, within_rank=True).apply(checkpoint)
        if way == "sltrain-kept":
            ElementsLinear.forward = _kept  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    checkpoint = new("llama", width=arguments.width, depth=arguments.depth, context=arguments.length)
    replace(checkpoint, arguments.way)
    model: Any = checkpoint.model.to(device).train()
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (arguments.batch, arguments.length), generator=draws).to(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times, processor = [], []
    with peak_memory(device) as peak:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(arguments.steps + 1):
            wait()
            begun, cpu = time.perf_counter(), time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait()
            times.append(time.perf_counter() - begun)
            processor.append(time.process_time() - cpu)
    model.eval()
    decode = []
    with torch.no_grad():
        item = ids[:1, :1]
        for _ in range(30):
            wait()
            cpu = time.process_time() if device.type == "cpu" else time.perf_counter()
            model(input_ids=item, use_cache=False)
            wait()
            decode.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - cpu)
    blocks = sum(p.numel() for block in model.model.layers for p in block.parameters())
    results = {
        "way": arguments.way,
        "step_ms": 1e3 * median(times[1:]),
        "cpu_ms": 1e3 * median(processor[1:]),
        "decode_ms": 1e3 * median(decode[5:]),
        "peak_bytes": peak.bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "block_parameters": blocks,
        "loss": float(loss.detach()),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
