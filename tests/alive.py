"""Results of small runs of a method, for the test that each of its fields changes one: `ALIVE` in its test file.

`ALIVE` has, for each field, a value that is not the default; `alive(value, **given)` where the field acts only with
others as `given`; or the name of a test of the file that shows the effect. A test file may define `observe(method)`;
otherwise the method's kinds choose one of the functions below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.methods.base import Method
from tests.families import tiny_model, tiny_tokenizer
from tests.trainer.helpers import PAIRS, TEXTS, checkpoint, run, suited

IDS = torch.randint(8, 150, (4, 12), generator=torch.Generator().manual_seed(0))
PROMPT = [9, 30, 31, 32, 9, 30, 31, 33, 9, 30]
TIMES = {"seconds", "created", "parameters"}
"""Keys of a record that differ between equal runs, or repeat the fields."""


@dataclass(frozen=True)
class Alive:
    """A value of a field, and other fields that both runs have."""

    value: Any
    given: dict[str, Any]
    refused: bool = False


def alive(value: Any, **given: Any) -> Alive:
    """Return a value that acts only with other fields as given."""
    return Alive(value, given)


def refused(value: Any, **given: Any) -> Alive:
    """Return a value with which the example is refused."""
    return Alive(value, given, refused=True)


def digest(result: Any) -> str:
    """Return a hash of a nested result, tensors bit for bit."""
    state = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype}{tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            add(torch.from_numpy(np.ascontiguousarray(value)))
        elif is_dataclass(value) and not isinstance(value, type):
            add(asdict(value))
        elif isinstance(value, Mapping):
            for key in value:
                if key not in TIMES:
                    state.update(f"{key}:".encode())
                    add(value[key])
        elif isinstance(value, list | tuple):
            state.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            state.update(f"{value!r};".encode())

    add(result)
    return state.hexdigest()


def carved(method: Any, family: str = "llama", **more: Any) -> Any:
    """Apply a carving to a tiny model: weights, logits, record, and what is restored after a load."""
    ckpt = Checkpoint(tiny_model(family, layers=2, **more), tiny_tokenizer(family), "tiny")
    calls: list[Any] = []
    method.apply(ckpt, IDS, batch_size=2, progress=lambda *call: calls.append(call))
    with torch.no_grad():
        logits = ckpt.model(IDS).logits
    return ckpt.model.state_dict(), logits, ckpt.record.steps[-1].model_dump(), ckpt.record.live, calls, _tokens(ckpt)


def _tokens(ckpt: Checkpoint) -> Any:
    suppressed = getattr(getattr(ckpt.model, "generation_config", None), "suppress_tokens", None)
    return suppressed, ckpt.tokenizer("return 12312")["input_ids"]


def modified(method: Any, layers: int = 1, **more: Any) -> Any:
    """Train with a modifier: weights, curve and record."""
    ckpt = checkpoint(layers=layers)
    result = run(ckpt, modifiers=[method], **{"steps": 4, "warmup": 0, "weight_decay": 0.1, **suited(method), **more})
    return ckpt.model.state_dict(), [(row.loss, row.parts) for row in result.history], ckpt.record.live


def taught(method: Any, data: Any = TEXTS, family: str = "llama", **more: Any) -> Any:
    """Train on an objective: weights, curve and record."""
    ckpt = checkpoint(family, layers=1)
    result = run(ckpt, data, objective=method, **{"steps": 3, "warmup": 0, **more})
    return ckpt.model.state_dict(), [(row.loss, row.parts) for row in result.history], ckpt.record.live


def encoded(method: Any, family: str = "llama", **more: Any) -> Any:
    """Train an encoder on pairs: weights, curve, and vectors of both sides."""
    ckpt = checkpoint(family, layers=1)
    pairs = [{**pair, "scores": [0.9, 0.4, 0.6]} for pair in PAIRS]
    rows = run(ckpt, pairs, objective=method, **{"steps": 3, "warmup": 0, **more}).history
    vectors = [method.encode(ckpt, TEXTS[:3], side) for side in ("query", "document")]
    return ckpt.model.state_dict(), method.modules().state_dict(), [(row.loss, row.parts) for row in rows], vectors


def drafted(method: Any, model: Any = None, prompt: Any = PROMPT, **options: Any) -> Any:
    """Generate with a drafter, twice: output, and the tree and path of every step."""
    model = tiny_model("llama", layers=2, dtype=torch.float64) if model is None else model
    steps: list[Any] = []

    def on_step(step: Any) -> None:
        tree = None if step.tree is None else (list(step.tree.tokens), list(step.tree.parents))
        steps.append((step.row, list(step.tokens), step.drafted, tree, list(step.path)))

    method = method.model_copy(update={"on_step": on_step}) if method.on_step is None else method
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": 12, **options}
    ids = torch.tensor([prompt])
    return [model.generate(ids, **settings, custom_generate=method) for _ in range(2)], steps


def fitted_and_drafted(method: Any) -> Any:
    """Train heads for a tiny model, and draft with untrained ones while sampling."""
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    method.fit(ckpt, TEXTS[:3], seed=1)
    attachment = ckpt.attachments[method.slug]
    return attachment.tensors, attachment.about, ckpt.record.steps[-1].chosen, drafted(method, do_sample=True)


def observe(method: Method) -> Any:
    """Return the result of a method by its kinds."""
    kinds = type(method).kinds
    if "modifier" in kinds:
        return modified(method)
    if "encoder" in kinds:
        return encoded(method)
    if "objective" in kinds:
        return taught(method)
    if "drafter" in kinds:
        return drafted(method)
    return carved(method)
