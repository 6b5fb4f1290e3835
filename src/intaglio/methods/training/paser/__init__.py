"""PASER (He et al., ICLR 2026): select the few instructions that recover a pruned model.

Selected are those that require a lost capability, are cheap to train on, and do not contradict each other:

    clusters c_k of instructions           (`embeddings`, `clusters`: spectral coordinates, non-negative factorisation)
    J_i = mean over tokens of JSD(pruned, original)                                                      (`divergence`)
    CDS_k = mean of J_i in c_k,  n_k = B CDS_k / sum of CDS,  IES_i = J_i / ln(tokens_i ** 2)               (`budgets`)
    of each cluster the n_k samples of highest IES that fit a graph of concepts                 (`concepts`, `select`)

- `samples`: tokenised examples, truncated as in training.
- `preprocess`: deduplication and concepts.
- `result`: the result, with its summary for the report.
- here: `PASER`, a selector of a `train` step.

Differences between paper and released code: the code sums the divergence over the instruction's tokens only, counts
characters of the output in the cost, drops the rounding remainder of a budget, gives an unsymmetric Laplacian to a
solver for symmetric ones, and runs both models twice. Here each runs once, and `released` gives the code's choices.

Of the parts that its later version names without specifying (weights for conflicts of low confidence, an order by
entailment), those that need no further model are here: `inconsistent: last`, and `synonyms`.
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
from intaglio.methods.training.paser.clusters import Clusters, Init, cluster
from intaglio.methods.training.paser.concepts import ConsistencyGraph, key_phrases
from intaglio.methods.training.paser.divergence import Reduce, Scope, degradation, jsd
from intaglio.methods.training.paser.embeddings import embed
from intaglio.methods.training.paser.preprocess import check_installed, extract_concepts, first_duplicates, timed
from intaglio.methods.training.paser.result import Choice, Pool, summarise
from intaglio.methods.training.paser.select import Order, select_samples
from intaglio.trainer.dataset import all_examples
from intaglio.trainer.protocols import Example, Selection
from intaglio.trainer.rng import KeyedRNG, generator
from intaglio.trainer.tokenised_samples import Sample, read_samples

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
    """Select the training examples that recover most of what pruning lost, for a `train` step.

        J_i = mean over tokens of JSD(p_pruned, p_original);  CDS_k = mean of J_i in cluster k
        n_k = B CDS_k / sum of CDS;  IES_i = J_i / ln(tokens_i ** 2)

    Instructions are clustered by topic; a cluster's budget follows the divergence of the pruned model from the original
    on it; within a cluster the samples of highest divergence for their length come first, skipping those that combine
    two known concepts which never occurred together. In a recipe, after a pruning step: `train: {select: {paser:
    {budget: 0.2}}, instructions: pairs.jsonl, lora: {r: 8}, ...}`. From Python `intaglio.train(pruned, pairs,
    select=intaglio.PASER(), original=dense, ...)`, or `choose` alone.

    Pairs (`prompt` and `answer`) are scored on their answers; of plain texts every token counts. Duplicates count once.
    Where nothing is degraded every cluster has the same budget, and short samples come first.

    Args:
        budget: share B of the examples, above 0 and at most 1. Default 0.2, the paper's for Alpaca (0.04 for the fifty
            times larger LaMini).
        count: B as a number of examples, instead of `budget`. Default: the share.
        original: reference model: a bundled name, a directory or a hub id. Default: the model before the recipe.
        embedding: encoder of the instructions: `minilm` (default), another encoder (a directory or a hub id), or
            `tfidf`, which needs none.
        clusters: K; 1 disables clustering. Default 10, the released code's. null: the paper's rule, the K whose
            factorisation has the least error; where samples form no clear groups that is 2.
        most_clusters: largest K that the rule may select. Default 12.
        neighbours: neighbours of a sample in the similarity graph. Default: all for up to 2,000 samples, 32 for more.
        landmarks: samples that are factorised; the others join the nearest of them. Default 2,000.
        time: diffusion time: spectral coordinates are weighted by (1 - eigenvalue) ** time. Default 0: not weighted.
        start: initialisation of the factorisation: `nndsvda` (default) or `random`.
        scope: tokens over which J is taken: `answer` (default), `prompt` or `both`.
        reduce: `mean` (default) over them, or `sum`, where long samples dominate.
        budgets: of clusters: by `degradation` (default), `uniform`, or by `size`.
        rank: order within a cluster: `efficiency` (default, IES), `degradation` (J) or `random`.
        leftover: the rounding remainder of the budget and what small clusters cannot fill is `redistributed` (default)
            or `dropped`.
        order: clusters are visited `round_robin` (default) or one after the other (`sequential`), as in the paper;
            there the graph gets stricter on the way, and the last clusters get few samples.
        consistency: skip samples that do not fit the graph of concepts. Default true.
        concepts: key phrases of a sample that enter the graph, the best by RAKE. Default 8; null: all.
        synonyms: cosine from which two phrases count as one concept, by the vectors of `embedding`. Default: only equal
            phrases do.
        inconsistent: samples that do not fit are `skipped` (default), or taken `last`, where the budget is not filled.
        candidates: most examples to consider, drawn at random: bounds the time for large data. Default: all.
        most_rejected: if a larger share of the samples does not fit, the graph is uninformative and is ignored. Default
            0.5.
        length: scored tokens of an example. Default: the model's context, at most 1,024 (the paper's 256).
        chat: apply the tokenizer's chat template to prompts, if it has one. Default true.
        batch_size: examples per forward pass of both models. Default 8.

    Raises:
        IntaglioError: (while choosing) there is no model to compare with, or its tokenizer is another; the budget
            selects nothing or more than there is; an example is malformed; scikit-learn is missing.

    Source: He et al., PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery, ICLR
    2026; code BokwaiHo/PASER.
    """

    kinds = ("selector",)
    summary = (
        "selects the few instructions that recover most of what pruning lost, by divergence from the original model"
    )
    citation = (
        "He et al., PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery, ICLR 2026"
    )
    url = "https://arxiv.org/abs/2502.12594"

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
    def _check_fields(self) -> Self:
        if self.original is not None and not self._uses_original:
            raise ValueError("original is given, and neither budgets nor rank compares with it; leave it out")
        if self.synonyms is not None and not self.consistency:
            raise ValueError("synonyms belong to the graph of concepts; leave them out, or consistency: false")
        return self

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's settings: the rule for K, every key phrase, clusters one after the other, 256 tokens."""
        values = {"clusters": None, "concepts": None, "order": "sequential", "length": 256, "most_rejected": 1.0}
        return cls(**{**values, "leftover": "dropped", **overrides})

    @classmethod
    def released(cls, **overrides: Any) -> Self:
        """Return the settings of the authors' code: ten clusters, divergences summed over the prompt."""
        return cls.paper(**{"clusters": 10, "start": "random", "scope": "prompt", "reduce": "sum", **overrides})

    @classmethod
    def uniform(cls, **overrides: Any) -> Self:
        """Return a baseline: equally many of each cluster, at random, without running a model."""
        return cls(**{"budgets": "uniform", "rank": "random", "consistency": False, **overrides})

    @classmethod
    def top(cls, **overrides: Any) -> Self:
        """Return a baseline: the highest J, without clusters, length or graph."""
        return cls(**{"clusters": 1, "rank": "degradation", "consistency": False, **overrides})

    @property
    def compares(self) -> bool:
        """Whether it needs the model from before the recipe."""
        return self._uses_original and self.original is None

    @property
    def _uses_original(self) -> bool:
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
        """Select examples; return their indices and a summary."""
        wanted = self._num_selected(len(dataset), budget)  # refused before any work
        choice = self.pick(self.look(dataset, model, original, seed=rng.seed, progress=progress), wanted, seed=rng.seed)
        return Selection(choice.indices, {**choice.summary, "bars": choice.bars})

    def choose(
        self,
        examples: Sequence[Any],
        model: Checkpoint,
        original: Checkpoint | None = None,
        *,
        seed: int = 0,
        progress: Progress = no_progress,
    ) -> Choice:
        """Select examples outside of training."""
        read = all_examples(model, list(examples)) or []
        wanted = self._num_selected(len(read), self.budget)
        return self.pick(self.look(read, model, original, seed=seed, progress=progress), wanted, seed=seed)

    def read(self, examples: Sequence[Example], model: Checkpoint) -> list[Sample]:
        """Tokenise examples as for training."""
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
        """Compute clusters, divergences and concepts of the examples: the slow part."""
        check_installed()
        samples = self.read(examples, model)
        first = first_duplicates(samples)
        unique_indices = sorted(set(first))
        if self.candidates is not None:
            drawn = torch.randperm(len(unique_indices), generator=generator(seed, "paser", "candidates"))
            unique_indices = sorted(unique_indices[n] for n in drawn[: self.candidates].tolist())
        unique = [samples[n] for n in unique_indices]
        seconds: dict[str, float] = {}
        labels, errors = [0] * len(unique_indices), {}
        if self.clusters != 1 and len(unique_indices) > 1:
            with timed(seconds, "embedding"):
                vectors_ND = embed([sample.instruction for sample in unique], self.embedding, progress=progress)
            with timed(seconds, "clustering"):
                clustering = cluster(
                    vectors_ND,
                    self.clusters,
                    most=self.most_clusters,
                    neighbours=self.neighbours,
                    landmarks=self.landmarks,
                    time=self.time,
                    init=self.start,
                    seed=seed,
                )
            labels, errors = clustering.labels.tolist(), clustering.errors
        scores: list[float] = []
        if self._uses_original:
            with timed(seconds, "comparing"):
                scores = self._scores(unique, model, original, progress)
        concepts: list[list[str]] = []
        if self.consistency:
            with timed(seconds, "concepts"):
                concepts = extract_concepts(unique, self.concepts, self.synonyms, self.embedding, progress)
        return Pool(
            unique_indices,
            unique,
            labels,
            scores,
            concepts,
            seconds,
            errors,
            examples=len(samples),
            duplicates=len(samples) - len(set(first)),
        )

    def pick(self, pool: Pool, count: int, *, seed: int = 0) -> Choice:
        """Select from a prepared pool; fields that `look` does not use may differ from those of the pool."""
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
        redistribute = self.leftover == "redistributed"
        graph_note, selection = "off", None
        if self.consistency:
            last = self.inconsistent == "last"
            selection = select_samples(
                ranked,
                weights,
                count,
                concepts=pool.concepts.__getitem__,
                order=self.order,
                redistribute=redistribute,
                last=last,
            )
            graph_note = "graph of concepts"
            if selection.rate > self.most_rejected:
                graph_note = f"left out: {selection.rate:.0%} of the samples did not fit the graph of concepts"
                selection = None
        if selection is None:
            selection = select_samples(ranked, weights, count, order=self.order, redistribute=redistribute)
        return summarise(pool, labels, selection, by_cluster, graph_note)

    def training_cost(self, workload: Workload, steps: float, batch_tokens: int, pass_flops: float) -> Cost:
        """Return the cost of selection: a forward pass of both models over all examples, and the second model's memory.

        The number of examples is unknown before they are read: they count as the calibration tokens, or as `candidates`
        of `length` tokens where both are given.
        """
        if not self._uses_original:
            return Cost()
        looked = self.candidates * self.length if self.candidates and self.length else workload.tokens
        return Cost(
            flops=2 * 2.0 * workload.parameters * looked, extra_bytes=workload.parameters * workload.element_size
        )

    def _num_selected(self, examples: int, budget: float) -> int:
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
            samples, model, before, scope=self.scope, reduce=self.reduce, batch_size=self.batch_size, progress=progress
        )

    def _key(self, pool: Pool, seed: int) -> Callable[[int], tuple[float, int, int]]:
        """Return the sort key of a cluster; ties: the shorter, then the earlier sample."""
        if self.rank == "random":
            order = torch.randperm(len(pool.samples), generator=generator(seed, "paser", "order")).tolist()
            return lambda n: (float(order[n]), 0, n)
        scores, tokens = pool.degradation, [sample.tokens for sample in pool.samples]
        if self.rank == "degradation":
            return lambda n: (-scores[n], tokens[n], n)
        return lambda n: (-efficiency(scores[n], tokens[n]), tokens[n], n)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
