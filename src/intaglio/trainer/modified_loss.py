"""The loss of a training batch with training modifiers, and their reports."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from intaglio.errors import IntaglioError
from intaglio.trainer.protocols import Batch, Loss, ModifierSession, Objective


def modified_loss(
    objective: Objective, model: nn.Module, batch: Batch, ids_B: Tensor | None, sessions: Sequence[ModifierSession]
) -> Loss:
    """Return the objective's loss of the batch that the sessions make of `batch`, with their terms; see their class."""
    changed = {**batch, "id": ids_B}
    for session in sessions:
        changed = session.change_batch(model, changed)
    with ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session.forward_context(model, changed))
        loss = objective.loss(model, {name: value for name, value in changed.items() if name != "id"})
    total, parts = loss.total, dict(loss.parts)
    for session in sessions:
        extra = session.extra_loss(model, changed, loss.outputs)
        if extra is not None:
            total, parts = total + extra.total, {**parts, **extra.parts}
    return Loss(total, parts, loss.outputs)


def check_modifiers(modifiers: Sequence[Any]) -> None:
    """Refuse modifiers that mix examples beside others that do, or that keep targets of single examples."""
    setting = [modifier.slug for modifier in modifiers if getattr(modifier, "sets_targets", False)]
    if len(setting) > 1:
        raise IntaglioError(
            f"{setting[0]} and {setting[1]} both set the targets of a batch, and neither takes the other's; leave one"
            " of them out"
        )


def session_reports(modifiers: Sequence[Any], sessions: Sequence[ModifierSession]) -> dict[str, dict[str, Any]]:
    """Return the reports of sessions that have one, by the slug or class name of their modifiers."""
    names = [getattr(modifier, "slug", type(modifier).__name__) for modifier in modifiers]
    return {name: report for name, session in zip(names, sessions, strict=True) if (report := session.report())}
