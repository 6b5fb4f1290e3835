"""Intaglio carves pretrained transformers: masks over tokens, attention, weights, units and next tokens.

    import intaglio
    ckpt = intaglio.load("smollm2")                  # a bundled name, a directory, or a hub id
    intaglio.DSnoT(pattern="2:4").apply(ckpt, calibration=texts)
    ckpt.save("out/")                                # AutoModelForCausalLM loads it

Every name below is loaded when it is first used, so that importing the package costs nothing:

- `load`, `Checkpoint`: a model, its tokenizer and the record of what was done to it
- `Recipe`, `carve`, `compare`, `plan`: recipes and what runs them
- `export`: a checkpoint in a format that stock transformers loads
- `new`, `train`, `CausalLM`, `InstructionTuning`: small models from scratch, and the one training loop
- `load_texts`, `Corpus`, `Segments`: data
- `IntaglioError`: the one error a user can cause
- every method of the catalogue by its name (`Magnitude`, `Wanda`, `SparseGPT`, `DSnoT`)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from intaglio.methods.registry import PUBLISHED

if TYPE_CHECKING:
    from intaglio.checkpoint import Checkpoint, load
    from intaglio.checkpoint.from_scratch import new
    from intaglio.data.segments import Segments
    from intaglio.data.texts import Corpus, load_texts
    from intaglio.errors import IntaglioError
    from intaglio.export import export
    from intaglio.recipe.plan import plan
    from intaglio.recipe.run import carve, compare
    from intaglio.recipe.schema import Recipe
    from intaglio.trainer.causal_lm import CausalLM
    from intaglio.trainer.instruction_tuning import InstructionTuning
    from intaglio.trainer.loop import train

_HOMES = {
    "CausalLM": "trainer.causal_lm",
    "Checkpoint": "checkpoint",
    "Corpus": "data.texts",
    "InstructionTuning": "trainer.instruction_tuning",
    "IntaglioError": "errors",
    "Recipe": "recipe.schema",
    "Segments": "data.segments",
    "carve": "recipe",
    "compare": "recipe",
    "export": "export",
    "load": "checkpoint",
    "load_texts": "data.texts",
    "new": "checkpoint.from_scratch",
    "plan": "recipe",
    "train": "trainer.loop",
}
_METHODS = {entry.name: entry.module for entry in PUBLISHED.values()}

__all__ = [
    "CausalLM",
    "Checkpoint",
    "Corpus",
    "InstructionTuning",
    "IntaglioError",
    "Recipe",
    "Segments",
    "carve",
    "compare",
    "export",
    "load",
    "load_texts",
    "new",
    "plan",
    "train",
    *_METHODS,
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"intaglio.{_HOMES[name]}"), name)
    if name in _METHODS:
        return getattr(import_module(_METHODS[name]), name)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
