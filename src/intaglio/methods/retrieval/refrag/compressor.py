"""The compressor: an encoder of chunks, the projection to the decoder's embeddings, and the expansion policy.

Dimension letters: N chunks, K tokens of a chunk as the encoder reads it, E width of the encoder, D of the decoder, L
chunks of a context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint.from_scratch import BYTES, SPECIAL, new
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy

EMBEDDING = "embedding"
"""Encoder that averages the decoder's own embeddings of a chunk's tokens; it has no weights."""
POLICY_LAYERS, POLICY_HEADS = 2, 4


class ChunkReader:
    """Turns chunks of decoder tokens into rows of the encoder's tokens.

    A new encoder reads the decoder's ids after a class token of its own. A pretrained one reads the decoded text, with
    its own tokenizer: k tokens of the decoder are rarely k of the encoder.

    Args:
        checkpoint: the decoder, with its tokenizer where text is needed.
        tokenizer: of a pretrained encoder. Default: none; ids are read.
        class_id: put in front of ids. Default: nothing is.

    Raises:
        IntaglioError: text is needed, and the decoder has no tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any = None, class_id: int | None = None) -> None:
        if tokenizer is not None and checkpoint.tokenizer is None:
            raise IntaglioError(
                "the encoder has a tokenizer of its own and the decoder has none, so chunks cannot be handed over as"
                " text; leave encoder out"
            )
        self._decoder, self._tokenizer, self._class_id = checkpoint.tokenizer, tokenizer, class_id

    def __call__(self, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the encoder's ids and mask of chunks, int64 [N, K] each."""
        rows = [torch.as_tensor(chunk) for chunk in chunks]
        if self._tokenizer is not None:
            texts = self._decoder.batch_decode([row.tolist() for row in rows])
            rows = [torch.tensor(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        elif self._class_id is not None:
            rows = [torch.cat([torch.tensor([self._class_id]), row]) for row in rows]
        if not rows:
            return torch.zeros((0, 1), dtype=torch.int64), torch.zeros((0, 1), dtype=torch.int64)
        return _padded(rows), _padded([torch.ones_like(row) for row in rows])


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class Compressor(nn.Module):
    """Chunk states c = pool(E(chunk)) and chunk embeddings e = phi(c) in the decoder's embedding space.

        phi(c) = W_2 gelu(W_1 c + b_1) + b_2,     score = policy(c_1 .. c_L)

    W_2 is scaled at the start so that e has the root mean square of the decoder's embeddings. Embeddings that the model
    multiplies by a constant (Gemma) are matched before it; chunks are multiplied alike.

    Args:
        encoder: bidirectional model; None: the mean of the decoder's embeddings.
        state_width: E.
        embedding: the decoder's input embedding.
        pooling: `cls`, the first state, or `mean`.
        projection: `mlp` or `identity`.
        match_scale: whether the output is normalised to the embeddings' root mean square times a learned scale.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        state_width: int,
        embedding: nn.Module,
        pooling: Literal["cls", "mean"],
        projection: Literal["mlp", "identity"],
        match_scale: bool,
    ) -> None:
        super().__init__()
        weight_VD: Tensor = embedding.weight  # type: ignore[assignment]
        width = weight_VD.shape[1]
        if projection == "identity" and state_width != width:
            raise IntaglioError(
                f"projection is identity, but the encoder's width is {state_width} and the decoder's is {width}"
            )
        self.encoder, self.pooling, self.state_width = encoder, pooling, state_width
        self.projection: nn.Module = nn.Identity()
        rms = float(weight_VD.detach().float().square().mean().sqrt())
        if projection == "mlp":
            self.projection = nn.Sequential(nn.Linear(state_width, width), nn.GELU(), nn.Linear(width, width))
            with torch.no_grad():
                last: Any = self.projection[-1]
                sample = self.projection(torch.randn(64, state_width))
                last.weight.mul_(rms / sample.square().mean().sqrt())
                last.bias.zero_()
        self.scale = nn.Parameter(torch.tensor(rms)) if match_scale else None
        heads = math.gcd(state_width, POLICY_HEADS)
        layer = nn.TransformerEncoderLayer(
            state_width, heads, 4 * state_width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.policy = nn.TransformerEncoder(layer, POLICY_LAYERS, enable_nested_tensor=False)
        self.score = nn.Linear(state_width, 1)

    def states(self, ids_NK: Tensor, mask_NK: Tensor, embedding: nn.Module) -> Tensor:
        """Return the pooled states [N, E] of chunks; padding does not count."""
        if not len(ids_NK):
            return embedding.weight.new_zeros((0, self.state_width))  # type: ignore[operator]
        if self.encoder is None:
            hidden_NKE = F.embedding(ids_NK, embedding.weight)  # type: ignore[arg-type]
        else:
            hidden_NKE = self.encoder(input_ids=ids_NK, attention_mask=mask_NK).last_hidden_state
        if self.pooling == "cls" and self.encoder is not None:
            return hidden_NKE[:, 0]
        weight_NK1 = mask_NK[..., None].to(hidden_NKE.dtype)
        return (hidden_NKE * weight_NK1).sum(1) / weight_NK1.sum(1)

    def project(self, states_NE: Tensor, embedding: nn.Module) -> Tensor:
        """Return the chunk embeddings [N, D], as the decoder's blocks read embeddings."""
        projected_ND = self.projection(states_NE)
        if self.scale is not None:
            projected_ND = F.rms_norm(projected_ND, projected_ND.shape[-1:], eps=1e-8) * self.scale
        return projected_ND.to(embedding.weight.dtype) * embedding_scale(embedding)

    def scores(self, states_LE: Tensor) -> Tensor:
        """Return the policy's score [L] of each chunk of a context."""
        return self.score(self.policy(states_LE[None]))[0, :, 0]


def embedding_scale(embedding: nn.Module) -> Tensor | float:
    """Return the constant by which a model's embedding multiplies its rows, 1 for most."""
    return getattr(embedding, "embed_scale", 1.0)


def make_compressor(
    checkpoint: Checkpoint,
    encoder: str | None,
    width: int | None,
    depth: int,
    chunk_size: int,
    seed: int,
    **options: Any,
) -> tuple[Compressor, ChunkReader]:
    """Return an untrained compressor and the reader of its chunks; see `Refrag` and `Compressor`.

    Raises:
        IntaglioError: the encoder is a decoder, or sizes do not fit each other.
    """
    embedding: Any = checkpoint.model.get_input_embeddings()  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if encoder == EMBEDDING:
            made = Compressor(None, embedding.weight.shape[1], embedding, **options)
            return made, ChunkReader(checkpoint)
        if encoder is not None:
            loaded = load(encoder)
            if anatomy(loaded.model).causal:
                raise IntaglioError(f"encoder is {encoder!r}, which sees earlier tokens alone; an encoder is needed")
            reader = ChunkReader(checkpoint, loaded.tokenizer)
            base: Any = loaded.model.base_model
            return Compressor(base, int(loaded.config.hidden_size), embedding, **options), reader
        rows = checkpoint.vocabulary
        state_width = width or int(checkpoint.config.hidden_size)
        vocab = max(rows + 1, BYTES + len(SPECIAL))  # `new` counts the tokens of a tokenizer that is not used here
        base = new(
            "bert", width=state_width, depth=depth, vocab=vocab, context=chunk_size + 1, seed=seed % 2**32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        plain: Any = base.model.base_model
        return Compressor(plain, state_width, embedding, **options), ChunkReader(checkpoint, class_id=rows)
