"""AMTRLLasso (Wang et al., ICML 2023): how many labelled samples to draw from each source task for a target task.

    intaglio.AMTRLLasso(tasks={"news": "news.jsonl", ...}, target="target.jsonl", samples=2000).fit(ckpt)
    ready = ckpt.fitted("amtrl_lasso")
    ready.classify(ckpt, texts)
    ready.mixture()                                    # the drawn samples, to train another model on

- here: `AMTRLLasso`, on labelled texts of a frozen encoder.
- `active`: the algorithm on arrays, `ActiveSettings.solve`.
- `allocation`: relevance by Lasso, basis pursuit or least norm; counts; costs of sampling.
- `labelled_sources`: files of labelled texts as sources that are embedded as they are drawn.
- `representation`: linear maps by alternating least squares, and networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from intaglio.checkpoint import Checkpoint
from intaglio.checkpoint.attachments import Attachment
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.errors import IntaglioError
from intaglio.measures.embeddings import Pooling, embed_texts
from intaglio.methods.base import Cost, Method, Progress, Workload, no_progress
from intaglio.methods.training.amtrl_lasso.active import RANK, ActiveSettings, Solution, features
from intaglio.methods.training.amtrl_lasso.allocation import (
    CostShape,
    allocate,
    basis_pursuit,
    excess_risk,
    lasso,
    least_norm,
    sampling_cost,
)
from intaglio.methods.training.amtrl_lasso.labelled_sources import Inputs, Pool, drawing_order, read_classes, signs
from intaglio.methods.training.amtrl_lasso.representation import LinearMap, Samples, Whitened, perceptron

__all__ = [
    "AMTRLLasso", "ActiveSettings", "Samples", "Solution", "allocate", "basis_pursuit", "excess_risk", "lasso",
    "least_norm", "sampling_cost",
]  # fmt: skip


class AMTRLLasso(ActiveSettings, Method, slug="amtrl_lasso"):
    """Active multi-task representation learning by the Lasso: samples go to the sources that explain the target.

        y_t = w_t^T phi(x) + noise
        1. explore: n_min samples of each source; fit phi and W = [w_1 .. w_T] jointly, then w of the target on phi
        2. nu = argmin 0.5 ||W nu - w||_2^2 + lambda ||nu||_1
        3. n_t = max(n_min, c |nu_t|), c such that they add up to `samples`
        4. draw, fit phi and W again on everything, then w

    The bound on the target's excess risk is proportional to `sum_t nu_t^2 / n_t`, which is least for the nu of least L1
    norm and n proportional to |nu|. `strategy: l2` is the predecessor (Chen, Jamieson, Du, ICML 2022): the nu of least
    L2 norm, n proportional to its square.

    Source tasks and target are files of texts with a class each. The features of a text are principal components of the
    frozen encoder's embedding and a constant; phi is a linear map of them with orthonormal columns, or a perceptron.
    Every class of a file is a head, one against the rest, with labels 1 and -1 (of a source with two classes the first
    alone, as the other is its opposite); the heads of a file share its samples, and its relevance is the root of the
    sum of their squared coefficients. Only texts that are drawn are embedded. The
    result classifies texts by the target's classes (`intaglio classify`), and the report draws the samples of each
    source. In a recipe:
    `fit: {amtrl_lasso: {tasks: {news: news.jsonl, mail: mail.jsonl}, target: target.jsonl, samples: 2000}}`.

    No official code was found; details that the algorithm leaves open follow the derivation.

    Args:
        samples: N, samples of all sources together, those of the exploration included.
        explore: n_min, samples of each source in the exploration (all of a smaller source). Default 25.
        rank: K, features of the representation. Default: 8, or as many as the sources' heads or the inputs allow.
        strategy: estimate of relevance: `l1` (default), `l2`, as above, or `uniform`, equal shares.
        penalty: lambda, as a share of the least penalty under which nu is zero. Default 0.05.
        penalty_rule: what `penalty` is: a share (`fraction`, default), lambda itself (`absolute`), or the factor of
            sigma sqrt((K + log T) / n_min) (`theory`); `validation` ignores it, and takes the share with the least
            error of the target's head predicted by nu on a fifth of the target's samples.
        rounds: rounds of steps 1 to 3, with four times the samples each. Default 1.
        most_tasks: sources that may be drawn from beyond the exploration, those of largest relevance. Default: all.
        ridge: of all least-squares fits, for each sample; weight decay of a perceptron. Default 1e-3.
        iterations: of the alternating least squares. Default 30.
        hidden: hidden units of a perceptron instead of the linear map. Default: none.
        steps: of a perceptron's training, on full batches. Default 300.
        learning_rate: of a perceptron, under AdamW. Default 0.01.
        tasks: source tasks, `{name: file}`, at least two; see `load_labelled_texts`.
        target: file of the target's labelled texts, all of which are used.
        components: principal components of the embeddings. Default 64.
        pooling: of the encoder's last hidden states: `mean`, `cls` or `last`. Default: `last` for causal models, else
            `mean`.
        length: tokens of a text that are read. Default 256.
        cost_shape: price of samples in the report: `linear` (default), `saltus`, with a fixed price for each source
            that is used, or `hyperbolic`, which tends to a limit; see `sampling_cost`.
        fixed_cost: that fixed price or that limit. Default 0.

    Raises:
        IntaglioError: (in `fit`) a file cannot be read, has one class, the sources have fewer samples than `samples`,
            or `rank` is too large.

    Source: Wang, Chen, Jamieson, Du, Improved Active Multi-Task Representation Learning via Lasso, ICML 2023.
    """

    kinds = ("classifier",)
    summary = "chooses how many labelled samples to draw from each source task, by a sparse estimate of relevance"
    citation = "Wang et al., Improved Active Multi-Task Representation Learning via Lasso, ICML 2023"
    url = "https://arxiv.org/abs/2306.02556"
    fitted: ClassVar[bool] = True

    tasks: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    target: Annotated[str, Field(min_length=1)]
    components: Annotated[int, Field(ge=1)] = 64
    pooling: Pooling | None = None
    length: Annotated[int, Field(ge=2)] = 256
    cost_shape: CostShape = "linear"
    fixed_cost: Annotated[float, Field(ge=0)] = 0.0

    _fit: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.cost_shape == "hyperbolic" and not self.fixed_cost:
            raise ValueError("fixed_cost is 0; the hyperbolic price tends to it, so it must be above 0")
        if self.fixed_cost and self.cost_shape == "linear":
            raise ValueError(f"fixed_cost is {self.fixed_cost}; the linear price has none, name another cost_shape")
        return self

    def fit(
        self,
        checkpoint: Checkpoint,
        texts: Any = None,
        *,
        seed: int = 0,
        batch_size: int = 4,
        directory: Path | None = None,
        resume: bool = False,
        progress: Progress = no_progress,
    ) -> Checkpoint:
        """Draw samples of the sources, fit representation and heads, and attach them.

        Args:
            checkpoint: any text encoder or decoder with its tokenizer.
            texts: ignored; kept for API compatibility.
            seed: of the order in which samples are drawn, and of a perceptron.
            batch_size: texts that are embedded at a time.
            directory: ignored; kept for API compatibility.
            resume: ignored; kept for API compatibility.
            progress: called after each batch and fit.

        Raises:
            IntaglioError: see the class.
        """
        read = {name: read_classes(path) for name, path in self.tasks.items()}
        target = read_classes(self.target)

        def embed(texts: Sequence[str]) -> np.ndarray:
            return self._embed(checkpoint, texts, batch_size, progress)

        pools = [Pool(texts, drawing_order(seed, name, texts), embed) for name, texts in read.items()]
        z_ND = embed(target.texts)
        first = [pool.embedded(min(self.explore, len(pool.texts))) for pool in pools]
        inputs = Inputs.fitted(np.concatenate([z_ND, *first]), self.components)
        for pool in pools:
            pool.inputs = inputs
        samples = Samples(inputs(z_ND), signs(target.labels, target.classes))
        solution = self.solve(pools, samples, seed=seed, progress=progress)
        ready = self.model_copy()
        z_NK = solution.features(samples.x)
        ready._fit = _Fit(
            inputs, solution.phi, target.classes, solution.target_KC, z_NK.T @ z_NK, z_NK.T @ samples.y_NH,
            z_NK.sum(0), len(z_NK), dict(zip(read, solution.counts_RS[-1].tolist(), strict=True)), seed,
        )  # fmt: skip
        chosen = self._chosen(list(read), solution) | {"accuracy": ready._accuracy(z_ND, target)}
        return ready._attach(checkpoint, seed, chosen)

    def _embed(
        self, checkpoint: Checkpoint, texts: Sequence[str], batch_size: int = 32, progress: Progress = no_progress
    ) -> np.ndarray:
        embedded = embed_texts(
            checkpoint, texts, self.pooling, max_length=self.length, batch_size=batch_size, progress=progress,
            label="amtrl_lasso: embedding",
        )  # fmt: skip
        return embedded.double().numpy()

    def _chosen(self, names: Sequence[str], solution: Solution) -> dict[str, Any]:
        """Return the record's part: counts, relevance, price, and bars for the report."""
        counts = solution.counts_RS[-1]
        relevance = {name: float(value) for name, value in zip(names, solution.relevance_S, strict=True)}
        drawn = dict(zip(names, counts.tolist(), strict=True))
        return {
            "drawn": drawn,
            "explored": dict(zip(names, solution.counts_RS[0].tolist(), strict=True)),
            "relevance": relevance,
            "penalty": solution.penalty,
            "cost": sampling_cost(counts, self.cost_shape, self.fixed_cost),
            "bars": {
                "title": "Samples drawn of each source",
                "axis": "samples",
                "items": {f"{name} (relevance {relevance[name]:.3g})": count for name, count in drawn.items()},
            },
        }

    def mixture(self) -> list[dict[str, str]]:
        """Return the drawn samples of all sources, `{text, label, task}`, in the order of drawing within each.

        Raises:
            IntaglioError: the method has not been fitted, or a file has become shorter.
        """
        fit = self._ready()
        rows = []
        for name, path in self.tasks.items():
            read = read_classes(path)
            order, count = drawing_order(fit.seed, name, read), fit.counts[name]
            if count > len(order):
                raise IntaglioError(f"{path} has {len(order)} texts, and {count} were drawn; it has become shorter")
            rows += [{"text": read.texts[n], "label": read.labels[n], "task": name} for n in order[:count]]
        return rows

    @property
    def classes(self) -> tuple[str, ...]:
        """The target's classes, in the order of the probabilities."""
        classes: tuple[str, ...] = self._ready().classes
        return classes

    def classify(
        self, checkpoint: Checkpoint, texts: Sequence[str], *, batch_size: int = 32, progress: Progress = no_progress
    ) -> list[dict[str, float]]:
        """Return the probability of every class for each text; see `Classifier`.

        Least-squares scores of -1 to 1 become shares 0 to 1, cut off outside and divided by their sum.
        """
        fit = self._ready()
        if not texts:
            return []
        shares_NC = np.clip((fit.scores(self._embed(checkpoint, texts, batch_size, progress)) + 1) / 2, 1e-6, 1)
        probs_NC = shares_NC / shares_NC.sum(1, keepdims=True)
        return [dict(zip(fit.classes, row, strict=True)) for row in probs_NC.tolist()]

    def learn(
        self, checkpoint: Checkpoint, examples: Any, *, seed: int = 0, progress: Progress = no_progress
    ) -> Checkpoint:
        """Refit the target's heads with further labelled texts, also of new classes, and replace the attachment.

        The result equals a fit of the heads to all texts; the representation stays.

        Args:
            checkpoint: the encoder that the method was fitted to.
            examples: a file or objects; see `load_labelled_texts`.
            seed: ignored; kept for API compatibility.
            progress: called after each batch.

        Raises:
            IntaglioError: see the class.
        """
        fit, read = self._ready(), load_labelled_texts(examples)
        added = [name for name in read.classes if name not in fit.classes]
        classes = (*fit.classes, *added)
        z_ND = self._embed(checkpoint, read.texts, progress=progress)
        z_NK = features(fit.phi, fit.inputs(z_ND))
        # Every earlier text has the label -1 in a new class.
        moment_KC = np.hstack([fit.moment_KC, *[-fit.total_K[:, None]] * len(added)]) + z_NK.T @ signs(
            read.labels, classes
        )
        gram_KK, count = fit.gram_KK + z_NK.T @ z_NK, fit.count + len(z_NK)
        target_KC = np.linalg.solve(gram_KK + self.ridge * count * np.eye(len(gram_KK)), moment_KC)
        self._fit = _Fit(
            fit.inputs, fit.phi, classes, target_KC, gram_KK, moment_KC, fit.total_K + z_NK.sum(0), count, fit.counts,
            fit.seed,
        )  # fmt: skip
        chosen = {"texts": len(read), "new_classes": added, "accuracy": self._accuracy(z_ND, read)}
        return self._attach(checkpoint, seed, chosen)

    def _accuracy(self, z_ND: np.ndarray, examples: LabelledTexts) -> float:
        """Return the accuracy on the texts just learned."""
        fit = self._ready()
        chosen = fit.scores(z_ND).argmax(1).tolist()
        hits = sum(fit.classes[n] == label for n, label in zip(chosen, examples.labels, strict=True))
        return hits / len(examples)

    def _ready(self) -> _Fit:
        if self._fit is None:
            raise IntaglioError(
                "amtrl_lasso has not been fitted; a recipe with fit: {amtrl_lasso: ...} does that, and "
                "load(...).fitted('amtrl_lasso') returns it"
            )
        fit: _Fit = self._fit
        return fit

    def _attach(self, checkpoint: Checkpoint, seed: int, chosen: dict[str, Any]) -> Checkpoint:
        fit = self._ready()
        checkpoint.record_step(self.slug, self.model_dump(), seed=seed, chosen=chosen, verb="fit")
        about = {
            "classes": list(fit.classes), "samples": fit.counts, "texts": fit.count, "seed": fit.seed,
            "model": fingerprint(checkpoint.model),
        }  # fmt: skip
        checkpoint.attach(self.slug, fit.tensors(), self.model_dump(), about)
        return checkpoint

    @classmethod
    def restore(cls, attachment: Attachment, checkpoint: Checkpoint, **fields: Any) -> Self:
        """Return the method, ready to use, from its attachment.

        Args:
            attachment: of the checkpoint.
            checkpoint: the encoder.
            **fields: override those of the fit; only the files and `length` may change.

        Raises:
            IntaglioError: a field that cannot change after the fit, or an attachment of another model.
        """
        method = attachment.restored(cls, fields, ("tasks", "target", "length"))
        method._fit = _Fit.from_attachment(method, attachment)
        width, own = int(checkpoint.config.hidden_size), len(method._fit.inputs.mean_D)
        if own != width:
            raise IntaglioError(f"the attachment amtrl_lasso is of a model of width {own}; this one has {width}")
        return method

    def estimate_fit(self, workload: Workload, texts: Any) -> Cost:
        """Estimate embedding the target and the drawn samples, and the fits."""
        embedded = self.samples + len(read_classes(self.target))
        rank = self.rank or RANK
        fits = (self.rounds + 1) * (self.hidden or rank) * (self.components + 1)
        passes = 6.0 * self.steps * embedded if self.hidden else 2.0 * self.iterations * rank * self.components**2
        return Cost(
            flops=2.0 * workload.block_parameters * embedded * self.length + fits * passes,
            extra_bytes=8 * embedded * (workload.hidden + self.components),
        )


@dataclass(frozen=True)
class _Fit:
    """A fitted classifier: inputs, representation, heads of the target and the sums from which these follow."""

    inputs: Inputs
    phi: nn.Module
    classes: tuple[str, ...]
    target_KC: np.ndarray
    gram_KK: np.ndarray
    moment_KC: np.ndarray
    total_K: np.ndarray
    count: int
    counts: Mapping[str, int]
    seed: int

    ARRAYS: ClassVar[tuple[str, ...]] = ("target_KC", "gram_KK", "moment_KC", "total_K")

    def scores(self, z_ND: np.ndarray) -> np.ndarray:
        """Return the scores [N, C] of embeddings."""
        return features(self.phi, self.inputs(z_ND)) @ self.target_KC

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the attachment."""
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        arrays |= {"mean_D": self.inputs.mean_D, "projection_DP": self.inputs.projection_DP}
        own = {f"phi.{name}": value.detach().clone().contiguous() for name, value in self.phi.state_dict().items()}
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()} | own

    @classmethod
    def from_attachment(cls, method: AMTRLLasso, attachment: Attachment) -> _Fit:
        """Return the classifier of an attachment."""
        tensors, about = attachment.tensors, attachment.about
        inputs = Inputs(*[tensors[name].numpy() for name in ("mean_D", "projection_DP")])
        width, rank = inputs.projection_DP.shape[1] + 1, len(tensors["gram_KK"])
        phi = (
            LinearMap(width, rank) if method.hidden is None else Whitened(perceptron(width, method.hidden, rank), rank)
        )
        phi.load_state_dict({n.removeprefix("phi."): v for n, v in tensors.items() if n.startswith("phi.")})
        arrays: dict[str, Any] = {name: tensors[name].numpy() for name in cls.ARRAYS}
        classes, counts = tuple(about["classes"]), about["samples"]
        return cls(inputs, phi, classes, count=about["texts"], counts=counts, seed=about["seed"], **arrays)
