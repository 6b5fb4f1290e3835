"""A timed call of `generate` with its counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from intaglio.cli.generate import count_passes
from intaglio.speculative.heads.self_generated_data import stop_ids, truncate_at_stop

Run = dict[str, Any]


def once(
    checkpoint: Any,
    rows: Sequence[list[int]],
    new: int,
    options: dict[str, Any],
    temperature: float = 0.0,
    seed: int = 0,
) -> Run:
    """Continue prompts.

    Returns:
        `seconds, cpu_seconds, ids` of each row up to its stop token, `new_tokens` and `row_passes` of all rows; of a
        drafter of ours also `accepted_share, drafting_share, loop_share`, of one that is not lossless `agreement` and
        `threshold`.
    """
    model, stops = checkpoint.model, stop_ids(checkpoint.model)
    pad = checkpoint.tokenizer.pad_token_id or checkpoint.tokenizer.eos_token_id or 0
    longest = max(map(len, rows))
    device = checkpoint.device
    ids_BP = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=device)
    mask_BP = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    # A compiled pass would be compiled again for each count; there a token is a pass.
    counted = "cache_implementation" not in options and len(rows) == 1
    with count_passes(model) if counted else nullcontext([0]) as passes:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start, begun = time.perf_counter(), time.process_time()
        whole_BL = model.generate(
            ids_BP, attention_mask=mask_BP, max_new_tokens=new, pad_token_id=pad, **how, **options
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, cpu = time.perf_counter() - start, time.process_time() - begun
    results = [truncate_at_stop(ids, stops) for ids in whole_BL[:, longest:].tolist()]
    tokens = sum(map(len, results))
    # A row that has ended takes part in stock passes, but is not counted; only one row drafts there.
    run: Run = {"seconds": seconds, "cpu_seconds": cpu, "ids": results, "new_tokens": tokens,
                "row_passes": passes[0] if counted else tokens}  # fmt: skip
    decoder = options.get("custom_generate")
    if decoder is not None:
        counts = decoder.statistics
        run |= {
            "row_passes": counts.row_passes,
            "accepted_share": counts.accepted_share,
            "drafting_share": counts.drafter_seconds / counts.seconds if counts.seconds else 0.0,
            "loop_share": counts.loop_seconds / counts.seconds if counts.seconds else 0.0,
        }
        if not getattr(decoder, "lossless", True):
            run |= {"agreement": counts.agreement, "threshold": counts.threshold}
    return run


@torch.no_grad()
def gap(checkpoint: Any, prompt: list[int], stock: list[int], other: list[int]) -> float:
    """Return the gap of the target's two highest logits where two continuations diverge."""
    place = next((n for n, (a, b) in enumerate(zip(stock, other, strict=False)) if a != b), min(len(stock), len(other)))
    ids_1L = torch.tensor([prompt + stock[:place]], device=checkpoint.device)
    top = checkpoint.model(ids_1L).logits[0, -1].topk(2).values
    return float(top[0] - top[1])
