"""Codes and values of `qlae` and `dkvb` against their peers' on equal weights, and InfoMEC against the official file.

    python benchmarks/latents/run.py                                   # the peers' environment is made on the first run
    python benchmarks/latents/run.py --official PATH/infomec.py        # also the metric, a file of the paper's code

Peers: LatentQuantize of vector-quantize-pytorch, and discrete-key-value-bottleneck-pytorch. Both sides read one file of
weights and inputs. Writes `out/results.json`, prints what differs, and exits with 1 if indices differ, codes or values
differ by more than 1e-5, or the metric by more than 1e-6.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from intaglio import atomic_io
from intaglio.measures.infomec import infomec
from intaglio.methods.activations.dkvb.bottleneck import DiscreteKeyValueBottleneck, VotingHead
from intaglio.methods.activations.qlae.latents import ScalarQuantizer, quantization_loss

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from machine import machine, title  # noqa: E402
from peer import peer_python  # noqa: E402

REPEATS = 5
PREFIX = "difference of "


def inputs(rows: int = 128) -> dict[str, torch.Tensor]:
    """Return weights and inputs of both comparisons, and sources with latents for the metric."""
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws)

    codebooks_ZV = normal(4, 10).sort(1).values  # LatentQuantize lists all codes: 10^8 of eight latents do not fit
    sources_NS = torch.randint(0, 4, (rows, 3), generator=draws)
    mixed_NZ = torch.stack([sources_NS[:, 0], sources_NS[:, 0] + sources_NS[:, 1], sources_NS[:, 2] // 2], 1)
    return {
        "codebooks": codebooks_ZV,
        "x": normal(rows, 4),
        "z": normal(rows, 384),
        "projection": normal(64, 384, 8),
        "keys": 20 * normal(64, 512, 8),
        "values": normal(64, 512, 20),
        "sources": sources_NS,
        "latents": mixed_NZ,
    }


def ours(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the peers' worker returns, by the library."""
    latent = ScalarQuantizer(*given["codebooks"].shape)
    latent.values.data.copy_(given["codebooks"])
    latents = latent(given["x"])
    quantization_loss(latents).backward()
    codebooks, pairs, width = given["keys"].shape
    layer = DiscreteKeyValueBottleneck(given["z"].shape[1], codebooks, pairs, width, given["values"].shape[2])
    layer.splitter.projection.copy_(given["projection"])
    layer.keys.copy_(given["keys"])
    layer.values.data.copy_(given["values"].flatten(0, 1))
    layer.freeze_keys()
    layer.eval()
    with torch.no_grad():
        fetched = layer(given["z"])
        start = time.perf_counter()
        for _ in range(REPEATS):
            VotingHead()(layer(given["z"]).values)
        seconds = (time.perf_counter() - start) / REPEATS
        means = VotingHead()(fetched.values)
    results = {"codes": latents.hat.detach(), "codebook_gradient": latent.values.grad, "means": means,
               "indices": fetched.indices[:, :, 0, 0], "seconds": torch.tensor(seconds)}  # fmt: skip
    scores = infomec(given["sources"].numpy(), given["latents"].numpy(), discrete=True)
    results |= {name: torch.tensor(getattr(scores, name)) for name in ("infom", "infoe", "infoc")}
    results["nmi"] = torch.from_numpy(scores.nmi)
    return results


def main() -> None:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with the peers")
    parser.add_argument("--official", help="the official infomec.py")
    parser.add_argument("--output", type=Path, default=HERE / "out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    data = inputs()
    save_file(data, given.output / "inputs.safetensors")
    words = [str(given.output / name) for name in ("inputs.safetensors", "peer.safetensors")]
    official = [given.official] if given.official else []
    subprocess.run([peer_python(HERE, given.peer_python), str(HERE / "worker_peer.py"), *words, *official], check=True)
    own, peer = ours(data), load_file(given.output / "peer.safetensors")
    result: dict[str, Any] = {
        "machine": machine(),
        "equal_indices": bool(torch.equal(own["indices"], peer["indices"].long())),
        "seconds": [float(own["seconds"]), float(peer["seconds"])],
        "peer_codebook_gradient": float(peer["codebook_gradient"].abs().max()),
        "own_codebook_gradient": float(own["codebook_gradient"].abs().max()),
    }
    for name in (name for name in own if name in peer and name not in ("seconds", "indices", "codebook_gradient")):
        result[PREFIX + name] = float((own[name].double() - peer[name].double()).abs().max())
    atomic_io.write_json(given.output / "results.json", result)
    print(title())
    for name, value in result.items():
        if name != "machine":
            print(f"{name}: {value}")
    differences = {name.removeprefix(PREFIX): value for name, value in result.items() if name.startswith(PREFIX)}
    equal = all(value <= (1e-5 if name in ("codes", "means") else 1e-6) for name, value in differences.items())
    sys.exit(0 if result["equal_indices"] and equal else 1)


if __name__ == "__main__":
    main()
