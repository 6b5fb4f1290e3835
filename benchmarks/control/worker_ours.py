"""Our side: time and checks a token of AWRS, of masking by the same predicate, and of grammar masks."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from predicates import PREDICATES, SCHEMA

from intaglio.checkpoint import load_tokenizer
from intaglio.constraints import ConstraintProcessor, JSONSchema, Predicate, Prefix, Vocabulary
from intaglio.data.assets import path
from intaglio.methods.decoding.awrs import AWRS
from intaglio.methods.decoding.awrs.estimators import WeightedDraws


def contexts(name: str, out: Path) -> tuple[list[int], np.ndarray]:
    with np.load(out / f"{name}.npz") as file:
        return file["tokens"].tolist(), file["logits"]


def draws(method: AWRS, prefix: Prefix, logits_V: np.ndarray, rng: np.random.Generator) -> tuple[float, int, float]:
    """Return the weight, the checks and the seconds of a token."""
    checked: set[int] = set()

    def accept(token: int) -> bool:
        checked.add(token)
        return prefix.allows(token)

    start = time.perf_counter()
    weights_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    total = weights_V.sum()
    weights_V[: len(prefix.vocabulary)] *= prefix.mask()
    mass = weights_V.sum()
    probs_V = weights_V / mass
    _, weight = method.draw(WeightedDraws(probs_V, rng), accept, float(probs_V.max()))
    return weight * mass / total, len(checked), time.perf_counter() - start


def sampled(name: str, out: Path, vocabulary: Vocabulary, method: AWRS, repeats: int) -> dict[str, Any]:
    tokens, logits = contexts(name, out)
    prefix, rng = Prefix.empty(Predicate(*PREDICATES[name]), vocabulary), np.random.default_rng(0)
    rows = []
    for token, logits_V in zip(tokens, logits, strict=True):
        runs = [draws(method, prefix, logits_V, rng) for _ in range(repeats)]
        rows.append([float(np.mean([run[0] for run in runs])), [run[1] for run in runs], [run[2] for run in runs]])
        prefix = prefix.extended(token)
    return summary(rows)


def summary(rows: list[Any]) -> dict[str, Any]:
    """Return the weights of each context, and checks and seconds a token."""
    checks, seconds = np.concatenate([row[1] for row in rows]), np.concatenate([row[2] for row in rows])
    return {
        "weights": [row[0] for row in rows],
        "checks_median": float(np.median(checks)),
        "checks_mean": float(checks.mean()),
        "seconds_median": float(np.median(seconds)),
        "seconds_mean": float(seconds.mean()),
    }


def masked(name: str, out: Path, vocabulary: Vocabulary, steps: int) -> dict[str, Any]:
    """Seconds a token of masking the whole vocabulary with the predicate."""
    tokens, logits = contexts(name, out)
    processor = ConstraintProcessor(Predicate(*PREDICATES[name]), vocabulary, 0)
    seconds = []
    for step in range(min(steps, len(tokens))):
        scores = torch.from_numpy(logits[step : step + 1].copy())
        start = time.perf_counter()
        processor(torch.tensor([tokens[:step]], dtype=torch.long).reshape(1, -1), scores)
        seconds.append(time.perf_counter() - start)
    return {"seconds_median": float(np.median(seconds)), "checks_mean": processor.checks / len(seconds)}


def grammar(out: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """Seconds a token of a grammar mask: state, mask and application to the logits."""
    tokens, logits = contexts("schema", out)
    begin = time.perf_counter()
    constraint = JSONSchema(SCHEMA)
    processor = ConstraintProcessor(constraint, vocabulary, 0)
    compiled, seconds = time.perf_counter() - begin, []
    for step in range(len(tokens)):
        scores = torch.from_numpy(logits[step : step + 1].copy())
        start = time.perf_counter()
        processor(torch.tensor([tokens[:step]], dtype=torch.long).reshape(1, -1), scores)
        seconds.append(time.perf_counter() - start)
    return {"seconds_median": float(np.median(seconds)), "compile_seconds": compiled}


def bare(out: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """Seconds a token of llguidance's own mask, one matcher that consumes the tokens."""
    tokens, logits = contexts("schema", out)
    matcher, seconds = LLMatcher(vocabulary.tokenizer, JSONSchema(SCHEMA).grammar), []
    bitmask = allocate_token_bitmask(1, len(vocabulary))
    for token, row in zip(tokens, logits, strict=True):
        scores = row[None].copy()
        start = time.perf_counter()
        fill_next_token_bitmask(matcher, bitmask)
        apply_token_bitmask_inplace(scores, bitmask)
        assert matcher.consume_token(token)
        seconds.append(time.perf_counter() - start)
    return {"seconds_median": float(np.median(seconds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--masked", type=int, default=3, help="tokens that are masked by the predicate")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads((given.out / "vocabulary.json").read_text())
    tokenizer = load_tokenizer(str(path("smollm2")))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(stored["forms"]), stored["stops"])
    methods = {
        "recursive": AWRS(estimator="recursive"), "geometric": AWRS(estimator="geometric"),
        "two_loop": AWRS(estimator="two_loop"), "auto": AWRS(), "improper": AWRS(proper_weights=False),
    }  # fmt: skip
    results: dict[str, Any] = {
        "grammar": {"ours": grammar(given.out, vocabulary), "llguidance": bare(given.out, vocabulary)}
    }
    for name in PREDICATES:
        results[name] = {
            **{key: sampled(name, given.out, vocabulary, method, given.repeats) for key, method in methods.items()},
            "masked": masked(name, given.out, vocabulary, given.masked),
        }
    (given.out / "ours.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
