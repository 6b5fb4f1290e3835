"""Inputs of both sides: a checkpoint directory, calibration and held-out token ids, and the peer's environment."""

from __future__ import annotations

from pathlib import Path

import common
from safetensors.torch import save_file
from transformers import AutoTokenizer

from intaglio.data import assets
from intaglio.data.segments import segments
from intaglio.data.texts import load_texts
from intaglio.errors import IntaglioError

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "peer-requirements.txt"


def checkpoint_directory(model: str) -> Path:
    """Return the directory of a checkpoint.

    Raises:
        IntaglioError: it is neither, or its weights are in several files.
    """
    path = Path(model) if Path(model).is_dir() else Path(assets.path(model))
    if not (path / "model.safetensors").is_file():
        raise IntaglioError(f"the model {path} has no model.safetensors; give an ordinary checkpoint of one file")
    return path.resolve()


def token_files(
    model: Path, texts: str, folder: Path, samples: int, held_out: int, length: int, seed: int
) -> tuple[Path, Path, dict[str, str]]:
    """Write the calibration and the held-out token ids; no document is in both.

    Returns:
        The two files and the digests of the two sets of ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    training, rest = load_texts(texts).split()
    calibration = segments(tokenizer, training, samples, length, seed)
    evaluation = segments(tokenizer, rest, held_out, length, seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "calibration.safetensors", folder / "held-out.safetensors"
    for path, part in zip(files, (calibration, evaluation), strict=True):
        save_file({common.IDS: part.ids_NT.contiguous()}, path)
    return *files, {"calibration": calibration.digest, "held_out": evaluation.digest}
