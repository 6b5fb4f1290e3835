"""SAEEval (Makelov et al. 2025): dictionaries graded on a task by three tests, against supervised ones.

- `tasks`: indirect object identification in English and in symbols.
- `patching`: activations at nodes, and passes with others in their place.
- `supervised`: mean and MSE codes of attributes, the skyline.
- `sparse_control`: edits of few features.
- `interpretability`: F1 between features and properties.
- `evaluate`: the three tests.
- `baselines`: principal components.
- `phenomena`: occlusion and over-splitting.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from intaglio.checkpoint import Checkpoint
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.sources import find_dictionary
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder, checked_entries, method_of_entry
from intaglio.errors import IntaglioError
from intaglio.masks import predicts_next
from intaglio.methods.base import Method, Progress, no_progress
from intaglio.methods.probes.sae_eval.baselines import principal_components
from intaglio.methods.probes.sae_eval.evaluate import Bench, Learned
from intaglio.methods.probes.sae_eval.patching import Node, run
from intaglio.methods.probes.sae_eval.supervised import CODE_KINDS, CodeKind, SupervisedDictionary
from intaglio.methods.probes.sae_eval.tasks import IOITask, english, symbolic
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, SitePart, check_site, site_width

__all__ = ["Bench", "Node", "NodeSpec", "SAEEval", "english", "symbolic"]


class NodeSpec(BaseModel):
    """A node: a site at a position of the prompt.

    Args:
        layer: index of the block.
        part: as in `Site`. Default `residual`.
        head: (q, k, v, z) one head. Default: all.
        position: `io`, `s1`, `s1+1`, `s2` or `end`. Default `end`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layer: Annotated[int, Field(ge=0)]
    part: SitePart = "residual"
    head: Annotated[int, Field(ge=0)] | None = None
    position: Literal["io", "s1", "s1+1", "s2", "end"] = "end"

    @property
    def node(self) -> Node:
        """The node."""
        return Node(Site(self.layer, self.part, self.head), self.position)


class SAEEval(Method, slug="sae_eval"):
    """Grade dictionaries on indirect object identification by three tests, beside supervised dictionaries.

    LD is the logit difference of indirect object and subject at the end of a prompt; a^ is a reconstruction, and all
    nodes are patched in one pass.

        sufficiency        LD_a^ / LD_clean;  recovered  |LD_a^ - LD_mean| / |LD_clean - LD_mean|
        necessity          1 - |LD_mean - LD_rest| / |LD_mean - LD_clean|,  rest = mean + (a - a^)
        sparse control     share of prompts on which an edit of k features and the activations of the counterfactual
                           prompt give the same next token; greedy edits, and edits guided by F1
        interpretability   share of features with F1 > 0.8 between where they are active and a property (a value of an
                           attribute, a pair of values, a union of up to `unions` values); the same for shuffled labels;
                           sufficiency and necessity of interpretable features alone

    Supervised dictionaries have one feature a value of each attribute (the indirect object's name, the subject's, and
    which comes first): mean codes, and least-squares codes. Everything is fitted on training prompts; test prompts have
    other templates, objects, places and pairs of names. The paper splits the names themselves; here names are shared,
    since every value needs a supervised code.

    Args:
        task: `english` (default), with the tokenizer's names of one token, or `symbols`, for a model of the tokens of
            `tasks.symbolic`.
        nodes: activations that are patched together. Default: the residual stream after two thirds of the blocks, at
            the end.
        dictionaries: dictionaries trained on each node's activations, such as `[{topk_sae: {width: 256, k: 3}}]`.
            Default: TopK with three active latents.
        attached: name of an attached dictionary, or a directory, tested at its own site (that of the first node where
            it names none) and the first node's position. Default: none.
        supervised: `mean`, `mse` or both. Default both.
        components: (baseline) principal components, as many as a dictionary has active latents. Default 3; 0: none.
        random: (baseline) whether the first dictionary is also trained with its random decoder frozen. Default true.
        ks: features that an edit changes. Default 1, 2 and 4.
        unions: most values of a union. Default 10.
        train: training prompts. Default 2,000; paper 20,000.
        test: test prompts. Default 500.

    Raises:
        IntaglioError: (in `measure`) a model that predicts no next token, lacks the task's tokens or fails the task, a
            node that it does not have, or fields of a dictionary that are wrong.

    Source: Makelov, Lange and Nanda, Towards Principled Evaluations of Sparse Autoencoders for Interpretability and
    Control, ICLR 2025, arXiv 2405.08366, sections 2 to 6; code amakelov/sae.
    """

    kinds = ("probe",)
    summary = "tests whether a sparse dictionary is complete, controls the output by few features, and is interpretable"
    citation = (
        "Makelov et al., Towards Principled Evaluations of Sparse Autoencoders for Interpretability and Control, "
        "ICLR 2025"
    )
    url = "https://arxiv.org/abs/2405.08366"

    task: Literal["english", "symbols"] = "english"
    nodes: Annotated[list[NodeSpec], Field(min_length=1)] | None = None
    dictionaries: list[dict[str, dict[str, Any]]] = Field(
        default_factory=lambda: [{"topk_sae": {"width": 256, "k": 3}}]
    )
    attached: str | None = None
    supervised: list[CodeKind] = Field(default_factory=lambda: list(CODE_KINDS))
    components: Annotated[int, Field(ge=0)] = 3
    random: bool = True
    ks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(default_factory=lambda: [1, 2, 4])
    unions: Annotated[int, Field(ge=1)] = 10
    train: Annotated[int, Field(ge=10)] = 2000
    test: Annotated[int, Field(ge=10)] = 500

    @field_validator("dictionaries")
    @classmethod
    def _check_dictionaries(cls, value: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
        return checked_entries("dictionaries", value)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """Return the paper's number of prompts and edits."""
        return cls(**{"train": 20_000, "test": 5000, "ks": [2, 4, 6], **overrides})

    def measure(
        self, checkpoint: Checkpoint, data: IOITask | None = None, *, seed: int = 0, progress: Progress = no_progress
    ) -> dict[str, Any]:
        """Train and grade the dictionaries.

        Args:
            checkpoint: a model that predicts the next token.
            data: a task of one's own. Default: that of the field `task`.
            seed: of prompts and trainings. Default 0.
            progress: called with the model's accuracy on the task, and after each dictionary.

        Returns:
            `{task: {difference, accuracy, ablated}, nodes, unedited: {attribute: agreement}, dictionaries: {name:
            scores}}`. Scores are `sufficiency`, `recovered`, `necessity`, `l0`, `edit`; of learned dictionaries also
            `guided`, `interpretable`, `interpretable_shuffled`, `meanings` and the scores of interpretable features.

        Raises:
            IntaglioError: see the class.
        """
        parts = anatomy(checkpoint.model)
        if not predicts_next(parts):
            raise IntaglioError("the task needs the next token, which this model does not predict")
        nodes = self._nodes(len(parts.blocks))
        for node in nodes:
            check_site(parts, node.site)
        learners = self._learners()
        if data is None and self.task == "english" and checkpoint.tokenizer is None:
            raise IntaglioError("the checkpoint has no tokenizer, so the task in English cannot be written for it")
        task = data or (english(checkpoint.tokenizer) if self.task == "english" else symbolic())
        was_training = checkpoint.model.training
        checkpoint.model.eval()
        try:
            attached = None if self.attached is None else find_dictionary(checkpoint, self.attached)
            read = nodes if attached is None else (*nodes, _node_of(checkpoint, *attached, nodes[0]))
            training = task.prompts(self.train, seed, "train")
            checkpoint.check_ids(training.ids_NT)
            outcome, activations = run(parts, training, read=tuple(dict.fromkeys(read)))
            if not outcome.difference > 0:  # NaN fails too
                raise IntaglioError(
                    f"the model fails the task: its mean logit difference is {outcome.difference:.2f}, "
                    f"{outcome.accuracy:.0%} of the prompts are right"
                )
            own = {node: activations[node] for node in nodes}
            progress(0, len(learners), f"{outcome.accuracy:.0%} of the training prompts are right")
            bench = Bench.from_prompts(parts, task, task.prompts(self.test, seed, "test"), own, seed)
            results: dict[str, Any] = {}
            sizes = {"io": len(task.names), "s": len(task.names), "pos": 2}
            for kind in self.supervised:
                fitted = {
                    node: SupervisedDictionary.from_activations(x_ND, training.attributes, sizes, kind)
                    for node, x_ND in own.items()
                }
                results[f"supervised, {kind}"] = bench.supervised(fitted)
            for index, (name, method) in enumerate(learners.items()):
                trained = {node: _trained(method, x_ND, seed) for node, x_ND in own.items()}
                results[name] = bench.learned(trained, self.ks, self.unions, seed)
                progress(index + 1, len(learners), name)
            if self.components:
                axes = {node: principal_components(x_ND, self.components) for node, x_ND in own.items()}
                results["principal components"] = bench.learned(
                    {node: Learned(one, one.decoder_MD) for node, one in axes.items()}, self.ks, self.unions, seed
                )
            if attached is not None:
                node, given = read[-1], attached[1]
                alone = Bench.from_prompts(parts, task, bench.prompts, {node: activations[node]}, seed)
                learned = {node: Learned(given, given.decoder_MD)}
                results[attached[0]] = alone.learned(learned, self.ks, self.unions, seed)
        finally:
            checkpoint.model.train(was_training)
        return {
            "task": {
                "difference": bench.clean.difference,
                "accuracy": bench.clean.accuracy,
                "ablated": bench.ablated.difference,
            },
            "nodes": [node.name for node in own],
            "unedited": bench.unedited(),
            "dictionaries": results,
        }

    def _nodes(self, depth: int) -> tuple[Node, ...]:
        if self.nodes is None:
            return (Node(Site(2 * depth // 3), "end"),)
        return tuple(dict.fromkeys(spec.node for spec in self.nodes))

    def _learners(self) -> dict[str, SparseAutoencoder]:
        """Return the dictionaries to train by name."""
        learners: dict[str, SparseAutoencoder] = {}
        for entry in self.dictionaries:
            # Task activations are few: a hundred passes over them.
            method = method_of_entry("dictionaries", entry, {"tokens": 100 * self.train})
            name = method.slug if method.slug not in learners else f"{method.slug} {len(learners)}"
            learners[name] = method
        if self.random and learners:
            first, method = next(iter(learners.items()))
            learners[f"{first}, frozen decoder"] = type(method)(
                **{**method.model_dump(exclude_unset=True), "frozen_decoder": True}
            )
        return learners


def _node_of(checkpoint: Checkpoint, name: str, dictionary: SparseDictionary, first: Node) -> Node:
    """Return the node of an attached dictionary: at its site, or at the first node's where its site is not known."""
    if dictionary.site is not None:
        return Node(dictionary.site, first.position)
    width = site_width(anatomy(checkpoint.model), first.site)
    if width != dictionary.inputs:
        raise IntaglioError(
            f"the dictionary {name} reads {dictionary.inputs} features and does not name its site; {first.site.name} "
            f"has {width}: name its site in nodes"
        )
    return first


def _trained(method: SparseAutoencoder, x_ND: torch.Tensor, seed: int) -> Learned:
    dictionary: SparseDictionary = method.model_copy().fit_activations(x_ND, seed=seed).dictionary()
    return Learned(dictionary, dictionary.decoder_MD)
