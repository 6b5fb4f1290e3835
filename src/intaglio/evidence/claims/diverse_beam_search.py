"""Diverse beam search: more of the valid kinds of output than beam search, at equal beams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intaglio.evidence.designs.generate import TOP_1, Generate
from intaglio.evidence.designs.outputs import beam_search, diverse_beams, samples, written
from intaglio.evidence.engine.claim import Arm, Claim, Metric
from intaglio.evidence.testbeds.one_to_many import MODES, OBJECTS, PLACES, OneToMany, modes_found, output
from intaglio.measures.generated_text import distinct_n, self_overlap

FOUND = Metric("modes found", "share", "higher", continuous=False)
VALID = Metric("valid outputs", "share", "higher", continuous=False)
DISTINCT_2 = Metric("distinct-2", "share", "higher", continuous=False)
OVERLAP_2 = Metric("self-overlap of bigrams", "share", continuous=False)


def score(prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> Mapping[str, float]:
    """Return the modes found, the valid outputs, and diversity without regard to validity."""
    diversity = {DISTINCT_2.name: distinct_n(outputs, 2), OVERLAP_2.name: self_overlap(outputs, 2)}
    return {**modes_found(prompt, outputs), **diversity}


def every_mode(prompt: Sequence[int]) -> list[list[int]]:
    """Return an output of each mode in its likeliest wording."""
    return [output(prompt[1 : 1 + OBJECTS], mode, [0] * PLACES) for mode in range(len(MODES))]


CLAIM = Claim(
    slug="diverse_beam_search",
    version=1,
    says="With six beams, diverse beam search finds more of the valid kinds of output than beam search.",
    metric=FOUND,
    delta=0.05,
    design=Generate(OneToMany(), score=score, likelihood=True),
    arms={
        "beams": Arm(
            "stock beam search with six beams",
            {"generator": beam_search},
            tune={"length_penalty": (0.0, 0.5, 1.0), "early_stopping": (False, True)},
        ),
        "diverse": Arm(
            "diverse beam search, hamming",
            {"generator": diverse_beams},
            tune={"groups": (3, 6), "penalty": (0.2, 0.5, 0.8)},
        ),
        "all modes": Arm(
            "an output of each mode, as an oracle writes them", {"generator": written, "write": every_mode}
        ),
        "raw": Arm("diverse, penalties not accumulated", {"generator": diverse_beams, "accumulate": "raw"}),
        "cumulative": Arm("diverse, cumulative", {"generator": diverse_beams, "dissimilarity": "cumulative"}),
        "samples": Arm("six independent samples", {"generator": samples}),
    },
    baseline="beams",
    method="diverse",
    ceiling="all modes",
    ablations=("raw", "cumulative"),
    reported=("samples",),
    closed=("groups", "early_stopping", "length_penalty"),
    unit_names=("eight inputs",),
    metrics=(VALID, TOP_1, DISTINCT_2, OVERLAP_2),
    parity="Six outputs of one trained model for each input; both searches run six beams a step. Inputs are sampled.",
    minutes=10,
    use_when="one prompt has several good answers and you want to see them",
    otherwise="beam search",
    golden={"beams": {TOP_1.name: -11.5839}, "diverse": {TOP_1.name: -11.586}},
)
