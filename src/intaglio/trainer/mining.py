"""Settings of hard-negative mining; `intaglio.search.hard_negatives` does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from intaglio.data.text_pairs import TextPair

Rank = Annotated[int, Field(ge=1)]


class Mining(BaseModel):
    """Hard negatives of each pair, among all texts of the training pairs.

    Args:
        encoder: `bm25` (default), `self` (the model before training), or a bundled name or directory of an encoder.
        ranks: first and last rank, from 1, among the texts that are not relevant. Default (1, 30).
        count: most negatives of a pair: the first of the window, or drawn from it. Default 8.
        sample: whether they are drawn at random from the window, keyed by the pair. Default False.
        margin: largest score of a negative as a share of the positive's, so that relevant texts that nobody labelled
            are left out (Moreira et al., 2024, arXiv 2407.15831). Default: any.
        consistency: a pair is dropped unless its positive is among the first so many results. Default: none is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    encoder: Annotated[str, Field(min_length=1)] = "bm25"
    ranks: Annotated[tuple[Rank, Rank], Field(strict=False)] = (1, 30)
    count: Annotated[int, Field(ge=1)] = 8
    sample: bool = False
    margin: Annotated[float, Field(gt=0)] | None = None
    consistency: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.ranks[0] > self.ranks[1]:
            raise ValueError(f"ranks are {self.ranks[0]} to {self.ranks[1]}; the first must not exceed the last")
        return self


Mine = Callable[[Sequence[TextPair], Mining], list[TextPair]]
"""Return pairs with hard negatives."""
