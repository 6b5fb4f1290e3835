"""MEAP: fine-tuned with masked input tokens, a model finds facts in longer contexts better, at equal tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from intaglio.evidence.designs.base import Measured, Values
from intaglio.evidence.designs.measures import NEEDLE_SCORE, NEEDLES, needles
from intaglio.evidence.designs.training import Finetune
from intaglio.evidence.engine.claim import Arm, Claim
from intaglio.evidence.testbeds.haystack import SPECIAL, Haystack
from intaglio.methods.objectives.meap import MEAP
from intaglio.trainer.protocols import Example

FACTS = 14
"""Questions of a document, so that its answer has 56 tokens: shorter ones than 51 have no masked copy."""
EASY = Haystack(length=32, facts=4, questions=4, steps=6000)
BED = Haystack(length=128, facts=FACTS, questions=FACTS, steps=1000, batch=16, easier=EASY)


def longer_needles(measured: Measured) -> Values:
    """Return the scores on documents twice as long as those of the training, with as many facts."""
    return needles(replace(measured, bed=replace(measured.bed, length=2 * measured.bed.length)))


class RandomTokens(MEAP):
    """MEAP whose masked copy has random words instead of the mask token."""

    def _copy(self, clean_T: torch.Tensor, begin: int, count: int, rng: torch.Generator) -> Example:
        copy = super()._copy(clean_T, begin, count, rng)
        masked_T = copy["input_ids"] == self.mask_id
        random_T = torch.randint(len(SPECIAL), int(clean_T.max()) + 1, clean_T.shape, generator=rng)
        return {**copy, "input_ids": torch.where(masked_T, random_T, copy["input_ids"])}


def tuned(kind: type[MEAP] = MEAP, **fields: Any) -> dict[str, Any]:
    """Return the settings of an arm; rows hold a whole pair."""
    return {"objective": kind(mode="finetuning", pack=False, chat=False, **fields)}


CLAIM = Claim(
    slug="meap",
    version=4,
    says="Fine-tuned with masked tokens in the answers, a model finds facts in contexts twice as long as it was trained"
    " on with a higher probability than after plain next-token prediction.",
    metric=NEEDLE_SCORE,
    delta=0.1,
    design=Finetune(BED, measures=(longer_needles,), steps=100),
    arms={
        "next token": Arm("next-token prediction of the answers", tuned(enabled=False)),
        "meap": Arm("MEAP: half of the rows are copies with 10 % of the answer masked", tuned()),
        "random tokens": Arm("MEAP with random words instead of the mask token", tuned(RandomTokens)),
        "MEAP, 15 %": Arm("MEAP with 15 % of the answer masked", tuned(ratio=0.15)),
    },
    baseline="next token",
    method="meap",
    ablations=("random tokens", "MEAP, 15 %"),
    looks=(5, 10, 20, 40),
    tune={"learning_rate": (3e-4, 1e-3, 3e-3)},
    equal=("tokens",),
    metrics=(NEEDLES,),
    parity="From one model, trained by next-token prediction of answers; rows of one length, as many steps; half of"
    " MEAP's are masked copies. Keys of the evaluation never occur in training.",
    minutes=45,
    use_when="answers lie in contexts longer than those of the fine-tuning",
    otherwise="next-token prediction",
    reason="Version 1 was registered for a GPU and never run; in a pilot at this scale pretraining with MEAP did not"
    " help, so the fine-tuning form is tested. In version 2 every fact was found after any training: documents"
    " as long as those of the training leave no room. The probe of version 3 found twenty trainings too few for .05."
    " Longer documents were chosen after pilots, one training each, with MEAP ahead there in two of three.",
    toy={"length": 128, "steps": 100, "width": 32, "learning_rate": 1e-2},
    golden={"next token": {NEEDLE_SCORE.name: -4.04822}, "meap": {NEEDLE_SCORE.name: -4.0366}},
)
