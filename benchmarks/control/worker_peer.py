"""The peers' side, in their own environment: genlm-control's AWRS, and xgrammar's masks."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from genlm.control import Potential
from genlm.control.sampler.token import AWRS
from predicates import PREDICATES, SCHEMA


class Fixed(Potential):
    """The stored logits of a context as a potential over token ids."""

    def __init__(self, forms: list[bytes], stop: int) -> None:
        self.ids = [id for id, form in enumerate(forms) if form]
        self.order = np.array([*self.ids, stop])
        self.row: Any = None
        super().__init__(self.ids)

    async def prefix(self, context: Any) -> float:
        """Return no restriction."""
        return 0.0

    async def complete(self, context: Any) -> float:
        """Return no restriction."""
        return 0.0

    async def logw_next(self, context: Any) -> Any:
        """Return the log-probabilities of the present context."""
        shifted = self.row.astype(np.float64) - self.row.max()
        log_probs = shifted - np.log(np.exp(shifted).sum())
        return self.make_lazy_weights(log_probs[self.order])


class Checked(Potential):
    """A predicate of the text as a Boolean potential."""

    def __init__(self, fixed: Fixed, forms: list[bytes], name: str) -> None:
        self._forms = forms
        self._prefix, self._complete = PREDICATES[name]
        self.checks = 0
        super().__init__(fixed.ids)

    def _text(self, context: Any) -> str | None:
        data = b"".join(self._forms[token] for token in context)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data[: error.start].decode() if error.reason == "unexpected end of data" else None

    async def prefix(self, context: Any) -> float:
        """Return 0 for a prefix that the predicate accepts."""
        self.checks += 1
        text = self._text(context)
        return 0.0 if text is not None and self._prefix(text) else -np.inf

    async def complete(self, context: Any) -> float:
        """Return 0 for a complete text."""
        self.checks += 1
        text = self._text(context)
        return 0.0 if text is not None and self._complete(text) else -np.inf


async def sampled(name: str, out: Path, forms: list[bytes], stop: int, repeats: int, proper: bool) -> dict[str, Any]:
    fixed = Fixed(forms, stop)
    checked = Checked(fixed, forms, name)
    sampler = AWRS(fixed, checked, seed=0, proper_weights=proper, autobatch=False)
    with np.load(out / f"{name}.npz") as file:
        tokens, logits = file["tokens"].tolist(), file["logits"]
    weights, checks, seconds = [], [], []
    for step, row in enumerate(logits):
        fixed.row, totals = row, []
        for _ in range(repeats):
            checked.checks = 0
            start = time.perf_counter()
            _, log_weight, _ = await sampler.sample(tokens[:step])
            seconds.append(time.perf_counter() - start)
            totals.append(float(np.exp(log_weight)))
            checks.append(checked.checks)
        weights.append(float(np.mean(totals)))
    return {
        "weights": weights, "checks_median": float(np.median(checks)), "checks_mean": float(np.mean(checks)),
        "seconds_median": float(np.median(seconds)), "seconds_mean": float(np.mean(seconds)),
    }  # fmt: skip


def masks(out: Path, tokenizer: str, size: int) -> dict[str, Any]:
    """Seconds a token of xgrammar's mask on the tokens of the schema."""
    import torch
    import xgrammar
    from transformers import AutoTokenizer

    with np.load(out / "schema.npz") as file:
        tokens, logits = file["tokens"].tolist(), file["logits"]
    begin = time.perf_counter()
    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(tokenizer), vocab_size=size)
    options = {"any_whitespace": False, "separators": (", ", ": ")}
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), **options)
    matcher, seconds = xgrammar.GrammarMatcher(compiled), []
    compile_seconds = time.perf_counter() - begin
    bitmask = xgrammar.allocate_token_bitmask(1, size)
    for token, row in zip(tokens, logits, strict=True):
        scores = torch.from_numpy(row[None].copy())
        start = time.perf_counter()
        matcher.fill_next_token_bitmask(bitmask)
        xgrammar.apply_token_bitmask_inplace(scores, bitmask)
        assert matcher.accept_token(token)
        seconds.append(time.perf_counter() - start)
    return {"seconds_median": float(np.median(seconds)), "compile_seconds": compile_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    stored = json.loads((given.out / "vocabulary.json").read_text())
    forms, stop = [bytes.fromhex(form) for form in stored["forms"]], stored["stops"][0]
    results: dict[str, Any] = {"grammar": masks(given.out, given.tokenizer, len(forms))}
    for name in PREDICATES:
        results[name] = {
            key: asyncio.run(sampled(name, given.out, forms, stop, given.repeats, proper))
            for key, proper in (("auto", True), ("improper", False))
        }
    (given.out / "peer.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
