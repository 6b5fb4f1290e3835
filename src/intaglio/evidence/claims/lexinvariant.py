"""Lexinvariant: embeddings drawn anew for every sequence teach a model to look symbols up in its context."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.designs.measures import LOOKUP, PERMUTATION
from intaglio.evidence.designs.training import Pretrain
from intaglio.evidence.engine.claim import Arm, Claim, Metric
from intaglio.evidence.testbeds.symbols import SymbolicCode, SymbolTasks
from intaglio.methods.objectives.lexinvariant import Lexinvariant
from intaglio.trainer import CausalLM

CODE_LOSS = Metric("loss on code", "nats a byte")
LOOKUP_LOSS = Metric("LookUp loss", "nats")
BATCH = 100
"""Sequences measured at a time."""
BED = SymbolicCode(width=64, depth=2, context=128, tokens=128, batch=16, steps=4000)


@torch.no_grad()
def outputs(measured: Measured, ids_NT: Tensor) -> Tensor:
    """Return the logits of sequences, each under one table of its own if the model was trained so, [N, T, V]."""
    model, parts = measured.checkpoint.model, []
    own = Lexinvariant.slug in measured.checkpoint.attachments
    method = Lexinvariant.from_checkpoint(measured.checkpoint) if own else None
    for start in range(0, len(ids_NT), BATCH):
        ids_BT = ids_NT[start : start + BATCH].to(measured.checkpoint.device)
        seeds = range(start, start + len(ids_BT))
        with nullcontext() if method is None else method.tables(model, seeds):
            parts.append(model(input_ids=ids_BT, use_cache=False).logits.float().cpu())
    return torch.cat(parts)


def symbols(measured: Measured) -> Values:
    """Return the accuracy of LookUp and Permutation, and the losses of LookUp's answers and of code."""
    bed, part, base = measured.bed, measured.key.split, measured.key.base
    tasks: dict[str, SymbolTasks] = {LOOKUP.name: bed.lookup(part, base), PERMUTATION.name: bed.permutation(part, base)}
    logits = {name: outputs(measured, task.ids) for name, task in tasks.items()}
    values = {name: 100 * float(task.correct(logits[name]).double().mean()) for name, task in tasks.items()}
    code_NT = measured.documents.segments.ids_NT
    losses_N = _losses(outputs(measured, code_NT), code_NT).mean(1)
    answers_N = _losses(logits[LOOKUP.name], tasks[LOOKUP.name].ids)[:, -1]
    return {**values, LOOKUP_LOSS.name: float(answers_N.mean()), CODE_LOSS.name: float(losses_N.mean())}


def _losses(logits_NTV: Tensor, ids_NT: Tensor) -> Tensor:
    return -logits_NTV[:, :-1].log_softmax(-1).gather(2, ids_NT[:, 1:, None])[..., 0]


def tuned(**fields: Any) -> dict[str, Any]:
    """Return the settings of a lexinvariant arm."""
    return {"objective": Lexinvariant(**fields)}


CLAIM = Claim(
    slug="lexinvariant",
    version=2,
    says="After training on the same code, a model whose embeddings are drawn anew for every sequence looks random"
    " symbols up in its context more often than a model with learned embeddings.",
    metric=LOOKUP,
    delta=10.0,
    design=Pretrain(BED, measures=(symbols,)),
    arms={
        "learned": Arm("the same model with learned, tied embeddings", {"objective": CausalLM()}),
        "lexinvariant": Arm("Gaussian embeddings drawn for every sequence, tied readout, learned scale", tuned()),
        "semi": Arm("a fifth of the token types drawn for every sequence", tuned(random_ratio=0.2)),
    },
    baseline="learned",
    method="lexinvariant",
    reported=("semi",),
    metrics=(PERMUTATION, LOOKUP_LOSS, CODE_LOSS),
    looks=(5,),
    tune={"learning_rate": (1e-3, 3e-3, 6e-3)},
    equal=("tokens",),
    parity="The same code, network and steps; symbols are letters and digits, frequent in the code, so both models know"
    " them. A prediction is one pass; lexinvariant draws one table a task.",
    minutes=60,
    reason="in a pilot of half the steps of version 1 the model had begun to learn and looked up hardly any symbol; a"
    " run takes minutes, so there is a single look",
    use_when="the meaning of symbols is given by their context alone",
    otherwise="learned embeddings",
    toy={"steps": 20, "learning_rate": 1e-2},
    golden={
        "learned": {LOOKUP_LOSS.name: 5.55968, CODE_LOSS.name: 5.32059},
        "lexinvariant": {LOOKUP_LOSS.name: 5.98421, CODE_LOSS.name: 5.58068},
    },
)
