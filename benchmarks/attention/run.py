"""Visibility rules against the stock model, llm2vec and billm, alternated on the same tokens.

    python benchmarks/attention/run.py                        # the stock model, then the peers in their own environment
    python benchmarks/attention/run.py --parts stock --repeats 3
    python benchmarks/attention/run.py --parts gpu            # block-sparse against dense, on an accelerator

Writes `results.json` and `results.md` to the output directory. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import gpu
import torch
import transformers
from safetensors.torch import load_file

import intaglio
from intaglio import atomic_io
from intaglio.errors import IntaglioError
from intaglio.masks import AttentionSinks, Bidirectional, Causal, Window, clear_visibility, set_visibility

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from peer import peer_python  # noqa: E402

RULES = ("no rule", "mixed", "all both ways")
PARTS = ("stock", "peers", "gpu")
TARGETS = {"no rule": 1.05, "mixed": 1.10}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Visibility rules against the stock model and against peers.")
    parser.add_argument("--model", default="smollm2", help="checkpoint directory or bundled name, a Llama")
    parser.add_argument("--parts", default="stock,peers", help=f"of {', '.join(PARTS)}; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with the peers")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


def set_rules(model: Any, variant: str) -> None:
    """Set the rules of a variant: one of `RULES`, or `stock`."""
    depth = model.config.num_hidden_layers
    if variant == "stock":
        clear_visibility(model)
    elif variant == "no rule":
        set_visibility(model, {})
    elif variant == "mixed":
        thirds = depth // 3
        sliding = dict.fromkeys(range(thirds), Causal() & (Window(64) | AttentionSinks(4)))
        set_visibility(model, {**sliding, **dict.fromkeys(range(2 * thirds, depth), Bidirectional())})
    else:
        set_visibility(model, Bidirectional())


def against_stock(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the median seconds of each variant, alternated on the same weights in one process."""
    torch.set_num_threads(arguments.threads)
    model: Any = intaglio.load(arguments.model, dtype="float32").model
    body, ids = model.base_model, common.token_ids(model.config.vocab_size, arguments.tokens)
    names = ["stock", *RULES]
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in common.KINDS} for name in names}
    for repeat in range(-1, arguments.repeats):  # the first round is not counted
        for kind in common.KINDS:
            for place in range(len(names)):
                name = names[(place + repeat) % len(names)]
                set_rules(model, name)
                took = common.timed(body, ids, kind)
                if repeat >= 0:
                    seconds[name][kind].append(took)
        print(f"round {repeat + 1} of {arguments.repeats}", file=sys.stderr)
    return {name: {kind: statistics.median(took) for kind, took in of.items()} for name, of in seconds.items()}


def old_config(arguments: argparse.Namespace) -> Path:
    """Return the checkpoint with its configuration in the names that the peers' transformers expects."""
    source, config = intaglio.checkpoint.load_config(arguments.model)
    place = arguments.out / "model"
    place.mkdir(parents=True, exist_ok=True)
    for path in Path(source).iterdir():
        if path.name != "config.json" and not (place / path.name).exists():
            (place / path.name).symlink_to(path.resolve())
    values = config.to_dict()
    rope = values.get("rope_parameters") or {}
    values |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None, "torch_dtype": "float32"}
    values.pop("dtype", None)
    atomic_io.write_json(place / "config.json", values)
    return place


def _worker(python: Path, script: str, model: Path, variant: str, start: int, arguments: argparse.Namespace) -> Any:
    hidden = arguments.out / f"{script}-{variant}-{start}.safetensors"
    command = [
        str(python), str(HERE / script), "--model", str(model), "--variant", variant, "--start", str(start),
        "--tokens", str(arguments.tokens), "--threads", str(arguments.threads), "--hidden", str(hidden),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode:
        raise IntaglioError(f"{script} {variant} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1]), hidden


def against_peers(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return median seconds and the maximum difference of hidden states, in alternated fresh processes."""
    python, model = peer_python(HERE, arguments.peer_python), old_config(arguments)
    depth = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    pairs = {"stock": ("stock", 0), "llm2vec": ("llm2vec", 0), "billm": ("billm", depth - depth // 3)}
    collected: dict[str, dict[str, Any]] = {}
    for name, (variant, start) in pairs.items():
        sides: dict[str, list[Any]] = {"ours": [], "peer": []}
        try:
            for repeat in range(max(1, arguments.repeats // 2)):
                for side in ("ours", "peer") if repeat % 2 else ("peer", "ours"):
                    script = f"worker_{side}.py"
                    runner = Path(sys.executable) if side == "ours" else python
                    sides[side].append(_worker(runner, script, model, variant, start, arguments))
        except IntaglioError as error:
            collected[name] = {"failed": str(error)}
            continue
        ours, peer = (load_file(sides[side][-1][1])[common.HIDDEN] for side in ("ours", "peer"))
        collected[name] = {
            "first layer": start,
            "difference": float((ours - peer).abs().max()),
            "scale": float(peer.abs().max()),
            **{
                side: {kind: statistics.median(run[kind] for run, _ in runs) for kind in common.KINDS}
                for side, runs in sides.items()
            },
        }
    return collected


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines: list[str] = []
    if "stock" in results:
        lines += ["| rules | forward s | step s | forward | step | target |", "| --- | --- | --- | --- | --- | --- |"]
        stock = results["stock"]["stock"]
        for name, took in results["stock"].items():
            seconds = [f"{took[kind]:.3f}" for kind in common.KINDS]
            ratios = [f"{took[kind] / stock[kind]:.2f}" for kind in common.KINDS]
            target = f"{TARGETS[name]:.2f}" if name in TARGETS else "–"
            lines.append(f"| {name} | {' | '.join([*seconds, *ratios, target])} |")
        lines.append("")
    if "peers" in results:
        lines += [
            "| peer | bidirectional from layer | forward s: ours, peer | step s: ours, peer | forward | step "
            "| max. difference |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, item in results["peers"].items():
            if "failed" in item:
                lines.append(f"| {name} | {item['failed']} | – | – | – | – | – |")
                continue
            cells = [f"{item['ours'][kind]:.3f}, {item['peer'][kind]:.3f}" for kind in common.KINDS]
            ratios = [f"{item['ours'][kind] / item['peer'][kind]:.2f}" for kind in common.KINDS]
            where = "none (stock)" if name == "stock" else item["first layer"]
            differ = f"{item['difference']:.1e} of {item['scale']:.0f}"
            lines.append(f"| {name} | {where} | {' | '.join([*cells, *ratios, differ])} |")
        lines.append("")
    if "gpu" in results:
        lines += gpu.markdown(results["gpu"])
    return "\n".join(lines)


def main() -> None:
    arguments = _arguments()
    parts = arguments.parts.split(",")
    if unknown := sorted({*parts} - {*PARTS}):
        raise IntaglioError(f"the part {unknown[0]!r} is unknown; accepted: {', '.join(PARTS)}")
    results: dict[str, Any] = {
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.processor(),
        "tokens": arguments.tokens, "threads": arguments.threads, "repeats": arguments.repeats,
    }  # fmt: skip
    if "stock" in parts:
        results["stock"] = against_stock(arguments)
    if "peers" in parts:
        results["peers"] = against_peers(arguments)
    if "gpu" in parts:
        results["gpu"] = gpu.measure()
    atomic_io.write_json(arguments.out / "results.json", results)
    atomic_io.write_text(arguments.out / "results.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    try:
        main()
    except IntaglioError as error:
        sys.exit(f"error: {error}")
