"""Design that grades one dictionary on symbolic indirect object identification: `GradeDictionaries`.

Settings of an arm: `dictionary`, a method that is trained on the node's activations; `supervised`, the kind of codes;
`components`, a number of principal components; or `truth`, the counterfactual activations themselves. Everything else
is a field of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.symbolic_ioi import SymbolicIOI
from intaglio.measures.memory import peak_memory
from intaglio.methods.probes.sae_eval import Bench, Node
from intaglio.methods.probes.sae_eval.baselines import principal_components
from intaglio.methods.probes.sae_eval.evaluate import Learned
from intaglio.methods.probes.sae_eval.patching import run
from intaglio.methods.probes.sae_eval.supervised import SupervisedDictionary
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site

AGREEMENT = Metric("edit agreement", "points", "higher", continuous=False)
UNEDITED = Metric("agreement without an edit", "points", "higher", continuous=False)
SUFFICIENCY = Metric("sufficiency", "share", "higher")
NECESSITY = Metric("necessity", "share", "higher")
UNEXPLAINED = Metric("variance unexplained", "share")
ACCURACY = Metric("accuracy of the model", "points", "higher", continuous=False)


@dataclass(frozen=True)
class GradeDictionaries(BedDesign):
    """Fit a dictionary to the residual stream at the end after `layer`, and edit `k` features; a unit is a seed.

    Trained dictionaries see the activations of `train` prompts in `passes` passes.
    """

    bed: SymbolicIOI = field(default_factory=SymbolicIOI)
    layer: int = 1
    k: int = 2
    train: int = 4000
    test: int = 500
    passes: int = 100
    MINIATURE: ClassVar[Mapping[str, Any]] = {"layer": 0, "train": 200, "test": 30, "passes": 20}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Grade an arm on the model and the prompts of a unit."""
        own, seed = Configured(arm, settings), key.seed % 2**31
        method, supervised = own.pop("dictionary"), own.pop("supervised")
        components, truth = own.pop("components"), own.pop("truth", False)
        parts, task = anatomy(self.bed.load(seed).model), self.bed.task
        node, prompts = Node(Site(self.layer)), task.prompts(self.train, seed + 1)
        _, training = run(parts, prompts, read=(node,))
        bench = Bench.from_prompts(parts, task, task.prompts(self.test, seed + 2, "test"), training, seed)
        values = {ACCURACY.name: 100 * bench.clean.accuracy}
        with peak_memory(torch.device("cpu")) as spent:
            if truth:
                edits = {
                    name: bench.agreement(name, targets) for name, (_, targets, _) in bench.counterfactuals.items()
                }
                scores: dict[str, Any] = {"sufficiency": 1.0, "necessity": 1.0}
                decoded_ND = bench.activations[node]
            elif supervised is not None:
                sizes = {"io": len(task.names), "s": len(task.names), "pos": 2}
                codes = SupervisedDictionary.from_activations(training[node], prompts.attributes, sizes, supervised)
                scores = bench.supervised({node: codes})
                edits, decoded_ND = scores["edit"], codes.reconstruct(bench.prompts.attributes)
            else:
                learned = self._learned(own, method, components, training[node], seed)
                scores = bench.learned({node: learned}, [self.k])
                decoded_ND = learned.dictionary.decode(learned.dictionary.encode(bench.activations[node]))
                edits = {name: row[self.k]["agreement"] for name, row in scores["edit"].items()}
        own.check()
        values[AGREEMENT.name] = 100 * sum(edits.values()) / len(edits)
        values[UNEDITED.name] = 100 * sum(bench.unedited().values()) / len(edits)
        error_ND, centred_ND = (
            bench.activations[node] - other for other in (decoded_ND, bench.activations[node].mean(0))
        )
        values[UNEXPLAINED.name] = float(error_ND.square().sum() / centred_ND.square().sum())
        values |= {SUFFICIENCY.name: scores["sufficiency"], NECESSITY.name: scores["necessity"]}
        cost = Cost(self.train, seconds=spent.seconds, peak_bytes=spent.bytes)
        return Result(values, cost, {"prompts": digest(bench.prompts.ids_NT.flatten().tolist())})

    def _learned(self, own: Configured, method: Any, components: int | None, x_ND: torch.Tensor, seed: int) -> Learned:
        if components is not None:
            axes = principal_components(x_ND, components)
            return Learned(axes, axes.decoder_MD)
        given = own.fill(method)
        trained = type(given)(**{**given.model_dump(exclude_unset=True), "tokens": self.passes * len(x_ND)})
        dictionary = trained.fit_activations(x_ND, seed=seed).dictionary()
        return Learned(dictionary, dictionary.decoder_MD)
