"""Self-generated training data: prompts continued by the model, a batch at a time, kept in the user's cache.

The content of the file is used whoever wrote it: a killed run continues after its last whole batch, and every method
that needs the same text of the same model gets it without another pass.

Dimension letters: B rows, P prompt tokens, L tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from intaglio import atomic_io
from intaglio.checkpoint import Checkpoint
from intaglio.data import assets
from intaglio.data.texts import Corpus, cut_at_blank_lines
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.protocols import Example
from intaglio.trainer.resume import model_digest
from intaglio.trainer.rng import generator

FOLDER = "own-text"
FORMAT = 1


def prompt_sources(texts: Corpus, most: int) -> Corpus:
    """Return the documents, or with fewer than `most` of them their pieces of about 2,000 characters.

    A corpus of a few long articles would otherwise give only one prompt per article.
    """
    if len(texts) >= most:
        return texts
    return Corpus(texts.name, tuple(piece for text in texts.documents for piece in cut_at_blank_lines(text)))


def extract_prompts(
    checkpoint: Checkpoint, texts: Corpus, tokens: int, most: int, chat: bool = False
) -> list[list[int]]:
    """Return prompts: the first tokens of documents, in the order of the documents' hashes.

    Args:
        checkpoint: with a tokenizer.
        texts: documents, or with fewer than `most` of them their pieces (`prompt_sources`; never with `chat`).
        tokens: most tokens of a prompt, before the chat template.
        most: prompts.
        chat: whether each is put into the tokenizer's chat template as a user's turn.

    Raises:
        IntaglioError: no tokenizer, or no chat template.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so it can read no prompts")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise IntaglioError(f"the tokenizer of {checkpoint.source} has no chat template; leave chat out")
    texts = texts if chat else prompt_sources(texts, most)
    # By hash: the first documents of a corpus are often about a single topic.
    drawn = sorted(zip(texts.hashes, texts.documents, strict=True))[:most]
    prompts: list[list[int]] = []
    for _, text in drawn:
        ids = tokenizer(text[: 64 * tokens], add_special_tokens=not chat, verbose=False)["input_ids"][:tokens]
        if chat:
            turns = [{"role": "user", "content": tokenizer.decode(ids, skip_special_tokens=True)}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        if ids:
            prompts.append([int(token) for token in ids])
    return prompts


def generate_corpus(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    temperature: float = 0.7,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Example]:
    """Return the model's continuations of prompts, as examples whose labels leave the prompts out.

    Args:
        checkpoint: a decoder.
        prompts: token ids of each.
        tokens: most new tokens; a text ends at the model's own stop token.
        temperature: of the draws; 0 is greedy. Default 0.7.
        batch_size: prompts continued together. Default 16.
        seed: of the draws.
        progress: called after each batch.

    Returns:
        `{input_ids, labels}` of each prompt, in order.

    Raises:
        IntaglioError: no prompts, or a prompt that leaves no room in the context.
    """
    if not prompts:
        raise IntaglioError("there are no prompts to continue; give texts with at least one word")
    longest = max(map(len, prompts))
    if longest + tokens > checkpoint.context:
        raise IntaglioError(
            f"a prompt of {longest} tokens and {tokens} new ones are more than the model's context of "
            f"{checkpoint.context}"
        )
    batches = [[list(ids) for ids in prompts[at : at + batch_size]] for at in range(0, len(prompts), batch_size)]
    header = {
        "format": FORMAT,
        "model": model_digest(checkpoint.model),
        "prompts": hashlib.sha256(json.dumps(batches).encode()).hexdigest(),
        "tokens": tokens,
        "temperature": temperature,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:24]
    path = assets.cache_dir() / FOLDER / f"{name}.jsonl"
    with atomic_io.locked(path) as file:
        done = _read(file, header)
        if not done and not file.tell():
            atomic_io.append(file, path, _line(header))
        for number in range(len(done), len(batches)):
            written = _continue(checkpoint, batches[number], tokens, temperature, generator(seed, "own text", number))
            atomic_io.append(file, path, _line(written))
            done.append(written)
            progress(number + 1, len(batches), "write: the model's own text")
    return [
        {"input_ids": ids + new, "labels": [IGNORED] * len(ids) + new}
        for batch, written in zip(batches, done, strict=True)
        for ids, new in zip(batch, written, strict=True)
        if new
    ]


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _read(file: IO[bytes], header: dict[str, Any]) -> list[list[list[int]]]:
    """Return the whole batches in a file; the rest that a killed process left is cut off."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != header:
        raise IntaglioError(f"{Path(file.name)} holds another text than its name implies; remove it")
    file.truncate(len(whole))
    file.seek(0, 2)
    return lines[1:]


@torch.inference_mode()
def _continue(
    checkpoint: Checkpoint, prompts: list[list[int]], tokens: int, temperature: float, rng: torch.Generator
) -> list[list[int]]:
    """Return the new tokens of each prompt, the stop token included."""
    model: Any = checkpoint.model
    most = max(map(len, prompts))
    ids_BP = torch.tensor([[0] * (most - len(ids)) + ids for ids in prompts], device=checkpoint.device)
    mask_BP = torch.tensor([[0] * (most - len(ids)) + [1] * len(ids) for ids in prompts], device=checkpoint.device)
    warm = temperature > 0
    options: dict[str, Any] = {"temperature": temperature if warm else None, "top_k": 0 if warm else None,
                               "top_p": 1.0 if warm else None}  # fmt: skip
    stops = stop_ids(model)
    with torch.random.fork_rng(devices=[] if ids_BP.device.type == "cpu" else None), preserve_modes(model):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=rng)))
        model.eval()
        whole_BL: Tensor = model.generate(
            ids_BP,
            attention_mask=mask_BP,
            do_sample=warm,
            num_beams=1,
            max_new_tokens=tokens,
            # The padding of ended rows is cut off below.
            pad_token_id=next(iter(stops), 0),
            **options,
        )
    return [truncate_at_stop(row, stops) for row in whole_BL[:, most:].tolist()]


def stop_ids(model: Any) -> list[int]:
    """Return the tokens that end a text, by the model's generation config."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def truncate_at_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens up to and including the first stop token."""
    end = next((index for index, token in enumerate(ids, 1) if token in stops), len(ids))
    return ids[:end]
