"""Chimera's modules and their loss: a tri-gram encoder, one decoder layer over all tokens, heads.

    g_i = [e_{i-2}; e_{i-1}; e_i]                       input embeddings; g_0 = [e0;e0;e0], g_1 = [e0;e1;e1]
    u_i = P (g_i + SiLU(W g_i + b))                     W and b start at 0
    z_{j+1} = F( u_{j+1} | h_0..h_j, u_1..u_{j+1} )     an estimate of h_{j+1}, which the model has not computed yet
    logits_m(j) = C_m [h_j; z^m_j]                      of token j + 2 + m; C_m starts as [W_lm, W_lm]

For m >= 1 the token that head m - 1 guessed makes a tri-gram u'_m with the two tokens before it on its branch, at
position j + 1 + m; F sees h_0..h_j, the branch's own z^0..z^{m-1} in the place of the hidden states that are missing,
and u'_m itself.

Dimension letters: B rows, T tokens, J places with a next token, N rows of F, K slots of F, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import CACHE, Anatomy, HeadOnly, anatomy, capture, final_hidden, run_block
from intaglio.speculative.heads.chunked_loss import in_pieces, kl, nothing
from intaglio.speculative.heads.lm_head import Vocabulary, Words, rank_of
from intaglio.speculative.heads.multi_token_loss import hits, named
from intaglio.speculative.target_model import as_taken
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Batch, Loss


class TriGram(nn.Module):
    """The tri-gram encoder; it depends on three token ids only.

    Args:
        width: D.
        generator: what P is drawn from.
        tokens: 3; 1 leaves the two tokens before out (an ablation: u_i = P (e_i + SiLU(W e_i + b))).
    """

    def __init__(self, width: int, generator: torch.Generator, tokens: int = 3) -> None:
        super().__init__()
        inputs = tokens * width
        self.tokens = tokens
        # Without the usual start, which would be drawn from the global generator.
        self.mix = nn.utils.skip_init(nn.Linear, inputs, inputs)
        self.down = nn.utils.skip_init(nn.Linear, inputs, width, bias=False)
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.bias.zero_()
            self.down.weight.copy_(torch.randn(width, inputs, generator=generator) / inputs**0.5)

    def forward(self, embedded_N3D: Tensor) -> Tensor:
        """u [..., D].

        Args:
            embedded_N3D: embeddings of the two tokens before and of the token itself [..., 3, D].
        """
        g = embedded_N3D[..., -self.tokens :, :].flatten(-2)
        found: Tensor = self.down(g + F.silu(self.mix(g)))
        return found


def trigrams(ids_BT: Tensor) -> Tensor:
    """The three token ids at each place [B, T, 3], with the edges (0, 0, 0) and (0, 1, 1).

    Args:
        ids_BT: token ids.
    """
    padded = torch.cat([ids_BT[:, :1], ids_BT[:, :1], ids_BT], 1)
    found_BT3 = padded.unfold(1, 3, 1).clone()
    if ids_BT.shape[1] > 1:
        found_BT3[:, 1, 1] = ids_BT[:, 1]
    return found_BT3


def source_block(parts: Anatomy) -> int:
    """The block whose architecture F has: the first that sees everything, or else the first.

    Args:
        parts: of the target.
    """
    return next((index for index, window in enumerate(parts.windows) if window is None), 0)


def fresh_block(parts: Anatomy, index: int, generator: torch.Generator) -> nn.Module:
    """A block of the target's own architecture with weights of its own.

    Args:
        parts: of the target.
        index: of the block that it is like.
        generator: what matrices are drawn from, N(0, the model's own initial spread); norms start neutral, biases at 0.

    Raises:
        IntaglioError: the family builds its blocks in another way.
    """
    kind = type(parts.blocks[index])
    try:
        with torch.random.fork_rng(devices=[]):
            block: nn.Module = kind(parts.config, layer_idx=index)
    except TypeError as error:
        raise IntaglioError(
            f"a {kind.__name__} cannot be made from a configuration alone ({error}); use start_from: copy"
        ) from None
    spread = float(getattr(parts.config, "initializer_range", 0.02))
    inside = {id(p) for module in block.modules() if "norm" not in type(module).__name__.lower()
              for p in module.parameters(recurse=False)}  # fmt: skip
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif id(parameter) in inside:
                parameter.zero_()
    return block


class Draft(nn.Module):
    """Everything that is trained.

    Args:
        model: the target.
        heads: M.
        rank: of the shared change of the output matrix; see `intaglio.speculative.heads.lm_head`.
        start: `fresh` weights for F, or a `copy` of the target's block.
        parts_used: `all`; or without one of the two encoders, for ablations: `no_trigram` (u_i from e_i alone) or
            `no_context` (u straight to the heads).
        sharing: whether head 0 serves all depths.
        feature: weight a of MSE(h_{j+1}, z^0_{j+1}).
        distil: weight b of KL(the model at j + 1 + m || head m).
        tokens_K: the tokens that may be guessed; see `Words`. Default: all.
        seed: of what is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: int = 4,
        rank: int | None = None,
        start: Literal["fresh", "copy"] = "fresh",
        parts_used: Literal["all", "no_trigram", "no_context"] = "all",
        sharing: bool = False,
        feature: float = 0.0,
        distil: float = 0.0,
        tokens_K: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        parts = anatomy(model)
        if parts.head is None:
            raise IntaglioError(f"{type(model).__name__} has no output head, so nothing can be guessed for it")
        generator = torch.Generator().manual_seed(seed)
        weight_VD: Tensor = parts.head.weight  # type: ignore[assignment]
        self.words = Words(weight_VD, tokens_K)
        weight_VD = self.words.matrix(weight_VD)
        vocabulary, width = weight_VD.shape
        self.heads, self.sharing, self.feature, self.distil = heads, sharing, feature, distil
        self.ranks = 1
        self.source = source_block(parts)
        self.window = parts.windows[self.source]
        self.trigram = TriGram(width, generator, 1 if parts_used == "no_trigram" else 3)
        self.layer: nn.Module | None = None
        if parts_used != "no_context":
            fresh = start == "fresh"
            self.layer = (
                fresh_block(parts, self.source, generator) if fresh else copy.deepcopy(parts.blocks[self.source])
            )
            for module in self.layer.modules():
                if hasattr(module, "layer_idx"):
                    vars(module)["layer_idx"] = 0  # its cache has one layer
        own = 1 if sharing else heads
        self.vocabulary = Vocabulary(weight_VD, own, 2, rank_of(rank, own, vocabulary, 2 * width), generator)
        self.to(torch.float32)
        self.requires_grad_(True)  # a copied block may come from a frozen model

    def embed(self, parts: Anatomy, ids_N3: Tensor) -> Tensor:
        """u of tri-grams [..., D].

        Args:
            parts: of the target.
            ids_N3: three token ids each.
        """
        with torch.no_grad():
            embedded = parts.embedding(ids_N3)
        found: Tensor = self.trigram(embedded.to(self.trigram.down.weight.dtype))
        return found

    def encode(
        self, parts: Anatomy, rows_BND: Tensor, positions_BN: Tensor, visible_BNK: Tensor, cache: DynamicCache
    ) -> Tensor:
        """F over rows behind a cache that it fills; rows as they are where there is no F.

        Args:
            parts: of the target.
            rows_BND: what enters F.
            positions_BN: position ids.
            visible_BNK: what each row sees, window included: the slots of the cache, then the rows.
            cache: of one layer.
        """
        if self.layer is None:
            return rows_BND
        context = getattr(parts.config, "max_position_embeddings", None)
        if context is not None:
            positions_BN = positions_BN.clamp(max=int(context) - 1)
        inputs = capture(
            parts,
            {
                "input_ids": torch.zeros_like(positions_BN),
                "position_ids": positions_BN,
                "attention_mask": _mask(parts, visible_BNK[:, None]),
                CACHE: cache,
                "use_cache": True,
            },
        )
        return run_block(self.layer, self.source, rows_BND, inputs)

    def in_window(self, visible_BNK: Tensor, positions_BN: Tensor, positions_BK: Tensor) -> Tensor:
        """What is left of visibility within F's window, where it has one.

        Args:
            visible_BNK: before the window.
            positions_BN: of the rows.
            positions_BK: of the slots.
        """
        if self.window is None:
            return visible_BNK
        return visible_BNK & (positions_BN[:, :, None] - positions_BK[:, None] < self.window)

    def score(self, hidden_RD: Tensor, z_RD: Tensor, depth: int, weight_VD: Tensor) -> Tensor:
        """Logits [R, W] of the head of a depth, of the tokens that may be guessed.

        Args:
            hidden_RD: the last true hidden state h_j.
            z_RD: the estimate at this depth.
            depth: m; beyond the last head the last one serves.
            weight_VD: the model's output matrix.
        """
        head = 0 if self.sharing else min(depth, self.heads - 1)
        both_RX = torch.cat([hidden_RD, z_RD.to(hidden_RD.dtype)], -1)
        return self.vocabulary(both_RX, head, self.words.matrix(weight_VD))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """sum_m CE(logits_m(j), x_{j+2+m}), and what `feature` and `distil` add; j from 1.

        Where the text has a token that may not be guessed, the guess is wrong and nothing is learnt.

        Args:
            model: frozen.
            batch: from `head_batch`.
        """
        parts = anatomy(model)
        assert parts.head is not None
        weight_VD: Tensor = parts.head.weight  # type: ignore[assignment]
        dtype = self.trigram.down.weight.dtype
        hidden_BTD = final_hidden(parts, {"input_ids": batch["input_ids"]}).to(dtype)
        if hidden_BTD.shape[1] < 3:
            return Loss(nothing(list(self.parameters())))
        chain = Chain(self, parts, hidden_BTD, batch["input_ids"])
        head = HeadOnly(parts, frozen=False)
        losses, sums, counts = [], [], []
        for depth in range(self.heads):
            z_BJD = chain.step()
            found = self._depth_loss(batch, hidden_BTD, z_BJD, depth, weight_VD, head)
            losses.append(found[0])
            sums.append(found[1])
            counts.append(found[2])
            if depth + 1 < self.heads:
                chain.guess(found[3])
        total = torch.stack(losses).sum()
        parts_of, outputs = named(torch.stack(sums, 1), torch.stack(counts))
        if self.feature:
            scored_BJ = batch["scored"][:, 1:]
            distance = F.mse_loss(chain.first_BJD[scored_BJ], hidden_BTD[:, 1:][scored_BJ])
            total, parts_of = total + self.feature * distance, {**parts_of, "feature": distance}
        return Loss(total, parts_of, outputs)

    def _depth_loss(
        self, batch: Batch, hidden_BTD: Tensor, z_BJD: Tensor, depth: int, weight_VD: Tensor, head: HeadOnly
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean loss of one head, its sums, the number of its targets, and its greedy guess everywhere [B, J]."""
        rows, places = z_BJD.shape[:2]
        shift = depth + 1  # the model itself predicts the same token `shift` places later
        target_BJ = _later(batch["target"], shift, places, IGNORED)
        target_BJ[:, 0] = IGNORED
        teacher_BJD = _later(hidden_BTD, shift, places, 0.0) if self.distil else hidden_BTD[:, :places]
        taught_BJ = _later(batch["scored"], shift, places, False) & bool(self.distil)
        taught_BJ[:, 0] = False
        count = (target_BJ != IGNORED).sum().clamp(min=1)
        taught = taught_BJ.sum().clamp(min=1)

        def piece(
            hidden_RD: Tensor, z_RD: Tensor, target_R: Tensor, teacher_RD: Tensor, taught_R: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            logits_RV = self.score(hidden_RD, z_RD, depth, weight_VD)
            target_R = self.words.places(target_R)
            losses_R = F.cross_entropy(logits_RV.float(), target_R, ignore_index=IGNORED, reduction="none")
            loss = losses_R.sum() / count
            if self.distil:
                with torch.no_grad():
                    teacher_RV = self.words.narrow(head.logits(teacher_RD.to(weight_VD.dtype)[:, None])[:, 0])
                distance_R = torch.where(taught_R, kl(teacher_RV, logits_RV), 0.0)
                loss = loss + self.distil * distance_R.sum() / taught
            right_Rr = hits(logits_RV, target_R, self.ranks)
            sums = torch.cat([losses_R.detach().sum()[None], right_Rr.float().sum(0)])
            return loss, sums, self.words.tokens(logits_RV.detach().argmax(-1))

        given = [hidden_BTD[:, :places], z_BJD, target_BJ, teacher_BJD, taught_BJ]
        flat = [tensor.flatten(0, 1) for tensor in given]
        loss, sums, guesses = in_pieces(piece, flat, list(self.vocabulary.parameters()))
        assert guesses is not None
        return loss, sums, count, guesses.view(rows, places)


def _later(values: Tensor, places: int, length: int, fill: Any) -> Tensor:
    """What stands `places` later, for the first `length` places [B, length, ...]; `fill` behind the end."""
    found = values.new_full((values.shape[0], length, *values.shape[2:]), fill)
    kept = values[:, places : places + length]
    found[:, : kept.shape[1]] = kept
    return found


def _mask(parts: Anatomy, seen_B1NK: Tensor) -> Any:
    """A mask as the model takes it, for whichever layer type F is of."""
    config: Any = parts.config
    mask = as_taken(seen_B1NK, config._attn_implementation, next(parts.base.parameters()).dtype)
    names = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(names, mask) if len(names) > 1 else mask


class Chain:
    """F over the whole of some rows, depth by depth, each place with a branch of its own.

    Args:
        draft: the modules.
        parts: of the target.
        hidden_BTD: last hidden states.
        ids_BT: token ids.
    """

    def __init__(self, draft: Draft, parts: Anatomy, hidden_BTD: Tensor, ids_BT: Tensor) -> None:
        self._draft, self._parts = draft, parts
        self._cache = DynamicCache()
        rows, length = ids_BT.shape
        self.places = length - 1
        device = ids_BT.device
        self._place_BJ = torch.arange(self.places, device=device)[None].expand(rows, -1)
        self._tri_BT3 = trigrams(ids_BT)
        self._last_BJ2 = torch.stack([ids_BT[:, :-1], ids_BT[:, 1:]], -1)
        self._hidden_BJD = hidden_BTD[:, :-1]
        self._slots_BK = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self._depth = 0
        self._guess_BJ: Tensor | None = None
        self._z_BJD: Tensor | None = None
        self.first_BJD = hidden_BTD[:, :0]

    def guess(self, token_BJ: Tensor) -> None:
        """Take the guess of each place's branch for the next depth.

        Args:
            token_BJ: token ids.
        """
        self._guess_BJ = token_BJ

    def step(self) -> Tensor:
        """The estimates of the next depth [B, J, D]."""
        depth, places = self._depth, self.places
        if depth == 0:
            first_BJD = self._hidden_BJD
            tri_BJ3 = self._tri_BT3[:, 1:]
        else:
            assert self._guess_BJ is not None
            assert self._z_BJD is not None
            first_BJD = self._z_BJD.detach()
            tri_BJ3 = torch.cat([self._last_BJ2, self._guess_BJ[:, :, None]], -1)
            self._last_BJ2 = tri_BJ3[:, :, 1:]
        u_BJD = self._draft.embed(self._parts, tri_BJ3)
        positions_BN = torch.cat([self._place_BJ + depth, self._place_BJ + depth + 1], 1)
        seen_NK = chain_visible(places, depth, u_BJD.device)
        slots_BK = torch.cat([self._slots_BK, positions_BN], 1)
        visible_BNK = seen_NK[None].expand(len(u_BJD), -1, -1)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, slots_BK)
        rows_BND = torch.cat([first_BJD, u_BJD], 1)
        found_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        self._slots_BK = slots_BK
        self._z_BJD = found_BND[:, places:]
        if depth == 0:
            self.first_BJD = self._z_BJD
        self._depth += 1
        return self._z_BJD


def chain_visible(places: int, depth: int, device: torch.device | None = None) -> Tensor:
    """What the rows of a depth see, bool [2J, (depth + 1) 2J]: the slots of the depths before, then their own.

    Slots and rows of depth 0 are H then U, of a depth m >= 1 Z^{m-1} then U'_m. Rows whose output nobody reads (H, Z)
    see as little as may be.

    Args:
        places: J.
        depth: m.
        device: of the result.
    """
    eye_JJ = torch.eye(places, dtype=torch.bool, device=device)
    causal_JJ = torch.ones((places, places), dtype=torch.bool, device=device).tril()
    none_JJ = torch.zeros_like(eye_JJ)
    if depth == 0:
        return torch.cat([torch.cat([causal_JJ, none_JJ], 1), torch.cat([causal_JJ, causal_JJ], 1)], 0)
    before = [none_JJ] * (2 * depth)
    own = [causal_JJ, none_JJ, *[eye_JJ, none_JJ] * (depth - 1)]  # h_0..h_j, and z^0..z^{m-2}
    return torch.cat([torch.cat([*before, eye_JJ, none_JJ], 1), torch.cat([*own, eye_JJ, eye_JJ], 1)], 0)


def edges(ids: Sequence[int], place: int) -> tuple[int, int, int]:
    """The tri-gram at a place of a row; see `trigrams`.

    Args:
        ids: token ids.
        place: from 0.
    """
    if place > 1:
        return ids[place - 2], ids[place - 1], ids[place]
    return (ids[0], ids[1], ids[1]) if place else (ids[0], ids[0], ids[0])
