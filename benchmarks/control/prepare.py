"""Write the inputs of both sides: a constrained generation of SmolLM2, its logits, and the tokens' byte forms.

python benchmarks/control/prepare.py OUT --tokens 32
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from predicates import PREDICATES, PROMPTS, SCHEMA

from intaglio.checkpoint import load
from intaglio.cli.generate import encode
from intaglio.constraints import Constraint, JSONSchema, Predicate, Vocabulary
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.awrs import AWRS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = load("smollm2")
    vocabulary = Vocabulary.from_tokenizer(checkpoint.tokenizer, checkpoint.vocabulary, [2])
    forms = [form.hex() for form in vocabulary.forms]
    (given.out / "vocabulary.json").write_text(json.dumps({"forms": forms, "stops": vocabulary.stops}))
    constraints: dict[str, Constraint] = {name: Predicate(*pair) for name, pair in PREDICATES.items()}
    for name, constraint in {**constraints, "schema": JSONSchema(SCHEMA)}.items():
        ids = encode(checkpoint, PROMPTS.get(name, PROMPTS["json"]), chat=True)
        # Without an end inside, so that each context has as many tokens as it is long.
        decoder = AWRS(constraint=constraint, vocabulary=vocabulary, particles=1, proper_weights=False)
        torch.manual_seed(0)
        options = {} if name == "schema" else {"min_new_tokens": given.tokens - 1}
        for _ in range(20):
            try:
                whole = checkpoint.model.generate(
                    ids, custom_generate=decoder, max_new_tokens=given.tokens, do_sample=True, temperature=0.7, top_k=0,
                    **options,
                )  # fmt: skip
                break
            except IntaglioError:  # the limit came before the end
                if decoder.populations and len(decoder.populations[0].tokens[0]) >= given.tokens - 1:
                    whole = torch.cat([ids, torch.tensor([decoder.populations[0].tokens[0]])], 1)
                    break
        else:
            raise IntaglioError(f"none of 20 runs under {name} came to {given.tokens} tokens")
        new = whole[0, ids.shape[1] :]
        with torch.inference_mode():
            logits = checkpoint.model(whole[:, :-1]).logits[0, ids.shape[1] - 1 :]
        keep = [index for index, token in enumerate(new.tolist()) if token not in vocabulary.stops]
        np.savez(given.out / f"{name}.npz", tokens=new[keep].numpy(), logits=logits[keep].numpy().astype(np.float32))
        print(name, repr(checkpoint.tokenizer.decode(new[keep])))


if __name__ == "__main__":
    main()
