"""Training rows as a reader of a report sees them: a text, or a thumbnail of an image."""

from __future__ import annotations

from typing import Any

from intaglio.checkpoint import Checkpoint
from intaglio.data.labelled_images import thumbnail
from intaglio.trainer.protocols import Example

PIXELS = "pixel_values"


def shown_example(checkpoint: Checkpoint, row: Example) -> dict[str, str]:
    """Return `{text}`, or `{png}`, a small PNG in base64, of a row of tensors; empty where neither is possible."""
    if PIXELS in row:
        return {"png": pixels_png(row[PIXELS])}
    if "input_ids" in row and checkpoint.tokenizer is not None:
        return {"text": checkpoint.tokenizer.decode(row["input_ids"], skip_special_tokens=True)}
    return {}


def pixels_png(pixels_CHW: Any) -> str:
    """Return pixel values as a small PNG in base64, scaled to their own range, with the first channel or three."""
    shown = pixels_CHW[: 3 if len(pixels_CHW) >= 3 else 1].detach().float().cpu()
    low, high = float(shown.min()), float(shown.max())
    image_HWC = ((shown - low) / max(high - low, 1e-9) * 255).round().byte().permute(1, 2, 0).numpy()
    return thumbnail(image_HWC, "of a row")
