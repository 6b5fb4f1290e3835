"""The drafter that drafts nothing: the loop alone, as a baseline and where drafts would lose."""

from __future__ import annotations

from dataclasses import dataclass

from intaglio.speculative.protocols import DecodingRun, Session, Step, by_row
from intaglio.speculative.tree import TokenTree, root_only


class Undrafted:
    """Drafter without drafts."""

    needs_hidden = False

    def start(self, run: DecodingRun) -> Session:
        """Start a run; see `Drafter.start`."""
        return by_row(run, lambda prompt: _Roots(prompt[-1]))


@dataclass
class _Roots:
    last: int

    def propose(self, room: int) -> TokenTree:
        return root_only(self.last)

    def observe(self, step: Step) -> None:
        self.last = step.tokens[-1]
