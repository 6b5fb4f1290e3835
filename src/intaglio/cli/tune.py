"""`intaglio tune`: measure the fast paths of a model on this machine ahead of their first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.bundled import bundled_heads
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.environment import tuning
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.speculative.drafting_trial import PASSES, PLAIN, pass_ratio
from intaglio.speculative.heads.base import TrainedHeads
from intaglio.speculative.pass_cost import PassCosts, pass_costs
from intaglio.speculative.prepacked_linear import MIN_NEW_TOKENS, prepacked


def tune(checkpoint: Checkpoint, rows: Sequence[int] = (1,), tuner: tuning.Tuner | None = None) -> dict[str, Any]:
    """Measure a decoder's products and passes, as far as the cache does not know them.

    Args:
        checkpoint: a decoder on a CPU.
        rows: prompts that share a pass. Default: one.
        tuner: where times are kept. Default: the user's cache.

    Returns:
        `machine, times, model, threads, choices, passes, heads, complete, busy`: `times` are seconds by key and
        candidate, `choices` the chosen candidate of each key, `passes` the costs for each number of rows, `heads` the
        expected speed of the trained heads at hand, `complete` whether all was measured within the time limit, and
        `busy` whether times are not kept because other processes held up the measuring.

    Raises:
        IntaglioError: the model is no decoder.
    """
    tuner = tuner or tuning.Tuner(tuning.default_path())
    with tuning.using(tuner):
        copies = prepacked(checkpoint.model, None, MIN_NEW_TOKENS)
        costs = [pass_costs(checkpoint.model, count, copies) for count in rows]
        heads = [_heads(slug, checkpoint, costs[0]) for slug in _slugs(checkpoint) if costs[0].measured]
    products = {key: times for key, times in tuner.used.items() if not key.startswith(("pass ", "drafting "))}
    return {
        **tuner.document(),
        "model": checkpoint.source,
        "threads": torch.get_num_threads(),
        "choices": {key: tuning.fastest(times) for key, times in products.items()},
        "passes": [
            {
                "rows": cost.rows,
                "seconds": {str(size): seconds for size, seconds in cost.seconds},
                "cost": {str(size): cost.cost(size) for size, _ in cost.seconds},
                "token_cost": cost.token_cost,
            }
            for cost in costs
            if cost.measured
        ],
        "heads": heads,
        "complete": not tuner.skipped,
        "busy": tuner.busy,
    }


def _slugs(checkpoint: Checkpoint) -> list[str]:
    """Return the methods with trained heads for this model, attached or bundled."""
    own = fingerprint(checkpoint.model)
    return [
        slug
        for slug, entry in PUBLISHED.items()
        if "drafter" in entry.kinds
        and issubclass(get_method(slug), TrainedHeads)
        and (slug in checkpoint.attachments or any(heads.matches(own) for heads in bundled_heads(slug)))
    ]


def _heads(slug: str, checkpoint: Checkpoint, costs: PassCosts) -> dict[str, Any]:
    """Return the best tree of trained heads for these costs and its expected speed over the loop without drafts.

    Where it is expected to win by the costs of passes, the passes with drafts are measured, too.
    """
    decoder: Any = checkpoint.decoder(slug)
    tree = decoder.static_tree(costs.rows, costs)
    key = decoder.drafting_key(checkpoint.model, tree, costs.rows)
    if decoder.expected_speed(tree, costs.rows, costs, key) > 1 and pass_ratio(key) is None:
        most = PLAIN + 1 + PASSES * (1 + tree.depth)
        ids = torch.ones((costs.rows, 1), dtype=torch.long)
        options = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}
        measured = StoppingCriteriaList([_Measured(key)])
        generate: Any = checkpoint.model.generate
        generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=decoder, stopping_criteria=measured, **options
        )
    speed = decoder.expected_speed(tree, costs.rows, costs, key)
    return {"slug": slug, "nodes": len(tree), "speed": speed}


class _Measured(StoppingCriteria):
    """Ends a run when the seconds of its passes are known."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row ends."""
        return torch.full((len(input_ids),), pass_ratio(self._key) is not None)


def tables(document: dict[str, Any]) -> list[Table]:
    """Return the products and the passes as tables."""
    title = f"Products of {document['model']}, ms, {document['threads']} threads, {document['machine']['processor']}"
    products = Table("product", "rows", "candidates", "chosen", title=title, box=SIMPLE_HEAD)
    for key, name in document["choices"].items():
        what, _, size = key.partition(" rows ")
        times = ", ".join(f"{other} {1e3 * seconds:.3f}" for other, seconds in document["times"][key].items())
        products.add_row(what, size.partition(" ")[0], times, name)
    passes = Table("rows", "tokens", "ms", "cost", "a further token", title="Passes", box=SIMPLE_HEAD)
    for item in document["passes"]:
        for place, (size, seconds) in enumerate(item["seconds"].items()):
            token_cost = f"{item['token_cost']:.3f}" if not place else ""
            rows = str(item["rows"]) if not place else ""
            passes.add_row(rows, size, f"{1e3 * seconds:.1f}", f"{item['cost'][size]:.2f}", token_cost)
    return [products, passes]


def notes(document: dict[str, Any]) -> list[str]:
    """Return what the tables do not show, a sentence each."""
    lines = [
        f"{item['slug']}: {item['nodes']} drafted tokens a pass, expected at {item['speed']:.2f} times the speed "
        f"without drafts{'' if item['speed'] > 1 else ', so they are not used'}"
        for item in document["heads"]
    ]
    if not document["complete"]:
        lines.append(f"not all was measured within {tuning.LIMIT:g} s; run it again for the rest")
    if document["busy"]:
        lines.append(
            "other processes held up the measuring, so some times are not kept; run it again when they have ended"
        )
    return lines
