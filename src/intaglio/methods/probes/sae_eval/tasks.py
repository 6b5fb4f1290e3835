"""Tasks of the evaluation: indirect object identification, in English and in symbols.

    Then, Mary and John went to the store. John gave a drink to → Mary        (ABB: the indirect object comes first)
    Then, John and Mary went to the store. John gave a drink to → Mary        (BAB)
    <s> n3 f1 n7 f0 n7 -> → n3                                                 (symbols)

Names, objects and places are single tokens. The (unordered) pairs of names of the test prompts are not those of the
training prompts, and neither are objects, places and templates in English; names are shared, since a supervised code
exists for every value.

Dimension letters: N prompts, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import IntaglioError

Split = Literal["train", "test"]
ATTRIBUTES = ("io", "s", "pos")
"""The indirect object's name, the subject's name, and which comes first (0: ABB, 1: BAB)."""

WOMEN = (
    "Mary Anna Emma Laura Sarah Alice Julia Kate Lisa Rachel Jane Susan Linda Helen Nancy Karen Amy Maria Ruth Carol "
    "Diana Grace Rose Claire Emily Sophie Lucy Elizabeth Victoria Margaret Barbara Jennifer Jessica Michelle Rebecca"
)
MEN = (
    "John Tom James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Mark Paul Steven Andrew "
    "George Kevin Brian Edward Jason Ryan Jacob Eric Peter Adam Henry Scott Frank Jack Simon Oliver Martin Alan"
)
OBJECTS = "drink book ring kiss gift letter ball card box key phone bag cup hat coat apple photo ticket map pen"
PLACES = "store park school office house garden hospital station church market library beach museum bank farm"
TEMPLATES: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
        "Then, {a} and {b} had a long talk at the {place}, and afterwards {s} said to",
    ),
    "test": ("Then, {a} and {b} were working at the {place}. {s} decided to give a {object} to",),
}
HELD_OUT = 0.3
"""Share of the pairs of names that are in test prompts alone."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts with everything that they were made of.

    Args:
        ids_NT: int64, padded on the right.
        lengths_N: tokens of each prompt.
        attributes: `{name: int64 [N]}`, values of each attribute.
        positions: `{name: int64 [N]}`: `io`, `s1`, `s1+1`, `s2`, `end`.
        answers_N2: int64, the tokens of the indirect object and of the subject.
        choices: other draws (template, object, place) by name, for counterfactual prompts.
    """

    ids_NT: Tensor
    lengths_N: Tensor
    attributes: Mapping[str, Tensor]
    positions: Mapping[str, Tensor]
    answers_N2: Tensor
    choices: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.ids_NT)


def held_out_pair(first: int, second: int, share: float = HELD_OUT) -> bool:
    """Return whether two names (in either order) occur together in test prompts alone."""
    low, high = sorted((first, second))
    return int(hashlib.sha256(f"pair {low} {high}".encode()).hexdigest()[:8], 16) < share * 16**8


@dataclass(frozen=True, eq=False)
class IOITask:
    """Indirect object identification.

    Args:
        names: tokens of the names.
        render: returns `(ids, positions of a, b and s)` of `(a, b, s)` and the other choices.
        counts: `{choice: (values in training, values in test)}` of the other choices.
        groups: `{name: values of the names' attribute}`, further properties such as gender.
    """

    names: tuple[int, ...]
    render: Callable[[int, int, int, Mapping[str, int]], tuple[list[int], tuple[int, int, int]]]
    counts: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    groups: Mapping[str, frozenset[int]]

    def prompts(self, count: int, seed: int, split: Split = "train") -> Prompts:
        """Return prompts whose attributes are drawn independently, pairs of the other split left out."""
        draws = np.random.default_rng([seed, 0 if split == "train" else 1])
        attributes: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}
        while len(attributes["io"]) < count:
            io, s = (int(value) for value in draws.integers(len(self.names), size=2))
            pos = int(draws.integers(2))
            if io != s and held_out_pair(io, s) == (split == "test"):
                for name, value in zip(ATTRIBUTES, (io, s, pos), strict=True):
                    attributes[name].append(value)
        side = 0 if split == "train" else 1
        choices = {name: draws.choice(list(values[side]), count).tolist() for name, values in self.counts.items()}
        return self._made(attributes, choices)

    def _made(self, attributes: Mapping[str, Sequence[int]], choices: Mapping[str, Sequence[int]]) -> Prompts:
        rows, places, answers = [], [], []
        for index, (io, s, pos) in enumerate(zip(*(attributes[name] for name in ATTRIBUTES), strict=True)):
            own = {name: int(values[index]) for name, values in choices.items()}
            a, b = (io, s) if pos == 0 else (s, io)
            ids, (at_a, at_b, at_s) = self.render(self.names[a], self.names[b], self.names[s], own)
            at_io, at_s1 = (at_a, at_b) if pos == 0 else (at_b, at_a)
            rows.append(ids)
            places.append((at_io, at_s1, at_s1 + 1, at_s, len(ids) - 1))
            answers.append((self.names[io], self.names[s]))
        length = max(map(len, rows))
        lengths_N = torch.tensor([len(row) for row in rows])
        names = ("io", "s1", "s1+1", "s2", "end")
        return Prompts(
            torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows]),
            lengths_N,
            {name: torch.tensor(list(attributes[name])) for name in ATTRIBUTES},
            dict(zip(names, torch.tensor(places).T, strict=True)),
            torch.tensor(answers),
            {name: torch.tensor(list(values)) for name, values in choices.items()},
        )

    def counterfactual(self, prompts: Prompts, attribute: str, seed: int) -> Prompts:
        """Return the prompts with other values of one attribute; `pos` keeps the names and swaps their order."""
        draws = np.random.default_rng([seed, 2, ATTRIBUTES.index(attribute)])
        attributes = {name: values.tolist() for name, values in prompts.attributes.items()}
        if attribute == "pos":
            attributes["pos"] = [1 - value for value in attributes["pos"]]
        else:
            changed = []
            for io, s in zip(attributes["io"], attributes["s"], strict=True):
                taken = {io, s}
                free = [value for value in range(len(self.names)) if value not in taken]
                changed.append(int(draws.choice(free)))
            attributes[attribute] = changed
        return self._made(attributes, {name: values.tolist() for name, values in prompts.choices.items()})

    def properties(self, prompts: Prompts) -> dict[str, dict[str, Tensor]]:
        """Return what a feature may stand for, bool [N] each, by kind.

        Kinds are `io`, `s`, `pos` (a value each), `io x pos`, `s x pos`, `name` (a name anywhere) and further groups.
        """
        io, s, pos = (prompts.attributes[name] for name in ATTRIBUTES)
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("io", "s", "pos", "io x pos", "s x pos", "name")}
        for value in range(len(self.names)):
            kinds["io"][f"io={value}"], kinds["s"][f"s={value}"] = io == value, s == value
            kinds["name"][f"name={value}"] = (io == value) | (s == value)
            for order in (0, 1):
                kinds["io x pos"][f"io={value}, pos={order}"] = (io == value) & (pos == order)
                kinds["s x pos"][f"s={value}, pos={order}"] = (s == value) & (pos == order)
        for order in (0, 1):
            kinds["pos"][f"pos={order}"] = pos == order
        for group, members in self.groups.items():
            inside = torch.tensor([value in members for value in range(len(self.names))])
            kinds[group] = {f"io in {group}": inside[io], f"s in {group}": inside[s]}
        return kinds


def english(tokenizer: Any) -> IOITask:
    """Return the task in English with the names, objects and places that are single tokens.

    Raises:
        IntaglioError: the tokenizer has fewer than ten such names, or too few objects and places to split.
    """

    def single(words: str) -> list[tuple[str, int]]:
        coded = [(word, tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words.split()]
        return [(word, ids[0]) for word, ids in coded if len(ids) == 1]

    women, men = single(WOMEN), single(MEN)
    names = tuple(token for _, token in (*women, *men))
    objects, places = ([word for word, _ in single(words)] for words in (OBJECTS, PLACES))
    if len(names) < 10 or len(objects) < 4 or len(places) < 4:
        raise IntaglioError(
            f"the tokenizer has {len(names)} names, {len(objects)} objects and {len(places)} places of one token; the "
            "task needs 10, 4 and 4"
        )
    templates = [*TEMPLATES["train"], *TEMPLATES["test"]]
    trained = len(TEMPLATES["train"])
    start = tokenizer("", add_special_tokens=True)["input_ids"]
    prefix = start[:1] if start and start[0] == tokenizer.bos_token_id else []
    spelled = {token: word for word, token in (*women, *men)}

    def render(a: int, b: int, s: int, choices: Mapping[str, int]) -> tuple[list[int], tuple[int, int, int]]:
        text = templates[choices["template"]].format(
            a=spelled[a], b=spelled[b], s=spelled[s], object=objects[choices["object"]], place=places[choices["place"]]
        )
        ids = prefix + tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = [place for place, token in enumerate(ids) if token in spelled]
        if [ids[place] for place in seen] != [a, b, s]:
            raise IntaglioError(f"the tokenizer splits a name of {text!r}; the task needs names of one token")
        return ids, (seen[0], seen[1], seen[2])

    def halves(count: int) -> tuple[list[int], list[int]]:
        return list(range(0, count, 2)), list(range(1, count, 2))

    counts = {
        "template": (list(range(trained)), list(range(trained, len(templates)))),
        "object": halves(len(objects)),
        "place": halves(len(places)),
    }
    return IOITask(names, render, counts, {"women": frozenset(range(len(women)))})


def symbolic(names: int = 30, fillers: int = 8, first_token: int = 1) -> IOITask:
    """Return the task in symbols: `first_token` starts a prompt, then come `->`, the names and the fillers.

    Fillers stand after the names, the same ones in training and test prompts.
    """
    arrow = first_token + 1
    name_ids = tuple(range(arrow + 1, arrow + 1 + names))
    first_filler = arrow + 1 + names

    def render(a: int, b: int, s: int, choices: Mapping[str, int]) -> tuple[list[int], tuple[int, int, int]]:
        f, g = (first_filler + choices[name] for name in ("first", "second"))
        return [first_token, a, f, b, g, s, arrow], (1, 3, 5)

    both = (range(fillers), range(fillers))
    return IOITask(name_ids, render, {"first": both, "second": both}, {})


def subset(prompts: Prompts, rows: Tensor) -> Prompts:
    """Return some of the prompts."""

    def of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in values.items()}

    return replace(
        prompts,
        ids_NT=prompts.ids_NT[rows],
        lengths_N=prompts.lengths_N[rows],
        attributes=of(prompts.attributes),
        positions=of(prompts.positions),
        answers_N2=prompts.answers_N2[rows],
        choices=of(prompts.choices),
    )
