"""Trained encoders as models of sentence-transformers, for those that its stock modules cannot compute."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.trainer.text_batches import text_batch

if TYPE_CHECKING:
    from intaglio.trainer.encoder_training import EncoderObjective


class EncoderModule(nn.Module):
    """An input module of sentence-transformers: reads texts as the method does, and returns its vectors.

    Args:
        method: the encoder, set up for the checkpoint.
        checkpoint: the model with its tokenizer.
    """

    modalities = ("text",)

    def __init__(self, method: EncoderObjective, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model, self.owned = checkpoint.model, method.modules()
        self.tokenizer = checkpoint.tokenizer
        self._encoder, self._dimensions = method, method.dimensions(checkpoint)
        self.max_seq_length = method.length("document")

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **more: Any) -> dict[str, Any]:
        """Return the inputs of texts; `task` is `query` or `document` (default)."""
        side = "query" if more.get("task") == "query" else "document"
        return {**text_batch([self._encoder.read((prompt or "") + text, side) for text in inputs]), "side": side}

    def forward(self, features: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Add the vectors as `sentence_embedding`."""
        inputs = {name: value for name, value in features.items() if isinstance(value, Tensor)}
        vectors_ND: Tensor = self._encoder.searched(self.model, inputs, features["side"])
        return {**features, "sentence_embedding": vectors_ND}

    def get_embedding_dimension(self) -> int:
        """Return the number of dimensions."""
        return self._dimensions

    get_sentence_embedding_dimension = get_embedding_dimension


def wrap(method: EncoderObjective, checkpoint: Checkpoint) -> Any:
    """Return a `SentenceTransformer`, or a `SparseEncoder`, of one module."""
    if find_spec("sentence_transformers") is None:
        raise IntaglioError("this needs the package sentence-transformers: pip install sentence-transformers")
    import sentence_transformers

    sparse = method.sparse
    kind = sentence_transformers.SparseEncoder if sparse else sentence_transformers.SentenceTransformer
    similarity: Any = "dot" if sparse or not getattr(method, "normalize", True) else "cosine"
    with torch.no_grad():
        return kind(
            modules=[EncoderModule(method, checkpoint)], similarity_fn_name=similarity, device=str(checkpoint.device)
        )
