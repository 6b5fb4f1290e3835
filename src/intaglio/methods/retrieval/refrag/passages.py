"""Compressed passages, the choice of chunks that stay tokens, and the mixed prompt.

Dimension letters: S tokens of a passage, L its compressible chunks, N those of all passages, E width of the encoder, D
of the decoder, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError, did_you_mean
from intaglio.methods.retrieval.refrag.compressor import ChunkReader, Compressor
from intaglio.methods.retrieval.refrag.functional import (
    TOKEN,
    Piece,
    context_pieces,
    expansion_count,
    is_compressible,
    layout,
)
from intaglio.trainer.rng import generator

Expander = Literal["policy", "cosine", "high_perplexity", "low_perplexity", "random"]
ENCODED = 64
"""Chunks that are encoded at a time."""


@dataclass(frozen=True)
class Passage:
    """A passage of tokens with its compressible chunks; independent of the question and of other passages.

    Args:
        ids: tokens, int64 [S].
        states: pooled states of the encoder, [L, E].
        embeddings: chunk embeddings in the decoder's space, [L, D].
        losses: mean negative log-likelihood of each chunk given the passage before it, [L]; None: not measured.
    """

    ids: Tensor
    states: Tensor
    embeddings: Tensor
    losses: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is cached; the tokens follow from the text."""
        own = {"states": self.states, "embeddings": self.embeddings}
        return own if self.losses is None else {**own, "losses": self.losses}


@dataclass(frozen=True)
class MixedPrompt:
    """A prompt of tokens and chunk embeddings.

    Args:
        ids: tokens, 0 at chunks, int64 [T].
        slots: row of `chunks` at each position, -1 for tokens, int64 [T].
        chunks: chunk embeddings, [N, D].
        expanded: the chunks that stayed tokens, as indices over all passages.
    """

    ids: Tensor
    slots: Tensor
    chunks: Tensor
    expanded: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def embeddings(self, model: Any) -> Tensor:
        """Return the input embeddings [1, T, D]."""
        device = next(model.parameters()).device
        table = self.chunks.to(device)
        return mixed_embeddings(model, self.ids[None].to(device), self.slots[None].to(device), table)


def mixed_embeddings(model: Any, ids_BT: Tensor, slots_BT: Tensor, chunks_ND: Tensor) -> Tensor:
    """Return input embeddings [B, T, D]: those of tokens, and a row of the table where the slot names it."""
    embedded_BTD: Tensor = model.get_input_embeddings()(ids_BT)
    if not len(chunks_ND):
        return embedded_BTD
    chosen_BTD = chunks_ND[slots_BT.clamp_min(0)].to(embedded_BTD.dtype)
    return torch.where((slots_BT != TOKEN)[..., None], chosen_BTD, embedded_BTD)


@torch.no_grad()
def compress_passages(
    checkpoint: Checkpoint,
    compressor: Compressor,
    reader: ChunkReader,
    passages: Sequence[Tensor],
    chunk_size: int,
    tail: str,
) -> list[Passage]:
    """Return passages with their chunk states and embeddings."""
    if not passages:
        return []
    embedding, device = checkpoint.model.get_input_embeddings(), checkpoint.device  # type: ignore[operator]
    own = [compressible_chunks([ids_S], chunk_size, tail) for ids_S in passages]
    chunks, counts = [chunk for part in own for chunk in part], [len(part) for part in own]
    parts = [reader(chunks[low : low + ENCODED]) for low in range(0, max(1, len(chunks)), ENCODED)]
    states_NE = torch.cat([compressor.states(ids.to(device), mask.to(device), embedding) for ids, mask in parts])
    embeddings_ND = compressor.project(states_NE, embedding)
    split = zip(passages, states_NE.split(counts), embeddings_ND.split(counts), strict=True)
    return [Passage(ids_S, states_LE.cpu(), embeddings_LD.cpu()) for ids_S, states_LE, embeddings_LD in split]


@torch.no_grad()
def chunk_losses(checkpoint: Checkpoint, ids_S: Tensor, bos: Tensor, chunk_size: int, count: int) -> Tensor:
    """Return the decoder's mean loss on each of a passage's first `count` chunks, given the tokens before, [L].

    Without a BOS the first token is not predicted and counts 0.
    """
    row_1T = torch.cat([bos, ids_S])[None].to(checkpoint.device)
    checkpoint.check_ids(row_1T)
    logits_SV = checkpoint.model(input_ids=row_1T[:, :-1], use_cache=False).logits[0].float()
    losses_S = F.cross_entropy(logits_SV, row_1T[0, 1:], reduction="none").cpu()
    losses_S = F.pad(losses_S, (len(ids_S) - len(losses_S), 0))
    return torch.stack([chunk.mean() for chunk in losses_S.split(chunk_size)])[:count]


def choose_expanded(
    passages: Sequence[Passage],
    share: float,
    expander: Expander,
    *,
    compressor: Compressor,
    question_E: Tensor | None = None,
    seed: int = 0,
) -> tuple[int, ...]:
    """Return the chunks that stay tokens, ascending, as indices over all passages.

    Args:
        passages: in the order of the prompt.
        share: share p of the chunks.
        expander: `policy` takes the highest scores in turn; `cosine` the chunks nearest to the question's state;
            `high_perplexity` and `low_perplexity` by the decoder's loss; `random` draws from `seed`.
        compressor: has the policy.
        question_E: state of the question, for `cosine`.
        seed: of `random`.

    Raises:
        IntaglioError: an unknown expander.
    """
    if expander not in get_args(Expander):
        raise IntaglioError(f"expander is {expander!r}; {did_you_mean(str(expander), get_args(Expander))}")
    if not passages:
        return ()
    states_NE = torch.cat([passage.states for passage in passages])
    count = expansion_count(len(states_NE), share)
    if not count or count == len(states_NE):
        return tuple(range(count))
    if expander == "policy":
        with torch.no_grad():
            scores_N = compressor.scores(states_NE.to(compressor.score.weight.device)).cpu()
    elif expander == "cosine":
        assert question_E is not None
        scores_N = F.cosine_similarity(states_NE, question_E[None])
    elif expander == "random":
        scores_N = torch.rand(len(states_NE), generator=generator(seed, "expand"))
    else:
        losses_N = torch.cat([passage.losses for passage in passages if passage.losses is not None])
        scores_N = losses_N if expander == "high_perplexity" else -losses_N
    return tuple(sorted(scores_N.topk(count).indices.tolist()))


def compressible_chunks(passages: Sequence[Tensor], chunk_size: int, tail: str) -> list[Tensor]:
    """Return the chunks of all passages that can be one embedding, in order."""
    split = ((ids_S.split(chunk_size), is_compressible(ids_S, chunk_size, tail)) for ids_S in passages if len(ids_S))
    return [chunk for chunks, keep in split for chunk, kept in zip(chunks, keep, strict=True) if kept]


def prompt_pieces(
    before: Tensor, passages: Sequence[Tensor], after: Tensor, chunk_size: int, tail: str, expanded: Sequence[int] = ()
) -> list[Piece]:
    """Return the parts of a prompt: each compressible chunk by its number, unless it is expanded; order is kept."""
    pieces: list[Piece] = [before]
    number, kept = 0, set(expanded)
    for ids_S in passages:
        rows: list[int | None] = []
        for compressible in is_compressible(ids_S, chunk_size, tail):
            rows.append(number if compressible and number not in kept else None)
            number += compressible
        pieces += context_pieces(ids_S, chunk_size, rows)
    return [*pieces, after]


def mixed_prompt(
    before: Tensor, passages: Sequence[Passage], after: Tensor, chunk_size: int, tail: str, expanded: Sequence[int] = ()
) -> MixedPrompt:
    """Return the prompt of compressed passages; see `prompt_pieces`."""
    pieces = prompt_pieces(before, [passage.ids for passage in passages], after, chunk_size, tail, expanded)
    chunks_ND = torch.cat([passage.embeddings for passage in passages]) if passages else torch.zeros(0, 1)
    return MixedPrompt(*layout(pieces), chunks_ND, tuple(expanded))


def token_prompt(before: Tensor, passages: Sequence[Tensor], after: Tensor) -> MixedPrompt:
    """Return the plain prompt of a question: every passage as its tokens."""
    return MixedPrompt(*layout([before, *passages, after]), torch.zeros(0, 1))


@torch.no_grad()
def generate_answer(
    checkpoint: Checkpoint, prompt: MixedPrompt, max_new_tokens: int = 128, streamer: Any = None
) -> list[int]:
    """Return the new tokens that the decoder generates greedily after a mixed prompt.

    Raises:
        IntaglioError: prompt and new tokens do not fit into the context.
    """
    room = checkpoint.context - len(prompt)
    if room < max_new_tokens:
        raise IntaglioError(
            f"a prompt of {len(prompt)} positions leaves room for {max(0, room)} new tokens in the context of "
            f"{checkpoint.context}; max_new_tokens is {max_new_tokens}"
        )
    model: Any = checkpoint.model
    embeddings_1TD = prompt.embeddings(model)
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = getattr(checkpoint.tokenizer, "pad_token_id", None) or 0
    mask_1T = torch.ones(embeddings_1TD.shape[:2], dtype=torch.int64, device=embeddings_1TD.device)
    sampling = {"temperature": None, "top_k": None, "top_p": None}
    new = model.generate(
        inputs_embeds=embeddings_1TD, attention_mask=mask_1T, max_new_tokens=max_new_tokens, do_sample=False,
        num_beams=1, streamer=streamer, pad_token_id=pad, **sampling,
    )  # fmt: skip
    ids: list[int] = new[0].tolist()
    return ids
