"""Block-sparse FlexAttention against dense SDPA on an accelerator: one layer, including the cost of the block mask.

For each rule and length: SDPA with the stock causal kernel (a model without a rule), SDPA with the rule as a dense
mask, and FlexAttention with the rule's block mask, newly built (as in the first layer of a pass) and reused (as in the
others).

Dimension letters: B rows, H heads, T tokens, D head width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from intaglio.errors import IntaglioError
from intaglio.masks import AttentionSinks, BlockLocal, Causal, PrefixLM, Rule, Window
from intaglio.masks.attention_interface import request

LENGTHS = (4096, 8192, 16384, 32768, 65536)
HEADS, HEAD = 16, 64
REPEATS = 10
MOST_DENSE = 32768
"""Beyond, a dense mask of bytes and the scores that the kernel makes of it do not fit beside each other."""
RULES: dict[str, Callable[[int], Rule]] = {
    "sliding 1024, 4 sinks": lambda length: Causal() & (Window(1024) | AttentionSinks(4)),
    "blocks of 2048": lambda length: Causal() & BlockLocal(2048),
    "prefix of a tenth": lambda length: PrefixLM(length // 10),
}


def _seconds(work: Callable[[], Any]) -> float:
    work()
    results = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        results.append(time.perf_counter() - begun)
    return statistics.median(results)


def _asked(length: int, query_BHTD: Tensor) -> Any:
    return request(
        batch_size=1, q_length=length, kv_length=length, q_offset=0, kv_offset=0, allow_is_causal_skip=True,
        attention_mask=None, dtype=query_BHTD.dtype, device=query_BHTD.device,
    )  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """Return the seconds of every rule and length, in bfloat16.

    Raises:
        IntaglioError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise IntaglioError("the part gpu needs a CUDA device, and this machine has none")
    results = []
    for length in LENGTHS:
        q, k, v = torch.randn(3, 1, HEADS, length, HEAD, device="cuda", dtype=torch.bfloat16)
        stock = _seconds(lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True))
        for name, make in RULES.items():
            rule = make(length)
            blocks, _ = _asked(length, q).mask("flex_attention", rule, None, q)

            def making(rule: Rule = rule, length: int = length, q: Tensor = q) -> Any:
                return _asked(length, q).mask("flex_attention", rule, None, q)

            def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v, blocks: Any = blocks) -> Any:
                return compile_friendly_flex_attention(q, k, v, block_mask=blocks)

            row: dict[str, Any] = {
                "rule": name, "tokens": length, "causal": stock, "sparse": _seconds(sparse),
                "block mask": _seconds(making),
                "blocks seen": 1 - float(blocks.sparsity()) / 100,
            }  # fmt: skip
            if length <= MOST_DENSE:
                dense, _ = _asked(length, q).mask("sdpa", rule, None, q)
                row["dense"] = _seconds(
                    lambda q=q, k=k, v=v, dense=dense: scaled_dot_product_attention(q, k, v, attn_mask=dense)
                )
            results.append({**row, "device": torch.cuda.get_device_name()})
    return results


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the results as a Markdown table; a ratio below 1 is faster than the dense mask."""
    lines = [
        "| rule | tokens | blocks seen | causal ms | dense ms | sparse ms | block mask ms | sparse/dense | with mask |",
        "| --- |" + " --- |" * 8,
    ]
    for row in rows:
        dense = row.get("dense")
        both = row["sparse"] + row["block mask"]
        ratios = ["–", "–"] if dense is None else [f"{row['sparse'] / dense:.2f}", f"{both / dense:.2f}"]
        times = [row["causal"], dense, row["sparse"], row["block mask"]]
        cells = ["–" if took is None else f"{1000 * took:.2f}" for took in times]
        lines.append(
            f"| {row['rule']} | {row['tokens']} | {row['blocks seen']:.0%} | {' | '.join([*cells, *ratios])} |"
        )
    return [*lines, ""]
