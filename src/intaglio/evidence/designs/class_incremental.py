"""Design that teaches classes task by task on fixed embeddings and measures all of them: `ClassIncremental`.

Settings of an arm: `method`, a `DKVB`, or `baseline`, `nearest mean` or `linear probe`; `at_once`: all classes in one
task (default false); `keys`: texts that the keys are fitted to, `others` (default) or `own`, the training texts;
everything else is a field of the method or an argument of the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.evidence.baselines.incremental import LinearProbe, NearestMean
from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.newsgroups import Embedded, Newsgroups
from intaglio.measures.memory import peak_memory
from intaglio.methods.activations.dkvb import DKVB

INCREMENTAL = Metric("accuracy over all classes", "points", "higher", continuous=False)
FIRST_TASK = Metric("accuracy on the first task", "points", "higher", continuous=False)
LOSS = Metric("negative log-likelihood of the scores", "nats")
MEMORY = Metric("numbers kept", "thousands", continuous=False)


@dataclass(frozen=True)
class ClassIncremental(BedDesign):
    """Learn `tasks` of classes one after another, and classify test texts of all; a unit is an order of the classes.

    No task is announced and no text seen again; there is one decision over all classes.
    """

    bed: Newsgroups = field(default_factory=Newsgroups)
    tasks: int = 10
    MINIATURE: ClassVar[Mapping[str, Any]] = {"tasks": 3}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Teach an arm the tasks of a unit and measure it."""
        own, seed = Configured(arm, settings), key.seed
        data, test = self.bed.training(seed), self.bed.texts(key.split)
        tasks = self.bed.tasks(seed, self.tasks)
        classes = [name for task in tasks for name in task]
        stages = [tuple(classes)] if own.pop("at_once", False) else tasks
        parts = [data.take([i for i, label in enumerate(data.labels) if label in stage]) for stage in stages]
        with peak_memory(torch.device("cpu")) as spent:
            learner = self._learner(own, data, classes, seed)
            for part in parts:
                learner.learn(part.z_ND, part.labels, seed)
            scores_NL = learner.scores(test.z_ND)
        target_N = torch.tensor([learner.classes.index(label) for label in test.labels])
        hits = (scores_NL.argmax(1) == target_N).tolist()
        first = [hit for hit, label in zip(hits, test.labels, strict=True) if label in tasks[0]]
        values = {
            INCREMENTAL.name: 100 * sum(hits) / len(hits),
            FIRST_TASK.name: 100 * sum(first) / len(first),
            MEMORY.name: learner.numbers / 1000,
            LOSS.name: float(F.cross_entropy(scores_NL, target_N)),
        }
        parity = {"training": digest(data.names), "tasks": digest(tasks), "test": digest(test.names)}
        return Result(values, Cost(len(data.names), seconds=spent.seconds, peak_bytes=spent.bytes), parity)

    def _learner(self, own: Configured, data: Embedded, classes: list[str], seed: int) -> Any:
        method, baseline = own.pop("method"), own.pop("baseline")
        if method is not None:
            keys_ND = {"others": self.bed.others(), "own": data.z_ND}[own.pop("keys", "others")]
            method = own.fill(method.model_copy(update={"max_classes": len(classes)}))
            own.check()
            return _Taught(method.start(keys_ND, (), seed=seed))
        if baseline == "nearest mean":
            return NearestMean(**own.arguments(NearestMean))
        return LinearProbe(data.z_ND.shape[1], classes, **own.arguments(LinearProbe))


class _Taught:
    """A `DKVB` with the interface of the baselines."""

    def __init__(self, ready: DKVB) -> None:
        self.ready = ready
        self.numbers = sum(tensor.numel() for tensor in ready._bottleneck.state_dict().values())

    @property
    def classes(self) -> tuple[str, ...]:
        return self.ready.classes

    def learn(self, z_ND: Tensor, labels: Any, seed: int) -> None:
        self.ready.learn_embeddings(z_ND, labels, seed=seed)

    def scores(self, z_ND: Tensor) -> Tensor:
        return self.ready.probs(z_ND).log()
