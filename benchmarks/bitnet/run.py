"""Training with rounded weights against bitlinear (by the paper's authors) and torchao's QAT.

    PEER/bin/pip install --no-deps -r benchmarks/bitnet/peer-requirements.txt   # into an environment with Intaglio
    PEER/bin/python benchmarks/bitnet/run.py
    PEER/bin/python benchmarks/bitnet/run.py --width 128 --repeats 5

First compares the outputs of bitlinear and ours for the same weight and input: equal up to rounding without a bias;
with one, bitlinear adds it before dividing by the scales, so they differ. Then measures the CPU time of a training step
(forward, backward, AdamW) of a Llama in all variants, alternated: medians and ratios to the float32 step. The ternary
variants do what bitlinear does (median, 8-bit activations, layer norm); torchao has no ternary weights, so its 4-bit
weights per row with 8-bit activations per token are compared with ours of as many bits.

Writes `out/results.json` and `out/results.md`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import bitlinear as peer
import torch
import torchao
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from intaglio import atomic_io, new
from intaglio.environment import versions
from intaglio.methods.weights.bitnet import BitNet

HERE = Path(__file__).resolve().parent
TERNARY = BitNet.paper()
FOUR = BitNet(bits=4.0, per="row", norm="none")


def same_outputs() -> dict[str, float]:
    """Return the relative maximum difference of the outputs for the same weight and input."""
    results = {}
    for bias in (False, True):
        for scale, measure in (("median", "AbsMedian"), ("mean", "AbsMean")):
            torch.manual_seed(0)
            theirs = peer.BitLinear(96, 64, bias=bias, weight_measure=measure)
            linear = nn.Linear(96, 64, bias=bias)
            linear.load_state_dict(theirs.state_dict())
            ours = nn.Sequential(linear)
            BitNet(scale=scale).replace(ours)  # type: ignore[arg-type]
            x = torch.randn(32, 96)
            with torch.no_grad():
                a, b = theirs(x), ours(x)
            results[f"{scale}, {'with' if bias else 'without'} bias"] = float((a - b).abs().max() / b.abs().max())
    return results


def forms(base: nn.Module) -> dict[str, nn.Module]:
    """Return the model in every variant, all with the head in floating point."""

    def made(change: Callable[[Any], Any] | None = None) -> nn.Module:
        model = copy.deepcopy(base).train()
        if change is not None:
            change(model)
        return model

    def fake(model: Any) -> None:
        config = QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int4, "per_channel"),
            step="prepare",
        )
        quantize_(model.model, config)

    return {
        "float32": made(),
        "bfloat16 autocast": made(),
        "ours, ternary": made(TERNARY.replace),
        "bitlinear, ternary": made(lambda model: peer.bitlinearize(model.model)),
        "ours, 4 bits": made(FOUR.replace),
        "torchao, 4 bits": made(fake),
    }


def times(models: dict[str, nn.Module], ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the median CPU milliseconds of a training step, with the variants alternated."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    results: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in name):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat:
                results[name].append(1000 * (time.process_time() - begun))
    return {name: median(values) for name, values in results.items()}


def markdown(outputs: dict[str, float], results: dict[str, float]) -> str:
    """Return the results as Markdown tables."""
    lines = ["| the same weight and input | maximum difference of outputs |", "| --- | --- |"]
    lines += [f"| {name} | {value:.1e} |" for name, value in outputs.items()]
    lines += ["", "| training step | CPU ms | over float32 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.1f} | {value / results['float32']:.2f} |" for name, value in results.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--depth", type=int, default=4)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    checkpoint = new("llama", width=chosen.width, depth=chosen.depth, context=chosen.tokens, tie_word_embeddings=False)
    ids = torch.randint(256, (chosen.batch, chosen.tokens), generator=torch.Generator().manual_seed(0))
    outputs = same_outputs()
    results = times(forms(checkpoint.model), ids, chosen.repeats)
    (HERE / "out").mkdir(exist_ok=True)
    document = {"options": vars(chosen), "outputs": outputs, "ms": results, "versions": versions()}
    atomic_io.write_json(HERE / "out" / "results.json", document | {"torchao": torchao.__version__})
    table = markdown(outputs, results)
    atomic_io.write_text(HERE / "out" / "results.md", table)
    print(table)


if __name__ == "__main__":
    main()
