"""PASER (He et al., PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery, ICLR 2026).

Which few instructions bring a pruned model back? Those that ask for what it lost, are cheap to learn from, and do not
contradict each other:

    clusters c_k of what is asked for        (`vectors`, `clusters`: spectral coordinates, non-negative factorisation)
    J_i = mean over tokens of JSD(pruned, original)                                                      (`divergence`)
    CDS_k = mean of J_i in c_k,  n_k = B CDS_k / sum of CDS,  IES_i = J_i / ln(tokens_i ** 2)               (`budgets`)
    of each cluster the n_k samples of highest IES that fit a graph of concepts                   (`concepts`, `walk`)

- `samples`: examples, read as they will be trained on.
- `choice`: what was chosen, for people.
- here: `PASER`, a selector of a `train` step.

Where paper and released code part: the code sums the divergence over the tokens of the instruction alone, counts
characters of the output in the cost, drops what rounding leaves of a budget, gives an unsymmetric Laplacian to a solver
for symmetric ones, and asks both models twice. Here each is asked once, and `released` gives the code's choices.

What its later version names but does not lay down (weights for conflicts of low confidence, an order by entailment) is
here as far as it needs no further model: `inconsistent: last`, and `synonyms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from intaglio.checkpoint import Checkpoint, load
from intaglio.errors import IntaglioError
from intaglio.methods.base import Capability, Cost, Method, Progress, Workload, no_progress
from intaglio.methods.training.paser.budgets import budgets, efficiency
from intaglio.methods.training.paser.choice import Choice, Pool, tell
from intaglio.methods.training.paser.clusters import Clusters, Init, cluster
from intaglio.methods.training.paser.concepts import ConsistencyGraph, key_phrases
from intaglio.methods.training.paser.divergence import Reduce, Scope, degradation, jsd
from intaglio.methods.training.paser.looking import check_installed, concepts_of, first_alike, timed
from intaglio.methods.training.paser.samples import Sample, read_samples
from intaglio.methods.training.paser.vectors import vectors
from intaglio.methods.training.paser.walk import Order, walk
from intaglio.trainer.dataset import all_examples
from intaglio.trainer.protocols import Example, Selection
from intaglio.trainer.rng import KeyedRNG, generator

__all__ = [
    "PASER",
    "Choice",
    "Clusters",
    "ConsistencyGraph",
    "Pool",
    "Sample",
    "budgets",
    "cluster",
    "efficiency",
    "jsd",
    "key_phrases",
]

CONCEPTS = 8
"""Key phrases of a sample. With all of them nearly any two samples share some, and nearly none would fit."""


class PASER(Method, slug="paser"):
    """Chooses the examples that win back most of what pruning lost, for a `train` step.

        J_i = mean over tokens of JSD(p_pruned, p_original);  CDS_k = mean of J_i in cluster k
        n_k = B CDS_k / sum of CDS;  IES_i = J_i / ln(tokens_i ** 2)

    Instructions are clustered by what they ask for; a cluster has a budget by how far the pruned model has come from
    the original on it; of each cluster those are taken first that have a high divergence for their length, and that
    do not put two known concepts together which were apart so far. In a recipe, behind a pruning step:
    `train: {select: {paser: {budget: 0.2}}, instructions: pairs.jsonl, lora: {r: 8}, ...}`. From Python
    `intaglio.train(pruned, pairs, select=intaglio.PASER(), original=dense, ...)`, or `choose` alone.

    Pairs (`prompt` and `answer`) are scored on their answers; of plain texts every token counts. Examples that say the
    same count once. Where nothing is degraded every cluster has the same budget, and short samples come first.

    Args:
        budget: share B of the examples, above 0 and at most 1. Default 0.2, the paper's for Alpaca (0.04 for the fifty
            times larger LaMini).
        count: B as a number of examples, in the place of `budget`. Default: the share.
        original: what the model is compared with: a bundled name, a directory or a hub id. Default: the model as it
            was before the recipe.
        embedding: what instructions are clustered by: `minilm` (default), another encoder (a directory or a hub id),
            or `tfidf`, their words, which needs none.
        clusters: K; 1 does not cluster. Default 10, the released code's. null: the paper's rule, the K whose
            factorisation has the least error; where samples form no clear groups that is 2.
        most_clusters: that the rule may find. Default 12.
        neighbours: of a sample in the graph of samples. Default: all of up to 2,000 samples, 32 of more.
        landmarks: samples that are factorised; the others go with the nearest of them. Default 2,000.
        time: of diffusion: spectral coordinates are weighted by (1 - eigenvalue) ** time. Default 0: not weighted.
        start: of the factorisation: `nndsvda` (default) or `random`.
        scope: whose tokens J is taken over: `answer` (default), `prompt` or `both`.
        reduce: `mean` (default) over them, or `sum`, where long samples dominate.
        budgets: of clusters: by `degradation` (default), `uniform`, or by `size`.
        rank: what comes first in a cluster: `efficiency` (default, IES), `degradation` (J) or `random`.
        leftover: what rounding leaves of the budget and small clusters cannot fill is `redistributed` (default) or
            `dropped`.
        order: clusters are gone through `round_robin` (default) or one after the other (`sequential`), as the paper
            has it; the graph gets stricter on the way, and the last clusters starve.
        consistency: whether samples that do not fit the graph of concepts are left out. Default true.
        concepts: key phrases of a sample that the graph knows, the best by RAKE. Default 8; null: all.
        synonyms: cosine from which two phrases are one concept, by the vectors of `embedding`. Default: only equal
            phrases are.
        inconsistent: samples that do not fit are `skipped` (default), or taken `last`, where the budget is not filled.
        candidates: examples that are looked at, drawn where there are more: it bounds the time of a choice out of many.
            Default: all.
        most_rejected: if a larger share of the samples does not fit, the graph says nothing, and the choice is made
            without it. Default 0.5.
        length: tokens of an example that are scored. Default: the model's context, at most 1,024 (the paper's 256).
        chat: whether prompts are put into the tokenizer's chat template, if it has one. Default true.
        batch_size: examples that pass through both models at a time. Default 8.

    Raises:
        IntaglioError: (while choosing) there is no model to compare with, or its tokenizer is another; the budget
            chooses nothing or more than there is; an example is malformed; scikit-learn is missing.

    Source: He et al., PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery, ICLR
    2026; code BokwaiHo/PASER.
    """

    requires: ClassVar[frozenset[Capability]] = frozenset({"causal", "tokenizer"})

    budget: Annotated[float, Field(gt=0, le=1)] = 0.2
    count: Annotated[int, Field(ge=1)] | None = None
    original: Annotated[str, Field(min_length=1)] | None = None
    embedding: Annotated[str, Field(min_length=1)] = "minilm"
    clusters: Annotated[int, Field(ge=1)] | None = 10
    most_clusters: Annotated[int, Field(ge=2)] = 12
    neighbours: Annotated[int, Field(ge=1)] | None = None
    landmarks: Annotated[int, Field(ge=2)] = 2000
    time: Annotated[float, Field(ge=0)] = 0.0
    start: Init = "nndsvda"
    scope: Scope = "answer"
    reduce: Reduce = "mean"
    budgets: Literal["degradation", "uniform", "size"] = "degradation"
    rank: Literal["efficiency", "degradation", "random"] = "efficiency"
    leftover: Literal["redistributed", "dropped"] = "redistributed"
    order: Order = "round_robin"
    consistency: bool = True
    concepts: Annotated[int, Field(ge=1)] | None = CONCEPTS
    synonyms: Annotated[float, Field(gt=0, le=1)] | None = None
    inconsistent: Literal["skipped", "last"] = "skipped"
    most_rejected: Annotated[float, Field(ge=0, le=1)] = 0.5
    candidates: Annotated[int, Field(ge=1)] | None = None
    length: Annotated[int, Field(ge=2)] | None = None
    chat: bool = True
    batch_size: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.original is not None and not self._compared:
            raise ValueError("original is given, and neither budgets nor rank compares with it; leave it out")
        if self.synonyms is not None and not self.consistency:
            raise ValueError("synonyms belong to the graph of concepts; leave them out, or consistency: false")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """As the paper lays it down: the rule for K, every key phrase, clusters one after the other, 256 tokens.

        Args:
            overrides: fields that the caller sets.
        """
        given = {"clusters": None, "concepts": None, "order": "sequential", "length": 256, "most_rejected": 1.0}
        return cls(**{**given, "leftover": "dropped", **overrides})

    @classmethod
    def released(cls, **overrides: Any) -> Self:
        """As the authors' code chooses: ten clusters, divergences summed over the prompt.

        Args:
            overrides: fields that the caller sets.
        """
        return cls.paper(**{"clusters": 10, "start": "random", "scope": "prompt", "reduce": "sum", **overrides})

    @classmethod
    def uniform(cls, **overrides: Any) -> Self:
        """A baseline: as many of each cluster, at random; no model is asked.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"budgets": "uniform", "rank": "random", "consistency": False, **overrides})

    @classmethod
    def top(cls, **overrides: Any) -> Self:
        """A baseline: those of the highest J, without clusters, length or graph.

        Args:
            overrides: fields that the caller sets.
        """
        return cls(**{"clusters": 1, "rank": "degradation", "consistency": False, **overrides})

    @property
    def compares(self) -> bool:
        """Whether it needs the model as it was before the recipe."""
        return self._compared and self.original is None

    @property
    def _compared(self) -> bool:
        return self.rank != "random" or (self.budgets == "degradation" and self.clusters != 1)

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress = no_progress,
    ) -> Selection:
        """Return the indices of the chosen examples, and what is told of them.

        Args:
            dataset: pairs, texts or token ids.
            model: pruned; left as it is.
            original: the same before it was pruned.
            budget: share of the examples.
            rng: the source of anything random.
            progress: called as work goes on.

        Raises:
            IntaglioError: see the class.
        """
        wanted = self._wanted(len(dataset), budget)  # refused before any work
        choice = self.pick(self.look(dataset, model, original, seed=rng.seed, progress=progress), wanted, seed=rng.seed)
        return Selection(choice.indices, {**choice.told, "bars": choice.bars})

    def choose(
        self,
        examples: Sequence[Any],
        model: Checkpoint,
        original: Checkpoint | None = None,
        *,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> Choice:
        """Choose outside of a training: the indices, a table and what is told.

        Args:
            examples: pairs, texts or token ids, as `train` takes them.
            model: pruned; left as it is.
            original: the same before it was pruned.
            seed: of anything random. Default 0.
            progress: called as work goes on.

        Raises:
            IntaglioError: see the class.
        """
        read = all_examples(model, list(examples)) or []
        wanted = self._wanted(len(read), self.budget)
        return self.pick(self.look(read, model, original, seed=seed, progress=progress), wanted, seed=seed)

    def read(self, examples: Sequence[Example], model: Checkpoint) -> list[Sample]:
        """Read examples as they will be trained on.

        Args:
            examples: pairs, or examples with `input_ids` and perhaps `text`.
            model: whose tokenizer reads them.

        Raises:
            IntaglioError: one is malformed.
        """
        return read_samples(examples, model, self.length, chat=self.chat)

    def look(
        self,
        examples: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None = None,
        *,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> Pool:
        """Find out what choosing goes by: clusters, divergences, concepts; all that takes time.

        Args:
            examples: see `read`.
            model: pruned.
            original: before.
            seed: of anything random. Default 0.
            progress: called as work goes on.

        Raises:
            IntaglioError: see the class.
        """
        check_installed()
        samples = self.read(examples, model)
        first = first_alike(samples)
        kept = sorted(set(first))
        if self.candidates is not None:
            drawn = torch.randperm(len(kept), generator=generator(seed, "paser", "candidates"))
            kept = sorted(kept[n] for n in drawn[: self.candidates].tolist())
        different = [samples[n] for n in kept]
        seconds: dict[str, float] = {}
        labels, errors = [0] * len(kept), {}
        if self.clusters != 1 and len(kept) > 1:
            with timed(seconds, "embedding"):
                vectors_ND = vectors([one.instruction for one in different], self.embedding, progress=progress)
            with timed(seconds, "clustering"):
                found = cluster(
                    vectors_ND,
                    self.clusters,
                    most=self.most_clusters,
                    neighbours=self.neighbours,
                    landmarks=self.landmarks,
                    time=self.time,
                    init=self.start,
                    seed=seed,
                )
            labels, errors = found.labels.tolist(), found.errors
        scores: list[float] = []
        if self._compared:
            with timed(seconds, "comparing"):
                scores = self._scores(different, model, original, progress)
        concepts: list[list[str]] = []
        if self.consistency:
            with timed(seconds, "concepts"):
                concepts = concepts_of(different, self.concepts, self.synonyms, self.embedding, progress)
        return Pool(
            kept,
            different,
            labels,
            scores,
            concepts,
            seconds,
            errors,
            examples=len(samples),
            duplicates=len(samples) - len(set(first)),
        )

    def pick(self, pool: Pool, count: int, *, seed: int = 0) -> Choice:
        """Choose from a pool that was looked at; the fields that say how may be others than those it was looked at by.

        Args:
            pool: from `look`; it has what the fields ask for.
            count: examples at the most.
            seed: of a random order. Default 0.
        """
        labels = [0] * len(pool.labels) if self.clusters == 1 else list(pool.labels)
        clusters: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
        for n, label in enumerate(labels):
            clusters[label].append(n)
        key = self._key(pool, seed)
        ranked = [sorted(members, key=key) for members in clusters]
        by_cluster = [_mean([pool.degradation[n] for n in some]) for some in clusters] if pool.degradation else []
        weights = {
            "degradation": by_cluster or [0.0] * len(clusters),
            "uniform": [1.0] * len(clusters),
            "size": [float(len(members)) for members in clusters],
        }[self.budgets]
        whole = self.leftover == "redistributed"
        graph, done = "not asked for", None
        if self.consistency:
            last = self.inconsistent == "last"
            done = walk(
                ranked, weights, count, concepts=pool.concepts.__getitem__, order=self.order, whole=whole, last=last
            )
            graph = "graph of concepts"
            if done.rate > self.most_rejected:
                graph = f"left out: {done.rate:.0%} of the samples did not fit the graph of concepts"
                done = None
        if done is None:
            done = walk(ranked, weights, count, order=self.order, whole=whole)
        return tell(pool, labels, done, by_cluster, graph)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """What choosing takes: a forward of both models over all examples, and the second model's memory.

        How many examples there are is not known before they are read: they count as the calibration tokens, or as
        `candidates` of `length` tokens where both are said.

        Args:
            workload: of the model.
            steps: optimizer steps.
            batch_tokens: of a batch.
            pass_flops: of a forward and backward.
        """
        if not self._compared:
            return Cost()
        looked = self.candidates * self.length if self.candidates and self.length else workload.tokens
        return Cost(
            flops=2 * 2.0 * workload.parameters * looked, extra_bytes=workload.parameters * workload.element_size
        )

    def _wanted(self, examples: int, budget: float) -> int:
        """How many are chosen."""
        if self.count is not None and self.count > examples:
            raise IntaglioError(f"count is {self.count}, and there are {examples} examples; 1 to {examples} fit")
        wanted = int(budget * examples + 1e-9) if self.count is None else self.count
        if not wanted:
            least = math.ceil(1000 / max(1, examples)) / 1000
            raise IntaglioError(
                f"budget is {budget}, which is none of {examples} examples; at least {least} is accepted"
            )
        if self.candidates is not None and self.candidates < wanted:
            raise IntaglioError(
                f"candidates is {self.candidates}, and {wanted} of {examples} examples are to be chosen; look at that"
                " many at least"
            )
        return wanted

    def _scores(
        self, samples: Sequence[Sample], model: Checkpoint, original: Checkpoint | None, progress: Progress
    ) -> list[float]:
        before = load(self.original, device=str(model.device)) if self.original is not None else original
        if before is None:
            raise IntaglioError(
                "paser compares with the model before it was carved, and there is none; name it as original, or pass it"
                " to train"
            )
        return degradation(
            samples,
            model,
            before,
            scope=self.scope,
            reduce=self.reduce,
            batch_size=self.batch_size,
            progress=progress,
        )

    def _key(self, pool: Pool, seed: int) -> Callable[[int], tuple[float, int, int]]:
        """What a cluster is sorted by: of equal ones the shorter, then the earlier comes first."""
        if self.rank == "random":
            order = torch.randperm(len(pool.samples), generator=generator(seed, "paser", "order")).tolist()
            return lambda n: (float(order[n]), 0, n)
        scores, tokens = pool.degradation, [sample.tokens for sample in pool.samples]
        if self.rank == "degradation":
            return lambda n: (-scores[n], tokens[n], n)
        return lambda n: (-efficiency(scores[n], tokens[n]), tokens[n], n)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
