"""Design that asks for the facts of a long document under a cache policy: `Retrieval`.

The document is read once, dense; each arm makes its own cache from the same keys, values and last queries. The question
and the answer follow in a pass whose tokens are decoded under the policy. Settings of an arm: `policy`, a name of the
study's methods or None for dense attention, and `sparsity`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch

from intaglio.evidence.designs.base import BedDesign, Configured, Settings
from intaglio.evidence.engine.claim import Arm, Cost, Metric, Result, RunKey
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.long_needles import LongDocument, LongNeedles
from intaglio.evidence.testbeds.splits import Part
from intaglio.measures.memory import peak_memory
from intaglio.methods.attention.sparse_frontier.cache import OraclePolicy, cache_bytes
from intaglio.methods.attention.sparse_frontier.installation import install, uninstall
from intaglio.methods.attention.sparse_frontier.prompt_states import PromptStates, read_prompt
from intaglio.methods.attention.sparse_frontier.study import at_sparsity
from intaglio.modeling.anatomy import CACHE, anatomy

RETRIEVAL = Metric("answers right", "points", "higher", continuous=False)
SCORE = Metric("log-probability of the answer", "nats", "higher")
SPARSITY = Metric("measured sparsity of decoding", "share", "higher", continuous=False)
BYTES = Metric("bytes of the cache", "bytes", continuous=False)
DENSE = OraclePolicy(budget=1 << 40)


@lru_cache(maxsize=1)
def _read(bed: LongNeedles, part: Part, seed: int) -> tuple[LongDocument, PromptStates]:
    """Return a document and its states; the arms of a unit share them."""
    document = bed.document(part, seed)
    return document, read_prompt(bed.load().model, document.ids)


@dataclass(frozen=True)
class Retrieval(BedDesign):
    """Ask for every fact of a unit's document, each from a fresh copy of the cache."""

    bed: Any = field(default_factory=LongNeedles)
    MINIATURE: ClassVar = {}

    def run(self, arm: Arm, key: RunKey, settings: Settings) -> Result:
        """Measure an arm on a unit."""
        own = Configured(arm, settings)
        name, sparsity = own.pop("policy"), own.pop("sparsity", 0.9)
        document, states = _read(self.bed, key.split, key.seed)
        model = self.bed.load().model
        policy: Any = DENSE if name is None else at_sparsity(name, states.length, sparsity).cache
        layers = [index for index, window in enumerate(anatomy(model).windows) if window is None]
        right: dict[str, float | None] = {}
        scores: dict[str, float | None] = {}
        with torch.no_grad(), peak_memory(next(model.parameters()).device) as spent:
            installation = install(model, None, policy, [], layers)
            try:
                cache = states.cache(policy)
                size = cache_bytes(cache)
                for number, (question, answer) in enumerate(document.questions):
                    ids = torch.cat([question, answer[:, :-1]], 1)
                    logits_TV = model(ids, **{CACHE: deepcopy(cache)}).logits[0, question.shape[1] - 1 :].float()
                    right[str(number)] = 100.0 * bool((logits_TV.argmax(-1) == answer[0]).all())
                    scores[str(number)] = float(logits_TV.log_softmax(-1).gather(1, answer.T).sum())
            finally:
                uninstall(model)
        values: dict[str, Any] = {
            RETRIEVAL.name: right,
            SCORE.name: scores,
            SPARSITY.name: installation.meter.decode_sparsity,
            BYTES.name: float(size),
        }
        tokens = sum(q.shape[1] + a.shape[1] - 1 for q, a in document.questions)
        cost = Cost(tokens, seconds=spent.seconds, peak_bytes=spent.bytes)
        return Result(values, cost, {"document": digest([document.ids.tolist()])})
