"""A draft model for SmolLM2: a two-layer Llama with its tokenizer, trained on text that SmolLM2 generated.

It starts from the target's own embedding, first and last layer and final norm: 28 of its 35 million weights are the
embedding, which so little text could not train. The prompts are of three kinds (continuing an article, summarising one,
continuing Python source), from training articles that `Corpus.split` does not hold out and from modules inside packages
of the standard library (the benchmarks prompt with those outside).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.python_source import source_files
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.cache import digest, preparation
from intaglio.evidence.testbeds.cached_models import copied, trained_model
from intaglio.evidence.testbeds.prompts import chat_turn
from intaglio.evidence.testbeds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.testbeds.splits import keyed, remainder
from intaglio.methods.weights.drop_blocks import DropBlocks
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
        prompts = []
        for number in range(self.samples):
            pool = modules if number % 3 == 2 else articles
            text = pool[keyed("said", str(number)) % len(pool)]
            start = keyed("place", str(number)) % (len(text) - longest + 1)
            ids = tokenizer(text[start : start + longest], add_special_tokens=False, verbose=False)["input_ids"]
            if number % 3 == 1 and tokenizer.chat_template:
                text = f"Summarize this text.\n\n{tokenizer.decode(ids[: self.prompt // 2])}"
                prompts.append(chat_turn(tokenizer, text))
            else:
                prompts.append(ids[: self.prompt])
        return prompts

    def text(self) -> list[Example]:
        """Return the generated texts as training examples whose loss leaves the prompts out."""
        settings: dict[str, Any] = {"tokens": self.new, "temperature": self.temperature, "batch_size": BATCH}
        with preparation():
            return generate_corpus(self.target(), self.prompts(), **settings)

    def new_draft(self) -> Checkpoint:
        """Return the untrained draft model: embedding, norm, first and last layers of the target."""
        draft = copied(self.target())
        layers = len(anatomy(draft.model).blocks)
        kept = {number * (layers - 1) // max(self.depth - 1, 1) for number in range(self.depth)}
        DropBlocks(layers=[layer for layer in range(layers) if layer not in kept]).apply(draft)
        return Checkpoint(draft.model, draft.tokenizer, source="smollm2 draft")

    def load(self) -> Checkpoint:
        """Return the trained draft model, one shared object a process."""
        examples = self.text()
        recipe = {
            "objective": CausalLM(length=2 * self.prompt + self.new),
            "epochs": self.epochs,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
        }
        text = digest([list(map(int, example["input_ids"])) for example in examples])
        choices = asdict(self) | {"text": text}
        return trained_model("smollm2_draft", choices, self.new_draft, lambda: examples, recipe)
