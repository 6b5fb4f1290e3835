"""Intaglio applies published masking and sparsity methods to pretrained transformers.

    import intaglio
    ckpt = intaglio.load("smollm2")                  # a bundled name, a directory, or a hub id
    intaglio.DSnoT(pattern="2:4").apply(ckpt, calibration=texts)
    ckpt.save("out/")                                # AutoModelForCausalLM loads it

Every name below is loaded when it is first used, so that importing the package costs nothing:

- `load`, `Checkpoint`: a model, its tokenizer or image processor, and its record
- `Recipe`, `carve`, `compare`, `plan`: recipes, and running them
- `export`: a checkpoint in a format that stock transformers loads
- `new`, `new_image_model`: small models from scratch
- `train`, `CausalLM`, `InstructionTuning`, `Contrastive`, `Classification`: the training loop and its objectives
- `load_texts`, `Corpus`, `Segments`: data
- `IntaglioError`: the error raised for bad input
- every published method by its name (`Magnitude`, `Wanda`, `SparseGPT`, `DSnoT`)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from intaglio.methods.registry import PUBLISHED

if TYPE_CHECKING:
    from intaglio.checkpoint import Checkpoint, load
    from intaglio.checkpoint.from_scratch import new, new_image_model
    from intaglio.data.segments import Segments
    from intaglio.data.texts import Corpus, load_texts
    from intaglio.errors import IntaglioError
    from intaglio.exporters import export
    from intaglio.recipe.plan import plan
    from intaglio.recipe.run import carve, compare
    from intaglio.recipe.schema import Recipe
    from intaglio.trainer.causal_lm import CausalLM
    from intaglio.trainer.classification import Classification
    from intaglio.trainer.contrastive import Contrastive
    from intaglio.trainer.instruction_tuning import InstructionTuning
    from intaglio.trainer.loop import train

_MODULES = {
    "CausalLM": "intaglio.trainer.causal_lm",
    "Classification": "intaglio.trainer.classification",
    "Contrastive": "intaglio.trainer.contrastive",
    "Checkpoint": "intaglio.checkpoint",
    "Corpus": "intaglio.data.texts",
    "InstructionTuning": "intaglio.trainer.instruction_tuning",
    "IntaglioError": "intaglio.errors",
    "Recipe": "intaglio.recipe.schema",
    "Segments": "intaglio.data.segments",
    "carve": "intaglio.recipe.run",
    "compare": "intaglio.recipe.run",
    "export": "intaglio.exporters",
    "load": "intaglio.checkpoint",
    "load_texts": "intaglio.data.texts",
    "new": "intaglio.checkpoint.from_scratch",
    "new_image_model": "intaglio.checkpoint.from_scratch",
    "plan": "intaglio.recipe.plan",
    "train": "intaglio.trainer.loop",
}
_METHODS = {entry.name: entry.module for entry in PUBLISHED.values()}

__all__ = [
    "CausalLM",
    "Checkpoint",
    "Classification",
    "Contrastive",
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
    "new_image_model",
    "plan",
    "train",
    *_METHODS,
]


def __getattr__(name: str) -> Any:
    if module := _MODULES.get(name) or _METHODS.get(name):
        return getattr(import_module(module), name)
    raise AttributeError(f"module 'intaglio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
