"""Design that answers questions about facts in a shortened context: `CompressedFacts`.

Settings of an arm: `context`, what a plain decoder reads before the questions: `all` of it, or as many of its `last`
tokens as there are chunks (default); or `method`, a `Refrag` that reads it as chunks, with `stages`, those that are
trained before the answers (default: the first two), and `policy`, whether its policy is trained too (default: no). What
else is given are fields of the method, and `learning_rate`, the peak rate of every stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.designs.base import BedDesign, Configured, Settings, training_cost
from intaglio.evidence.designs.measures import NEEDLE_SCORE, NEEDLES
from intaglio.evidence.engine.claim import Arm, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.cached_models import copied
from intaglio.evidence.testbeds.haystack import Haystack
from intaglio.measures.memory import peak_memory
from intaglio.methods.retrieval.refrag import Refrag
from intaglio.methods.retrieval.refrag.passages import choose_expanded
from intaglio.trainer import CausalLM, train
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.dataset import read_rows
from intaglio.trainer.protocols import Example
from intaglio.trainer.rng import KeyedRNG

POSITIONS = Metric("positions of the decoder before a question", "positions", continuous=False)
BATCH = 64


@dataclass(frozen=True)
class CompressedFacts(BedDesign):
    """Train the test bed's decoder to answer from the context that an arm gives it, and ask single questions.

    Every arm takes as many steps in all, each on the same documents.

    Args:
        bed: test bed; its decoder reads whole contexts.
        chunk_size: tokens of a chunk, which decides how many tokens `last` leaves.
        steps: of reconstruction, of continual training, and of training on answers.
        policy_steps: of the policy, after the others.
        asked: questions of a document that are measured.
    """

    bed: Haystack = field(default_factory=Haystack)
    chunk_size: int = 4
    steps: tuple[int, int, int] = (200, 200, 400)
    policy_steps: int = 20
    asked: int = 4
    MINIATURE: ClassVar = {"steps": (2, 2, 2), "policy_steps": 1, "asked": 1}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Train an arm on a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        rate, method, context = own.pop("learning_rate"), own.pop("method"), own.pop("context", "last")
        stages, policy = own.pop("stages", ("reconstruction", "continual")), own.pop("policy", False)
        if method is not None:
            method = own.fill(method)
        own.check()
        total = sum(self.steps)
        ids_NT = self.bed.draw("train", total * self.bed.batch, seed).segments.ids_NT
        checkpoint = copied(self.bed.load())
        options: dict[str, Any] = {"batch_size": self.bed.batch, "learning_rate": rate, "seed": seed % 2**31}
        with peak_memory(checkpoint.device) as spent:
            if method is None:
                rows = [self._plain(self._question(row, self._first), context) for row in ids_NT]
                train(checkpoint, rows, objective=CausalLM(pack=False), steps=total, **options)
            else:
                self._train(checkpoint, method, ids_NT, stages, options)
                if policy:
                    asked = [self._question(row, self._first) for row in ids_NT[-self.policy_steps * self.bed.batch :]]
                    fields = {"stages": ["policy"], "steps": self.policy_steps, "batch_size": self.bed.batch}
                    method.model_copy(update=fields).fit(checkpoint, asked, seed=seed % 2**31)
            right, score, positions = self._measure(checkpoint, method, context, key)
        values = {NEEDLES.name: 100 * right, NEEDLE_SCORE.name: score, POSITIONS.name: positions}
        parity = {"training": digest(ids_NT.tolist()), "start": digest(self.bed.settings("facts", "length", "steps"))}
        return Result(values, training_cost(checkpoint, ids_NT.numel(), spent), parity)

    @property
    def _first(self) -> int:
        """Position of the first question."""
        bed = self.bed
        return bed.length - bed.questions * (1 + bed.key_tokens + bed.value_tokens)

    def _train(
        self, checkpoint: Checkpoint, method: Refrag, ids_NT: Tensor, stages: Any, options: dict[str, Any]
    ) -> None:
        """Run the stages, then train on the answers; stages that are left out give their steps to the answers."""
        counts = dict(zip(("reconstruction", "continual"), self.steps, strict=False))
        counts = {stage: counts[stage] for stage in stages}
        counts["task"] = sum(self.steps) - sum(counts.values())
        size, begin = self.chunk_size, 0
        length = (self._first - 1) // size * size
        for stage, steps in counts.items():
            part_NT = ids_NT[begin : begin + steps * self.bed.batch]
            begin += len(part_NT)
            data: list[Any] = {
                "reconstruction": lambda rows: list(rows[:, : self._first]),
                "continual": list,
                "task": lambda rows: [self._question(row, self._first) for row in rows],
            }[stage](part_NT)
            target = self.bed.length - 1 - length
            own = method.model_copy(update={"stages": [stage], "length": length, "target_length": target})
            train(checkpoint, data, objective=own, freeze=stage == "reconstruction", steps=steps, **options)

    def _question(self, ids_T: Tensor, start: int, stop: int | None = None) -> Example:
        """Return the context of a document with its text from `start` to `stop`, of which the values are answers."""
        bed, answer = self.bed, ids_T[start:stop]
        one = 1 + bed.key_tokens + bed.value_tokens
        is_value = torch.arange(len(answer)) % one > bed.key_tokens
        labels = torch.where(is_value, answer, IGNORED)
        return {
            "before_ids": ids_T[:1],
            "passage_ids": [ids_T[1 : self._first]],
            "answer_ids": answer,
            "labels": labels,
        }

    def _plain(self, row: Example, context: str) -> Example:
        """Return a question's row for a plain decoder."""
        (passage,) = row["passage_ids"]
        if context == "last":
            passage = passage[-math.ceil(len(passage) / self.chunk_size) :]
        before = torch.cat([row["before_ids"], passage])
        labels = torch.cat([torch.full_like(before, IGNORED), row["labels"]])
        return {"input_ids": torch.cat([before, row["answer_ids"]]), "labels": labels}

    @torch.no_grad()
    def _measure(
        self, checkpoint: Checkpoint, method: Refrag | None, context: str, key: RunKey
    ) -> tuple[float, float, float]:
        """Return the share of right answers, their mean log-probability, and the positions before a question."""
        checkpoint.model.eval()
        one = 1 + self.bed.key_tokens + self.bed.value_tokens
        rows = [
            self._question(ids_T, start, start + one)
            for ids_T in self.bed.documents(key.split, key.base).segments.ids_NT
            for start in range(self._first, self._first + self.asked * one, one)
        ]
        right, score, positions = [], [], []
        for logits_BTV, target_BT in self._passes(checkpoint, method, rows, context):
            asked_BT = target_BT != IGNORED
            chosen_BT = logits_BTV.argmax(-1) == target_BT
            right += (chosen_BT | ~asked_BT).all(1).tolist()
            losses_BT = F.cross_entropy(logits_BTV.mT, target_BT, ignore_index=IGNORED, reduction="none")
            score += (-losses_BT.sum(1)).tolist()
            # The first value is predicted at the last token of the key.
            positions += (asked_BT.int().argmax(1) - self.bed.key_tokens).tolist()
        return sum(right) / len(right), sum(score) / len(score), sum(positions) / len(positions)

    def _passes(
        self, checkpoint: Checkpoint, method: Refrag | None, rows: list[Example], context: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and targets of batches."""
        rng = KeyedRNG(0, training=False)
        objective: Any = CausalLM(pack=False)
        if method is not None:
            restored: Refrag = checkpoint.fitted("refrag", expand=method.expand, expander=method.expander)
            objective = restored.model_copy(update={"stages": ["task"]})
        else:
            rows = [self._plain(row, context) for row in rows]
        made = read_rows(checkpoint, rows, objective, rng).table or []
        for low in range(0, len(made), BATCH):
            part = made[low : low + BATCH]
            batch = objective.collate(part, rng)
            if method is not None and method.expand:
                batch = objective.batch(part, [self._expanded(checkpoint, objective, row) for row in part])
            yield objective.loss(checkpoint.model, batch).outputs.float(), batch["target"]

    def _expanded(self, checkpoint: Checkpoint, method: Refrag, row: Example) -> tuple[int, ...]:
        passages = method.compress(checkpoint, [row["context"]])
        seed = int(row["answer"].sum())
        return choose_expanded(passages, method.expand, method.expander, compressor=method.compressor, seed=seed)  # type: ignore[arg-type]
