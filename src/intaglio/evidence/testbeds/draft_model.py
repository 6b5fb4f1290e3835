"""A draft model for SmolLM2: a two-layer Llama with its tokenizer, trained on text that SmolLM2 generated.

It starts from the target's own embedding, first and last layer and final norm: 28 of its 35 million weights are the
embedding, which so little text could not train. The prompts are of three kinds (continuing an article, summarising one,
continuing Python source), from training articles that `Corpus.split` does not hold out and from modules inside packages
of the standard library (the benchmarks prompt with those outside).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cache import digest
from intaglio.evidence.testbeds.cached_models import trained_model
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import keyed, remainder
from intaglio.modeling.anatomy import anatomy
from intaglio.speculative.heads.self_generated_data import generate_corpus
from intaglio.trainer.causal_lm import CausalLM
from intaglio.trainer.protocols import Example

BATCH = 64
"""Texts generated in a batch."""
HELD_OUT = 200
"""Articles whose hash modulo 1000 lies below are left to `Corpus.split` and to fitting what drafters adapt."""


@dataclass(frozen=True)
class DraftModelBed:
    """Text that the target generates, and the training of the draft model on it.

    With the defaults SmolLM2 generates about 17,000 tokens, which the draft reads four times: about ten minutes on two
    idle cores, once.
    """

    model: str = "smollm2"
    texts: str = "wikipedia"
    samples: int = 192
    prompt: int = 48
    new: int = 96
    temperature: float = 0.7
    depth: int = 2
    epochs: int = 4
    batch: int = 8
    learning_rate: float = 5e-4

    def target(self) -> Checkpoint:
        """Return the model that is drafted for."""
        return load(self.model)

    def prompts(self) -> list[list[int]]:
        """Return the prompts, the three kinds in turn."""
        tokenizer: Any = self.target().tokenizer
        longest = 8 * self.prompt  # characters that surely hold so many tokens
        corpus = SmolLM2Wikipedia(self.model, self.texts).part("train")
        names = zip(corpus.hashes, corpus.documents, strict=True)
        articles = [text for name, text in names if remainder(name) >= HELD_OUT and len(text) >= longest]
        modules = [file.text for file in source_files() if "." in file.module and len(file.text) >= longest]
        if not articles:
            raise IntaglioError(f"the texts {self.texts!r} have no article of {longest} characters to prompt with")
        before, after = _turn(tokenizer, "Summarize this text.\n\n")
        prompts = []
        for number in range(self.samples):
            pool = modules if number % 3 == 2 else articles
            text = pool[keyed("said", str(number)) % len(pool)]
            start = keyed("place", str(number)) % (len(text) - longest + 1)
            ids = tokenizer(text[start : start + longest], add_special_tokens=False, verbose=False)["input_ids"]
            if number % 3 == 1:
                ids = [*before, *ids[: self.prompt - len(before) - len(after)], *after]
            prompts.append(ids[: self.prompt])
        return prompts

    def text(self) -> list[Example]:
        """Return the generated texts as training examples whose loss leaves the prompts out."""
        return generate_corpus(
            self.target(), self.prompts(), tokens=self.new, temperature=self.temperature, batch_size=BATCH,
        )  # fmt: skip

    def new_draft(self) -> Checkpoint:
        """Return the untrained draft model: embedding, norm, first and last layers of the target."""
        target = self.target()
        config: Any = copy.deepcopy(target.model.config)
        layers = len(anatomy(target.model).blocks)
        config.num_hidden_layers = self.depth
        with torch.random.fork_rng(devices=[]):
            draft: Any = AutoModelForCausalLM.from_config(config)
        copied = [number * (layers - 1) // max(self.depth - 1, 1) for number in range(self.depth)]
        source = target.model.state_dict()
        for name, tensor in draft.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                index = parts.index("layers") + 1
                parts[index] = str(copied[int(parts[index])])
            tensor.copy_(source[".".join(parts)])
        return Checkpoint(draft.eval(), target.tokenizer, source="smollm2 draft")

    def load(self) -> Checkpoint:
        """Return the trained draft model, one shared object a process."""
        examples = self.text()
        recipe = {
            "objective": CausalLM(length=self.prompt + self.new),
            "epochs": self.epochs,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
        }
        text = digest([list(map(int, example["input_ids"])) for example in examples])
        choices = asdict(self) | {"text": text}
        return trained_model("smollm2_draft", choices, self.new_draft, lambda: examples, recipe)


def _turn(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids before and after a text that follows `text` in the user's turn; none after without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], []
    mark = "\u241e"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text + mark}], add_generation_prompt=True, tokenize=False
    )
    before, after = whole.split(mark)
    return tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (before, after))
