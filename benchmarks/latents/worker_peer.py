"""The peers' codes and values on the weights of a file, and the official InfoMEC: `worker_peer.py INPUTS OUTPUTS`."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck
from safetensors.torch import load_file, save_file
from vector_quantize_pytorch import LatentQuantize


def latent_quantize(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return codes, and the gradient that the quantization loss has with respect to the codebooks."""
    values_ZV, x_BZ = given["codebooks"], given["x"]
    latents, count = values_ZV.shape
    peer = LatentQuantize(
        levels=[count] * latents, dim=latents, commitment_loss_weight=0.0, quantization_loss_weight=1.0
    )
    with torch.no_grad():
        for own, row in zip(peer.values_per_latent, values_ZV, strict=True):
            own.copy_(row)
    peer.train()
    codes_BZ, _, loss = peer(x_BZ.clone().requires_grad_())
    loss.backward()
    gradients = [own.grad if own.grad is not None else torch.zeros_like(own) for own in peer.values_per_latent]
    return {"codes": codes_BZ.detach(), "codebook_gradient": torch.stack(gradients)}


def bottleneck(given: dict[str, torch.Tensor], repeats: int = 5) -> dict[str, torch.Tensor]:
    """Return indices [B, C] and the mean of the fetched values [B, V], and the seconds of a pass."""
    codebooks, pairs, width = given["keys"].shape
    # Without codebook_dim the peer projects the heads again.
    options: dict[str, Any] = {"num_memory_codebooks": codebooks, "codebook_dim": width}
    options["dim_embed"] = given["z"].shape[1]
    peer = DiscreteKeyValueBottleneck(width, num_memories=pairs, dim_memory=given["values"].shape[2], **options).eval()
    with torch.no_grad():
        peer.rand_proj.copy_(given["projection"])
        peer.vq._codebook.embed.copy_(given["keys"])
        peer.values.copy_(given["values"])
        values_BNV, (_, indices, _) = peer(given["z"][:, None], return_intermediates=True)
        start = time.perf_counter()
        for _ in range(repeats):
            peer(given["z"][:, None])
        seconds = (time.perf_counter() - start) / repeats
    return {"indices": indices[:, 0], "means": values_BNV[:, 0], "seconds": torch.tensor(seconds)}


def official_infomec(path: Path, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the official scores of discrete latents, from a copy of `disentangle/metrics/infomec.py`.

    Those of continuous latents draw noise, so they do not repeat.
    """
    spec = importlib.util.spec_from_file_location("infomec", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scores = module.compute_infomec(given["sources"].numpy(), given["latents"].double().numpy(), True)
    result = {name: torch.tensor(float(scores[name])) for name in ("infom", "infoe", "infoc")}
    return {**result, "nmi": torch.from_numpy(scores["nmi"])}


def main() -> None:
    """Read inputs, write outputs."""
    torch.set_num_threads(1)
    inputs, outputs, *official = map(Path, sys.argv[1:])
    given = load_file(inputs)
    results = {**latent_quantize(given), **bottleneck(given)}
    if official:
        results |= official_infomec(official[0], given)
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main()
