"""Quest: pages chosen for each token find facts that a compression before the question has dropped."""

from __future__ import annotations

from intaglio.evidence.designs.long_context import BYTES, RETRIEVAL, SCORE, SPARSITY, Retrieval
from intaglio.evidence.engine.claim import Arm, Claim

CLAIM = Claim(
    slug="sparse_frontier",
    version=1,
    says="At 90 % decode sparsity, with the question after a context of 2,000 to 4,000 tokens, Quest answers more"
    " questions about the context than SnapKV of the same budget.",
    metric=RETRIEVAL,
    delta=10.0,
    design=Retrieval(),
    arms={
        "snapkv": Arm("SnapKV, compressed before the question", {"policy": "snapkv", "sparsity": 0.9}),
        "quest": Arm("Quest, pages of about 16 tokens chosen for each token", {"policy": "quest", "sparsity": 0.9}),
        "dense": Arm("dense attention", {"policy": None}),
        "ada-snapkv": Arm("Ada-SnapKV of the same total budget", {"policy": "ada_snapkv", "sparsity": 0.9}),
        "sink and window": Arm("first and most recent tokens", {"policy": "sink_window", "sparsity": 0.9}),
        "random": Arm("random keys for each token and head", {"policy": "random", "sparsity": 0.9}),
        "oracle": Arm("keys with the most attention of each token", {"policy": "oracle", "sparsity": 0.9}),
    },
    baseline="snapkv",
    method="quest",
    ceiling="dense",
    reported=("ada-snapkv", "sink and window", "random", "oracle"),
    unit_names=("document",),
    looks=(5, 10, 20),
    metrics=(SCORE, SPARSITY, BYTES),
    parity="Every arm starts from the same keys and values of one dense pass over the document, with eight facts in it,"
    " and reads a tenth of them for each new token. Quest also reads its current page and keeps all keys in memory;"
    " SnapKV keeps the tokens of the question. The question and the answer are decoded under the policy.",
    minutes=45,
    use_when="the question comes after a long context and memory for the whole cache is at hand",
    reason="Facts have their key directly before the value, as in 'The locker of Mara 4821': in a pilot with dense"
    " attention SmolLM2 answered one question in eight of the form 'The secret code of Mara is 4821'.",
    otherwise="SnapKV, with the question before the context, which also frees memory",
    toy={"context": 256, "width": 32, "depth": 2, "steps": 60, "learning_rate": 5e-3},
    golden={
        "snapkv": {SCORE.name: -15.6669},
        "quest": {SCORE.name: -15.7074},
        "dense": {SCORE.name: -15.6745},
        "ada-snapkv": {SCORE.name: -15.6879},
        "sink and window": {SCORE.name: -15.7046},
        "random": {SCORE.name: -15.6766},
        "oracle": {SCORE.name: -16.2251},
    },
)
