"""The three tests on dictionaries of a task's activations.

Dimension letters: N prompts, D width, M latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.dictionaries.dictionary import Dictionary
from intaglio.methods.probes.sae_eval.interpretability import UNIONS, FeatureMeanings, f1_scores, meanings
from intaglio.methods.probes.sae_eval.patching import Activations, Node, Outcome, run
from intaglio.methods.probes.sae_eval.sparse_control import feature_weights, greedy_edit, guided_edit
from intaglio.methods.probes.sae_eval.supervised import SupervisedDictionary
from intaglio.methods.probes.sae_eval.tasks import ATTRIBUTES, IOITask, Prompts
from intaglio.modeling.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Learned:
    """A dictionary with its directions; `encode` and `decode` are its own."""

    dictionary: Dictionary
    decoder_MD: Tensor


@dataclass(frozen=True, eq=False)
class Bench:
    """A model on test prompts, with everything that all dictionaries are compared on.

    Args:
        parts: the model's anatomy.
        task: gives counterfactual prompts and properties.
        prompts: test prompts.
        activations: of each node on them.
        means: mean activation of each node on the training prompts.
        clean: outcome of the unchanged model.
        ablated: outcome with the means in all nodes.
        counterfactuals: for each attribute the prompts, the nodes' activations on them, and the outcome of the test
            prompts with these activations: the ground truth of an edit.
    """

    parts: Anatomy
    task: IOITask
    prompts: Prompts
    activations: Activations
    means: Mapping[Node, Tensor]
    clean: Outcome
    ablated: Outcome
    counterfactuals: Mapping[str, tuple[Prompts, Activations, Outcome]]

    @classmethod
    def from_prompts(
        cls, parts: Anatomy, task: IOITask, prompts: Prompts, training: Activations, seed: int = 0
    ) -> Bench:
        """Run the test prompts and their counterfactuals.

        Args:
            parts: the model's anatomy.
            task: of the prompts.
            prompts: test prompts.
            training: activations of the nodes on training prompts.
            seed: of the counterfactual values. Default 0.
        """
        nodes = tuple(training)
        clean, activations = run(parts, prompts, read=nodes)
        means = {node: x_ND.mean(0) for node, x_ND in training.items()}
        ablated, _ = run(parts, prompts, {node: mean.expand_as(activations[node]) for node, mean in means.items()})
        counterfactuals = {}
        for attribute in ATTRIBUTES:
            other = task.counterfactual(prompts, attribute, seed)
            _, targets = run(parts, other, read=nodes)
            truth, _ = run(parts, prompts, targets)
            counterfactuals[attribute] = (other, targets, truth)
        return cls(parts, task, prompts, activations, means, clean, ablated, counterfactuals)

    # --- test 1: sufficiency and necessity ----------------------------------------------------------------------------

    def scores(self, reconstructions: Activations) -> dict[str, float | None]:
        """Return sufficiency and necessity of reconstructions.

        sufficiency = LD_a^ / LD_clean,  recovered = |LD_a^ - LD_mean| / |LD_clean - LD_mean|,
        necessity = 1 - |LD_mean - LD_rest| / |LD_mean - LD_clean|,  rest = mean + (a - a^). None where nothing divides.
        """
        rests = {node: self.means[node] + self.activations[node] - x_ND for node, x_ND in reconstructions.items()}
        kept = run(self.parts, self.prompts, reconstructions)[0].difference
        rest = run(self.parts, self.prompts, rests)[0].difference
        clean, ablated = self.clean.difference, self.ablated.difference
        effect = abs(clean - ablated)
        return {
            "sufficiency": kept / clean if clean else None,
            "recovered": abs(kept - ablated) / effect if effect else None,
            "necessity": 1 - abs(ablated - rest) / effect if effect else None,
        }

    # --- test 2: sparse control ---------------------------------------------------------------------------------------

    def agreement(self, attribute: str, edited: Activations) -> float:
        """Return the share of prompts on which an edit and the ground truth give the same next token."""
        return run(self.parts, self.prompts, edited)[0].agreement(self.counterfactuals[attribute][2])

    def unedited(self) -> dict[str, float]:
        """Return the agreement without any edit, by attribute."""
        return {name: self.clean.agreement(truth) for name, (_, _, truth) in self.counterfactuals.items()}

    def supervised(self, dictionaries: Mapping[Node, SupervisedDictionary]) -> dict[str, Any]:
        """Return the tests of supervised dictionaries; an edit swaps one feature a node."""
        own = self.prompts.attributes
        edits, removed = {}, {}
        for attribute, (other, _, _) in self.counterfactuals.items():
            edited = {
                node: one.edit(self.activations[node], attribute, own[attribute], other.attributes[attribute])
                for node, one in dictionaries.items()
            }
            edits[attribute] = self.agreement(attribute, edited)
            removed[attribute] = _mean([float(one.weight(own, attribute).mean()) for one in dictionaries.values()])
        scores = self.scores({node: one.reconstruct(own) for node, one in dictionaries.items()})
        return {**scores, "edit": edits, "removed": removed, "l0": float(len(ATTRIBUTES))}

    def learned(
        self, dictionaries: Mapping[Node, Learned], ks: Sequence[int], unions: int = UNIONS, seed: int = 0
    ) -> dict[str, Any]:
        """Return the tests of learned dictionaries, one a node.

        Args:
            dictionaries: of every node.
            ks: features that edits change.
            unions: most values of a property that is a union. Default 10.
            seed: of the shuffled labels. Default 0.
        """
        codes = {node: one.dictionary.encode(self.activations[node]) for node, one in dictionaries.items()}
        properties = self.task.properties(self.prompts)
        order = torch.from_numpy(np.random.default_rng([seed, 3]).permutation(len(self.prompts)))
        shuffled = {kind: {name: holds[order] for name, holds in own.items()} for kind, own in properties.items()}
        read = {node: meanings(code != 0, properties, unions) for node, code in codes.items()}
        control = [meanings(code != 0, shuffled, unions).share() for code in codes.values()]
        scores = self.scores({node: one.dictionary.decode(codes[node]) for node, one in dictionaries.items()})
        return {
            **scores,
            "l0": _mean([float((code != 0).double().sum(1).mean()) for code in codes.values()]),
            "edit": {name: {k: self._greedy(dictionaries, name, k) for k in ks} for name in ATTRIBUTES},
            "guided": {name: {k: self._guided(dictionaries, codes, name, k) for k in ks} for name in ATTRIBUTES},
            "interpretable": _mean([one.share() for one in read.values()]),
            "interpretable_shuffled": _mean(control),
            "meanings": _summed([one.counts() for one in read.values()]),
            **self._causal(dictionaries, codes, read),
        }

    def _greedy(self, dictionaries: Mapping[Node, Learned], attribute: str, k: int) -> dict[str, float]:
        targets, edited, removed = self.counterfactuals[attribute][1], {}, []
        for node, one in dictionaries.items():
            edited[node], share_N = greedy_edit(
                self.activations[node], targets[node], one.dictionary, one.decoder_MD, k
            )
            removed.append(float(share_N.mean()))
        return {"agreement": self.agreement(attribute, edited), "removed": _mean(removed)}

    def _guided(
        self, dictionaries: Mapping[Node, Learned], codes: Mapping[Node, Tensor], attribute: str, k: int
    ) -> float:
        other, targets, _ = self.counterfactuals[attribute]
        before_N, after_N = self.prompts.attributes[attribute], other.attributes[attribute]
        holds_NV = torch.stack(list(self.task.properties(self.prompts)[attribute].values()), 1)
        edited = {}
        for node, one in dictionaries.items():
            device = self.activations[node].device
            f1_VM = f1_scores(codes[node] != 0, holds_NV.to(device))
            edited[node] = guided_edit(
                self.activations[node], targets[node], one.dictionary, one.decoder_MD, k, f1_VM, before_N.to(device),
                after_N.to(device),
            )  # fmt: skip
        return self.agreement(attribute, edited)

    # --- test 3, causal forms -----------------------------------------------------------------------------------------

    def _causal(
        self,
        dictionaries: Mapping[Node, Learned],
        codes: Mapping[Node, Tensor],
        read: Mapping[Node, FeatureMeanings],
    ) -> dict[str, float | None]:
        """Return sufficiency with interpretable features alone, and necessity: what is left without them."""
        kept = {
            node: one.dictionary.decode(codes[node] * read[node].interpretable_M) for node, one in dictionaries.items()
        }
        scores = self.scores(kept)
        return {
            "sufficiency_of_interpretable": scores["sufficiency"],
            "recovered_by_interpretable": scores["recovered"],
            "necessity_of_interpretable": scores["necessity"],
            "weight_of_interpretable": _mean(
                [
                    float((feature_weights(codes[node], one.decoder_MD) * read[node].interpretable_M).sum(1).mean())
                    for node, one in dictionaries.items()
                ]
            ),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summed(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in rows[0]}
