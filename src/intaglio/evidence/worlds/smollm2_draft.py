"""A draft model for SmolLM2: a two-layer Llama with SmolLM2's tokenizer, trained on text that SmolLM2 said itself.

    draft = SmolLM2Draft().load()            # made once, found again in the user's cache
    decoder = Speculative(DraftModel(draft.model))

What a target says is what its drafter has to guess, so that is what the draft model learns from. It begins with the
target's own embedding, first and last layer and final norm: 28 of its 35 million weights are the embedding, which so
little text could not teach. The prompts are of three kinds (going on with an article, summarising one,
going on with Python source), from articles that neither `Corpus.split` holds out nor this package measures on, and from
modules inside packages of the standard library (the benchmarks prompt with those outside).

Dimension letters: N texts, P tokens of a prompt, T tokens of a text.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.python_source import source_files, sources_digest
from intaglio.environment import versions
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.sealing import keyed
from intaglio.evidence.worlds.smollm2 import SmolLM2Wikipedia
from intaglio.evidence.worlds.trained import trained
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import anatomy
from intaglio.trainer.causal_lm import CausalLM

BATCH = 64
"""Texts that are said at a time."""
_HELD_OUT = 200  # of `Corpus.split`, modulo 1000
_SAYING = ("model", "texts", "said", "prompt", "new", "temperature")


@dataclass(frozen=True)
class SmolLM2Draft:
    """The world: what is said, and how the draft model learns it.

    With the defaults SmolLM2 says about 17,000 tokens and the draft reads them four times: about ten minutes on two
    quiet cores.

    Args:
        model: the target; tests put a tiny checkpoint here. Default the bundled `smollm2`.
        texts: prompts are made of them. Default the bundled `wikipedia`.
        said: texts that the target says. Default 192.
        prompt: tokens of each prompt. Default 48.
        new: tokens said after each, unless a stop token ends it. Default 96.
        temperature: of the draws. Default 0.7.
        depth: layers of the draft model. Default 2.
        epochs: over what was said. Default 4.
        batch: texts of a training step. Default 8.
        learning_rate: at its highest. Default 5e-4.
    """

    model: str = "smollm2"
    texts: str = "wikipedia"
    said: int = 192
    prompt: int = 48
    new: int = 96
    temperature: float = 0.7
    depth: int = 2
    epochs: int = 4
    batch: int = 8
    learning_rate: float = 5e-4

    def target(self) -> Checkpoint:
        """The model that is drafted for."""
        return load(self.model)

    def prompts(self) -> Tensor:
        """What the target is made to go on from, int64 [N, P], the kinds in turn.

        Raises:
            IntaglioError: no text is long enough.
        """
        tokenizer: Any = self.target().tokenizer
        longest = 8 * self.prompt  # characters that surely hold so many tokens
        articles = SmolLM2Wikipedia(self.model, self.texts).part("calibration")
        names = zip(articles.hashes, articles.documents, strict=True)
        kept = [text for name, text in names if int(name[:8], 16) % 1000 >= _HELD_OUT and len(text) >= longest]
        inside = [file.text for file in source_files() if "." in file.module and len(file.text) >= longest]
        if not kept:
            raise IntaglioError(f"the texts {self.texts!r} have no article of {longest} characters to prompt with")
        before, after = _turn(tokenizer, "Summarize this text.\n\n")
        found = []
        for place in range(self.said):
            among = inside if place % 3 == 2 else kept
            text = among[keyed("said", str(place)) % len(among)]
            start = keyed("place", str(place)) % (len(text) - longest + 1)
            words = text[start : start + longest]
            ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
            if place % 3 == 1:
                ids = [*before, *ids[: self.prompt - len(before) - len(after)], *after]
            found.append(ids[: self.prompt])
        return torch.tensor(found)

    def text(self, progress: Progress = no_progress) -> list[dict[str, Tensor]]:
        """What the target said, as examples for the trainer: prompts are read, not learnt.

        Args:
            progress: called after each batch that is said.
        """
        decided = {
            **{name: value for name, value in asdict(self).items() if name in _SAYING},
            "source": sources_digest(source_files()),
            "texts digest": SmolLM2Wikipedia(self.model, self.texts).part("calibration").digest,
            "code": code_of("intaglio.evidence.worlds.smollm2_draft"),
            "versions": {name: versions()[name] for name in ("torch", "transformers")},
        }

        def make(target: Path, scratch: Path) -> None:
            scratch.mkdir(parents=True, exist_ok=True)
            prompts = self.prompts()
            for start in range(0, self.said, BATCH):
                path = scratch / f"{start}.safetensors"
                if not path.is_file():
                    part = scratch / "part"
                    save_file({"ids_NT": self._say(prompts[start : start + BATCH], start)}, part)
                    part.rename(path)
                progress(min(start + BATCH, self.said), self.said, "texts said")
            rows = [load_file(scratch / f"{start}.safetensors")["ids_NT"] for start in range(0, self.said, BATCH)]
            save_file({"ids_NT": torch.cat(rows)}, target / "said.safetensors")

        rows_NT = load_file(made("smollm2_said", decided, make) / "said.safetensors")["ids_NT"]
        examples = []
        for row_T in rows_NT:
            ids_T = row_T[row_T >= 0]
            labels_T = ids_T.clone()
            labels_T[: self.prompt] = -100
            examples.append({"input_ids": ids_T, "labels": labels_T})
        return examples

    @torch.inference_mode()
    def _say(self, prompts_NP: Tensor, start: int) -> Tensor:
        """Prompts with what the target says after them [N, T]; -1 behind a stop token."""
        target = self.target()
        model: Any = target.model
        end = target.tokenizer.eos_token_id
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed("say", str(start)) % 2**63)
            ids_NT = model.generate(
                prompts_NP, attention_mask=torch.ones_like(prompts_NP), do_sample=True, temperature=self.temperature,
                top_k=0, top_p=1.0, max_new_tokens=self.new, eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
        whole_NT = torch.full((len(prompts_NP), self.prompt + self.new), -1)
        for row, ids_T in enumerate(ids_NT):
            stops = (ids_T[self.prompt :] == end).nonzero()
            length = self.prompt + int(stops[0]) + 1 if len(stops) else len(ids_T)
            whole_NT[row, :length] = ids_T[:length]
        return whole_NT

    def new_draft(self) -> Checkpoint:
        """The draft model before it is trained: embedding, norm, first and last layers of the target."""
        target = self.target()
        config: Any = copy.deepcopy(target.model.config)
        layers = len(anatomy(target.model).blocks)
        config.num_hidden_layers = self.depth
        with torch.random.fork_rng(devices=[]):
            draft: Any = AutoModelForCausalLM.from_config(config)
        taken = [place * (layers - 1) // max(self.depth - 1, 1) for place in range(self.depth)]
        given = target.model.state_dict()
        own = draft.state_dict()
        for name, tensor in own.items():
            parts = name.split(".")
            if "layers" in parts:
                place = parts.index("layers") + 1
                parts[place] = str(taken[int(parts[place])])
            tensor.copy_(given[".".join(parts)])
        return Checkpoint(draft.eval(), target.tokenizer, source="smollm2 draft")

    def load(self, progress: Progress = no_progress) -> Checkpoint:
        """The trained draft model, one object a process.

        Args:
            progress: called as texts are said and learnt.
        """
        examples = self.text(progress)
        return trained(
            "smollm2_draft",
            asdict(self),
            self.new_draft,
            lambda: examples,
            {
                "objective": CausalLM(length=self.prompt + self.new),
                "epochs": self.epochs,
                "batch_size": self.batch,
                "learning_rate": self.learning_rate,
            },
            ("intaglio.evidence.worlds.smollm2_draft",),
            progress,
        )


def _turn(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids before and behind a text that follows `text` in the user's turn; none behind without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], []
    mark = "\u241e"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": text + mark}], add_generation_prompt=True, tokenize=False
    )
    before, after = whole.split(mark)
    return tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (before, after))
