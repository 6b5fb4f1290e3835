"""Formats in which a model fills holes in a text: CodeGen2's sentinels, and fill-in-the-middle (FIM) tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from intaglio.errors import IntaglioError

MASK, SEPARATOR, END = "<mask_{}>", "<sep>", "<eom>"
"""Token names of CodeGen2's released checkpoints; masks count from 1."""

FIM = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Names of the three tokens in published models; the first are those of new ones."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of CodeGen2's tokens: `masks` in order, `<sep>`, `<eom>` and the end of text."""

    masks: tuple[int, ...]
    separator: int
    end: int
    end_of_text: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Self | None:
        """Return the sentinels of a tokenizer, or None if it lacks some."""
        known: dict[str, int] = tokenizer.get_vocab()
        masks: list[int] = []
        while MASK.format(len(masks) + 1) in known:
            masks.append(known[MASK.format(len(masks) + 1)])
        if not masks or SEPARATOR not in known or END not in known or tokenizer.eos_token_id is None:
            return None
        return cls(tuple(masks), known[SEPARATOR], known[END], tokenizer.eos_token_id)

    @property
    def added(self) -> tuple[int, ...]:
        """All ids but the end of text."""
        return (*self.masks, self.separator, self.end)

    @property
    def border(self) -> int:
        """The token after which the answers come."""
        return self.separator

    @property
    def holes(self) -> int:
        """Most holes of a prompt."""
        return len(self.masks)

    def prompt(self, pieces: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> list[int]:
        """Return the prompt of the next hole, given the text around the holes and the answers so far."""
        context = [t for mask, piece in zip(self.masks, pieces[:-1], strict=False) for t in (*piece, mask)]
        given = [t for mask, answer in zip(self.masks, answers, strict=False) for t in (mask, *answer, self.end)]
        return [*context, *pieces[-1], self.end_of_text, self.separator, *given, self.masks[len(answers)]]


@dataclass(frozen=True)
class FillInMiddle:
    """Ids of the three tokens of FIM and of the end of text, which ends the middle.

    The order is prefix, suffix, middle (PSM), or with `spm` suffix, prefix, middle.
    """

    prefix: int
    suffix: int
    middle: int
    end: int
    spm: bool = False
    holes = 1

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Self | None:
        """Return the tokens of a tokenizer, or None if it has none."""
        known = tokenizer.get_vocab()
        names = next((names for names in FIM if all(name in known for name in names)), None)
        if names is None or tokenizer.eos_token_id is None:
            return None
        prefix, suffix, middle = (known[name] for name in names)
        return cls(prefix, suffix, middle, tokenizer.eos_token_id)

    @property
    def added(self) -> tuple[int, ...]:
        """All ids but the end of text."""
        return (self.prefix, self.suffix, self.middle)

    masks = added

    @property
    def border(self) -> int:
        """The token after which the answer comes."""
        return self.middle

    @property
    def end_of_text(self) -> int:
        """The end of text, which ends the middle as well."""
        return self.end

    def prompt(self, pieces: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> list[int]:
        """Return the prompt of the hole between a prefix and a suffix."""
        before, after = pieces
        if self.spm:
            return [self.prefix, self.suffix, *after, self.middle, *before]
        return [self.prefix, *before, self.suffix, *after, self.middle]


def infill_format(tokenizer: Any, source: str) -> Sentinels | FillInMiddle:
    """Return the format whose tokens a tokenizer has; `source` names the model in the error message."""
    form = Sentinels.from_tokenizer(tokenizer) or FillInMiddle.from_tokenizer(tokenizer)
    if form is None:
        raise IntaglioError(
            f"{source} cannot fill holes: its tokenizer has neither <mask_1>, <sep> and <eom> nor fill-in-the-middle"
            " tokens; train it with the objective codegen2"
        )
    return form


def check_holes(form: Sentinels | FillInMiddle, pieces: Sequence[Any]) -> None:
    """Refuse texts with more or fewer holes than a format has."""
    if not 1 <= len(pieces) - 1 <= form.holes:
        raise IntaglioError(f"{len(pieces) - 1} holes are to be filled; the model knows 1 to {form.holes}")
