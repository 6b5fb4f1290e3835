"""Training with rounded weights beside two peers: PyPI's bitlinear (the paper's authors) and torchao's QAT.

    PEER/bin/pip install --no-deps -r benchmarks/bitnet/peer-requirements.txt   # an environment with Intaglio, too
    PEER/bin/python benchmarks/bitnet/run.py
    PEER/bin/python benchmarks/bitnet/run.py --width 128 --repeats 5

First the same weight and input through bitlinear and ours: the outputs must be equal up to rounding where there is no
bias; with one, bitlinear adds it before it divides by the scales, so its outputs differ. Then the processor time of a
training step (forward, backward, AdamW) of one Llama in all forms, the steps of all of them alternated, medians and
ratios to the step in float32. Ternary forms do what bitlinear does (median, 8-bit activations, layer norm); torchao has
no ternary weights, so its 4-bit weights a row with 8-bit activations a token stand beside ours of as many bits.

`out/results.json` and `out/results.md` are written at the end.
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
    """The largest difference of the outputs over their largest value, for the same weight and input."""
    found = {}
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
            found[f"{scale}, {'with' if bias else 'without'} bias"] = float((a - b).abs().max() / b.abs().max())
    return found


def forms(base: nn.Module) -> dict[str, nn.Module]:
    """The model in every form, the head in float in all of them.

    Args:
        base: in float32.
    """

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
    """Median milliseconds of processor time of a training step, the forms taking turns.

    Args:
        models: by name.
        ids: a batch, int64 [B, L].
        repeats: counted steps of each; one more goes before.
    """
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in name):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat:
                found[name].append(1000 * (time.process_time() - begun))
    return {name: median(values) for name, values in found.items()}


def markdown(outputs: dict[str, float], found: dict[str, float]) -> str:
    """The tables for people.

    Args:
        outputs: from `same_outputs`.
        found: from `times`.
    """
    lines = ["| the same weight and input | largest difference of outputs |", "| --- | --- |"]
    lines += [f"| {name} | {value:.1e} |" for name, value in outputs.items()]
    lines += ["", "| training step | processor ms | over float32 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value:.1f} | {value / found['float32']:.2f} |" for name, value in found.items()]
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
    found = times(forms(checkpoint.model), ids, chosen.repeats)
    (HERE / "out").mkdir(exist_ok=True)
    document = {"options": vars(chosen), "outputs": outputs, "ms": found, "versions": versions()}
    atomic_io.write_json(HERE / "out" / "results.json", document | {"torchao": torchao.__version__})
    table = markdown(outputs, found)
    atomic_io.write_text(HERE / "out" / "results.md", table)
    print(table)


if __name__ == "__main__":
    main()
