"""Prune one variant with llmcompressor in its own environment; prints one JSON line.

Uses the documented path: `oneshot` on a loaded model with the sequential pipeline (one decoder layer at a time, on the
pruned output of the previous one), block size 128 and dampening 0.01. It passes a DataLoader, which `oneshot`
documents, because the one it makes itself shuffles without a seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.magnitude import MagnitudePruningModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

UNTOUCHED = "the peer's oneshot ends without an error and leaves every weight as it was"
CALIBRATED = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack sequences into a batch; without an attention mask every token counts, as there is no padding."""
    return {common.IDS: torch.stack(rows)}


def calibrated(arguments: argparse.Namespace) -> Any:
    """Return the peer's recipe for Wanda or SparseGPT.

    Its `mask_structure` names the pruned entries first (`n:m` zeroes n of every m), ours the kept ones.
    """
    if arguments.pattern is None:
        amount: dict[str, Any] = {"sparsity": arguments.sparsity}
    else:
        kept, group = (int(part) for part in arguments.pattern.split(":"))
        amount = {"sparsity": (group - kept) / group, "mask_structure": f"{group - kept}:{group}"}
    return CALIBRATED[arguments.method](targets=["Linear"], ignore=["re:.*lm_head"], **amount)


def magnitude(arguments: argparse.Namespace) -> Any:
    """Return the peer's recipe for magnitude; it is written for training, so it starts and ends with steps."""
    return MagnitudePruningModifier(
        targets=[r"re:.*layers\..*_proj$"],
        init_sparsity=arguments.sparsity or 0.5,
        final_sparsity=arguments.sparsity or 0.5,
        start=0,
        end=1,
        update=1,
        mask_structure=arguments.pattern or "unstructured",
    )


def pruning_call(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> Callable[[], object]:
    """Return the timed call of `oneshot`."""
    if arguments.method == "magnitude":
        return lambda: oneshot(model=model, processor=tokenizer, recipe=magnitude(arguments))
    ids_NT = common.load_ids(arguments.calibration)
    rows: Any = list(ids_NT)
    batches: DataLoader[Any] = DataLoader(rows, batch_size=arguments.batch_size, shuffle=False, collate_fn=collate)
    recipe = calibrated(arguments)
    return lambda: oneshot(model=model, processor=tokenizer, dataset=batches, recipe=recipe)


def main() -> None:
    imports_mib = common.resident_mib()
    arguments = common.worker_arguments("Prune with llmcompressor.")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Compared, not tested for none: a checkpoint that was once stored in 4 bits has zeros to begin with.
    dense = common.zeros(model)
    versions = {"library": f"llmcompressor {llmcompressor.__version__}", "transformers": transformers.__version__}
    try:
        cost = common.measure(pruning_call(arguments, model, tokenizer))
    except ValueError as error:
        if "Invalid mask_structure" not in str(error):
            raise
        common.emit({**versions, "unsupported": f"the peer says: {error}"})
        return
    counts = common.zeros(model)
    if counts == dense:
        common.emit({**versions, "unsupported": UNTOUCHED})
        return
    if arguments.output:
        # The class's own function: the peer replaces the instance's by one that writes its compressed format.
        type(model).save_pretrained(model, arguments.output)
        tokenizer.save_pretrained(arguments.output)
    common.emit({**versions, "imports_mib": imports_mib, **cost, **counts})


if __name__ == "__main__":
    main()
