"""Statistics of lexical unit decoding: threshold, agreement and speed-up are reported together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from intaglio.speculative.statistics import Statistics


@dataclass
class UnitStatistics(Statistics):
    """Counts of one run; `nodes` are slots read, `accepted` tokens taken from them.

    Attributes:
        threshold: beta, the least confidence with which a slot's token was taken.
        verified: whether the model verified them; the output is its own then.
        checked: tokens taken from slots that a later pass read again, which excludes those of a row's last pass.
        agreed: how many of these the unaided model would have chosen after the same text.
        confident: slots after the first that were confident enough to be taken.
        repeated: how many of these repeated their predecessor, whether the guard stopped them or not.
    """

    threshold: float = 0.0
    verified: bool = False
    checked: int = 0
    agreed: int = 0
    confident: int = 0
    repeated: int = 0

    @property
    def agreement(self) -> float:
        """Share of the tokens that the unaided model would have chosen after the same text.

        The first token of every pass is its own, drawn or not; the others are compared with its most likely token.
        """
        if self.verified or not self.tokens:
            return 1.0
        own = self.tokens - self.accepted
        return (own + self.agreed) / (own + self.checked)

    @property
    def speed_up(self) -> float:
        """Speed-up in passes: tokens per pass, of which the unaided model has one.

        A pass reads more rows here, so the speed-up in seconds is less.
        """
        return self.tokens_per_pass

    @property
    def spans(self) -> dict[int, int]:
        """Number of passes (by row, without the prefill) by the number of tokens emitted."""
        return dict(sorted(Counter(length + 1 for length in self.lengths).items()))

    @property
    def single_share(self) -> float:
        """Share of these passes that emitted one token."""
        return self.lengths.count(0) / len(self.lengths) if self.lengths else 0.0

    @property
    def duplicated_share(self) -> float:
        """Share of the confident slots after the first that repeated their predecessor."""
        return self.repeated / self.confident if self.confident else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        names = ("threshold", "agreement", "speed_up", "verified", "checked", "agreed", "spans", "single_share",
                 "confident", "repeated", "duplicated_share")  # fmt: skip
        return super().as_dict() | {name: getattr(self, name) for name in names}
