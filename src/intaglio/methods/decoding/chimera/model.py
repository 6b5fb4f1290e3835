"""Chimera's modules and their loss: a tri-gram encoder, one decoder layer over all tokens, heads.

    g_i = [e_{i-2}; e_{i-1}; e_i]                       input embeddings; g_0 = [e0;e0;e0], g_1 = [e0;e1;e1]
    u_i = P (g_i + SiLU(W g_i + b))                     W and b start at 0
    z_{j+1} = F( u_{j+1} | h_0..h_j, u_1..u_{j+1} )     an estimate of h_{j+1}, which the model has not computed yet
    logits_m(j) = C_m [h_j; z^m_j]                      of token j + 2 + m; C_m starts as [W_lm, W_lm]

For m >= 1 the token that head m - 1 guessed forms a tri-gram u'_m with the two tokens before it on its branch, at
position j + 1 + m; F sees h_0..h_j, the branch's own z^0..z^{m-1} instead of the missing hidden states, and u'_m.

Dimension letters: B rows, T tokens, J positions with a next token, N rows of F, K slots of F, D width, V vocabulary.
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
from intaglio.modeling.anatomy import CACHE, Anatomy, anatomy
from intaglio.modeling.partial_pass import HeadOnly, capture, final_hidden, run_block
from intaglio.speculative.heads.chunked_loss import chunked, kl, zero_loss
from intaglio.speculative.heads.lm_head import DraftLMHead, DraftVocabulary, TargetHead, resolve_rank
from intaglio.speculative.heads.multi_token_loss import name_losses, topk_hits
from intaglio.speculative.target_model import format_mask
from intaglio.trainer.causal_lm import IGNORED
from intaglio.trainer.protocols import Batch, Loss


class TriGram(nn.Module):
    """The tri-gram encoder, a function of three token ids.

    Args:
        width: D.
        generator: source of P.
        tokens: 3; 1 leaves the two tokens before out (an ablation: u_i = P (e_i + SiLU(W e_i + b))).
    """

    def __init__(self, width: int, generator: torch.Generator, tokens: int = 3) -> None:
        super().__init__()
        inputs = tokens * width
        self.tokens = tokens
        # Without the usual initialisation, which would draw from the global generator.
        self.mix = nn.utils.skip_init(nn.Linear, inputs, inputs)
        self.down = nn.utils.skip_init(nn.Linear, inputs, width, bias=False)
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.bias.zero_()
            self.down.weight.copy_(torch.randn(width, inputs, generator=generator) / inputs**0.5)

    def forward(self, embedded_N3D: Tensor) -> Tensor:
        """Return u [..., D] from embeddings of the two tokens before and of the token itself [..., 3, D]."""
        g = embedded_N3D[..., -self.tokens :, :].flatten(-2)
        u: Tensor = self.down(g + F.silu(self.mix(g)))
        return u


def trigrams(ids_BT: Tensor) -> Tensor:
    """Return the three token ids at each position [B, T, 3], with the edges (0, 0, 0) and (0, 1, 1)."""
    padded = torch.cat([ids_BT[:, :1], ids_BT[:, :1], ids_BT], 1)
    ids_BT3 = padded.unfold(1, 3, 1).clone()
    if ids_BT.shape[1] > 1:
        ids_BT3[:, 1, 1] = ids_BT[:, 1]
    return ids_BT3


def trigram_at(ids: Sequence[int], position: int) -> tuple[int, int, int]:
    """Return the tri-gram at a position of a row; see `trigrams`."""
    if position > 1:
        return ids[position - 2], ids[position - 1], ids[position]
    return (ids[0], ids[1], ids[1]) if position else (ids[0], ids[0], ids[0])


def source_block(parts: Anatomy) -> int:
    """Return the block whose architecture F has: the first without a window, or else the first."""
    return next((index for index, window in enumerate(parts.windows) if window is None), 0)


def fresh_block(parts: Anatomy, index: int, generator: torch.Generator) -> nn.Module:
    """Return a new block like block `index` of the target.

    Matrices are drawn from N(0, the model's own initializer range); norms start neutral, biases at 0.

    Raises:
        IntaglioError: the family builds its blocks in another way.
    """
    kind = type(parts.blocks[index])
    try:
        with torch.random.fork_rng(devices=[]):
            block: nn.Module = kind(parts.config, layer_idx=index)
    except TypeError as error:
        raise IntaglioError(
            f"a {kind.__name__} cannot be built from a configuration alone ({error}); use start_from: copy"
        ) from None
    spread = float(getattr(parts.config, "initializer_range", 0.02))
    outside_norms = {id(p) for module in block.modules() if "norm" not in type(module).__name__.lower()
                     for p in module.parameters(recurse=False)}  # fmt: skip
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif id(parameter) in outside_norms:
                parameter.zero_()
    return block


class ChimeraModel(nn.Module):
    """All trained modules.

    Args:
        model: the target.
        heads: M.
        rank: of the shared change of the output matrix; see `intaglio.speculative.heads.lm_head`.
        start: `fresh` weights for F, or a `copy` of the target's block.
        encoders: `all`; or without one of the two encoders, for ablations: `no_trigram` (u_i from e_i alone) or
            `no_context` (u directly to the heads).
        sharing: whether head 0 serves all depths.
        feature: weight of MSE(h_{j+1}, z^0_{j+1}).
        distil: weight of KL(the model at j + 1 + m || head m).
        tokens_K: tokens that may be guessed; see `DraftVocabulary`. Default: all.
        seed: of the initial weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: int = 4,
        rank: int | None = None,
        start: Literal["fresh", "copy"] = "fresh",
        encoders: Literal["all", "no_trigram", "no_context"] = "all",
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
        self.words = DraftVocabulary(weight_VD, tokens_K)
        weight_VD = self.words.matrix(weight_VD)
        vocabulary, width = weight_VD.shape
        self.heads, self.sharing, self.feature, self.distil = heads, sharing, feature, distil
        self.ranks = 1  # candidates of each head that `loss` counts
        self.source = source_block(parts)
        self.window = parts.windows[self.source]
        self.trigram = TriGram(width, generator, 1 if encoders == "no_trigram" else 3)
        self.layer: nn.Module | None = None
        if encoders != "no_context":
            fresh = start == "fresh"
            self.layer = (
                fresh_block(parts, self.source, generator) if fresh else copy.deepcopy(parts.blocks[self.source])
            )
            for module in self.layer.modules():
                if hasattr(module, "layer_idx"):
                    vars(module)["layer_idx"] = 0  # its cache has one layer
        own = 1 if sharing else heads
        self.vocabulary = DraftLMHead(weight_VD, own, 2, resolve_rank(rank, own, vocabulary, 2 * width), generator)
        self.to(torch.float32)
        self.requires_grad_(True)  # a copied block may come from a frozen model

    def embed(self, parts: Anatomy, ids_N3: Tensor) -> Tensor:
        """Return u of tri-grams [..., D] from three token ids each."""
        with torch.no_grad():
            embedded = parts.embedding(ids_N3)
        u: Tensor = self.trigram(embedded.to(self.trigram.down.weight.dtype))
        return u

    def encode(
        self, parts: Anatomy, rows_BND: Tensor, positions_BN: Tensor, visible_BNK: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run F over rows after a cache that it fills; return the rows unchanged if there is no F.

        Args:
            parts: of the target.
            rows_BND: inputs of F.
            positions_BN: position ids.
            visible_BNK: what each row sees, window included: the slots of the cache, then the rows.
            cache: of one layer.
        """
        if self.layer is None:
            return rows_BND
        context = getattr(parts.config, "max_position_embeddings", None)
        if context is not None:
            positions_BN = positions_BN.clamp(max=int(context) - 1)
        batch = {
            "input_ids": torch.zeros_like(positions_BN),
            "position_ids": positions_BN,
            "attention_mask": _model_mask(parts, visible_BNK[:, None]),
            CACHE: cache,
            "use_cache": True,
        }
        return run_block(self.layer, self.source, rows_BND, capture(parts, batch))

    def in_window(self, visible_BNK: Tensor, positions_BN: Tensor, positions_BK: Tensor) -> Tensor:
        """Restrict visibility to F's window, if it has one, by the positions of rows and slots."""
        if self.window is None:
            return visible_BNK
        return visible_BNK & (positions_BN[:, :, None] - positions_BK[:, None] < self.window)

    def score(self, hidden_RD: Tensor, z_RD: Tensor, depth: int, target: TargetHead) -> Tensor:
        """Return logits [R, W] of the tokens that may be guessed.

        Args:
            hidden_RD: the last true hidden state h_j.
            z_RD: the estimate at this depth.
            depth: m; beyond the last head the last head serves.
            target: the model's own output head.
        """
        head = 0 if self.sharing else min(depth, self.heads - 1)
        both_RX = torch.cat([hidden_RD, z_RD.to(hidden_RD.dtype)], -1)
        return self.vocabulary(both_RX, head, target)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute sum_m CE(logits_m(j), x_{j+2+m}) for j >= 1, plus the `feature` and `distil` terms.

        Where the text has a token that may not be guessed, the guess is wrong and nothing is learnt.
        """
        parts = anatomy(model)
        target, head = TargetHead(parts, self.words), HeadOnly(parts, frozen=False)
        dtype = self.trigram.down.weight.dtype
        hidden_BTD = final_hidden(parts, {"input_ids": batch["input_ids"]}).to(dtype)
        if hidden_BTD.shape[1] < 3:
            return Loss(zero_loss(list(self.parameters())))
        branches = BranchEncoder(self, parts, hidden_BTD, batch["input_ids"])
        losses, sums, counts = [], [], []
        guess_BJ: Tensor | None = None
        for depth in range(self.heads):
            z_BJD = branches.step(guess_BJ)
            loss, own_sums, count, guess_BJ = self._depth_loss(batch, hidden_BTD, z_BJD, depth, target, head)
            losses.append(loss)
            sums.append(own_sums)
            counts.append(count)
        total = torch.stack(losses).sum()
        named, outputs = name_losses(torch.stack(sums, 1), torch.stack(counts))
        if self.feature:
            scored_BJ = batch["scored"][:, 1:]
            distance = F.mse_loss(branches.first_BJD[scored_BJ], hidden_BTD[:, 1:][scored_BJ])
            total, named = total + self.feature * distance, {**named, "feature": distance}
        return Loss(total, named, outputs)

    def _depth_loss(
        self, batch: Batch, hidden_BTD: Tensor, z_BJD: Tensor, depth: int, target: TargetHead, head: HeadOnly
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the mean loss of one head, its sums, the number of its targets, and its greedy guesses [B, J]."""
        rows, length = z_BJD.shape[:2]
        shift = depth + 1  # the model itself predicts the same token `shift` positions later
        target_BJ = _later(batch["target"], shift, length, IGNORED)
        target_BJ[:, 0] = IGNORED
        teacher_BJD = _later(hidden_BTD, shift, length, 0.0) if self.distil else hidden_BTD[:, :length]
        taught_BJ = _later(batch["scored"], shift, length, False) & bool(self.distil)
        taught_BJ[:, 0] = False
        count = (target_BJ != IGNORED).sum().clamp(min=1)
        taught = taught_BJ.sum().clamp(min=1)

        def chunk_loss(
            hidden_RD: Tensor, z_RD: Tensor, target_R: Tensor, teacher_RD: Tensor, taught_R: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            logits_RV = self.score(hidden_RD, z_RD, depth, target)
            target_R = self.words.indices(target_R)
            losses_R = F.cross_entropy(logits_RV.float(), target_R, ignore_index=IGNORED, reduction="none")
            loss = losses_R.sum() / count
            if self.distil:
                with torch.no_grad():
                    teacher_RV = self.words.narrow(head.logits(teacher_RD.to(target.weight_KD.dtype)[:, None])[:, 0])
                distance_R = torch.where(taught_R, kl(teacher_RV, logits_RV), 0.0)
                loss = loss + self.distil * distance_R.sum() / taught
            right_Rr = topk_hits(logits_RV, target_R, self.ranks)
            sums = torch.cat([losses_R.detach().sum()[None], right_Rr.float().sum(0)])
            return loss, sums, self.words.tokens(logits_RV.detach().argmax(-1))

        tensors = [hidden_BTD[:, :length], z_BJD, target_BJ, teacher_BJD, taught_BJ]
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        loss, sums, guesses = chunked(chunk_loss, flat, list(self.vocabulary.parameters()))
        assert guesses is not None
        return loss, sums, count, guesses.view(rows, length)


def _later(values: Tensor, shift: int, length: int, fill: Any) -> Tensor:
    """Return the values `shift` positions later, for the first `length` positions [B, length, ...], then `fill`."""
    later = values.new_full((values.shape[0], length, *values.shape[2:]), fill)
    kept = values[:, shift : shift + length]
    later[:, : kept.shape[1]] = kept
    return later


def _model_mask(parts: Anatomy, seen_B1NK: Tensor) -> Any:
    """Return a mask in the model's format, whatever the layer type of F."""
    config: Any = parts.config
    mask = format_mask(seen_B1NK, config._attn_implementation, next(parts.base.parameters()).dtype)
    names = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(names, mask) if len(names) > 1 else mask


class BranchEncoder:
    """F over whole rows in training, depth by depth, each position with a branch of its own.

    Args:
        draft: the modules.
        parts: of the target.
        hidden_BTD: last hidden states.
        ids_BT: token ids.
    """

    def __init__(self, draft: ChimeraModel, parts: Anatomy, hidden_BTD: Tensor, ids_BT: Tensor) -> None:
        self._draft, self._parts = draft, parts
        self._cache = DynamicCache()
        rows, length = ids_BT.shape
        self._length = length - 1
        device = ids_BT.device
        self._position_BJ = torch.arange(self._length, device=device)[None].expand(rows, -1)
        self._trigrams_BJ3 = trigrams(ids_BT)[:, 1:]
        self._last_BJ2 = torch.stack([ids_BT[:, :-1], ids_BT[:, 1:]], -1)
        self._hidden_BJD = hidden_BTD[:, :-1]
        self._slots_BK = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self._depth = 0
        self._z_BJD: Tensor | None = None
        self.first_BJD = hidden_BTD[:, :0]

    def step(self, guess_BJ: Tensor | None = None) -> Tensor:
        """Return the estimates of the next depth [B, J, D], after the previous depth's guesses (None at depth 0)."""
        depth, length = self._depth, self._length
        if guess_BJ is None:
            first_BJD, trigrams_BJ3 = self._hidden_BJD, self._trigrams_BJ3
        else:
            assert self._z_BJD is not None
            first_BJD = self._z_BJD.detach()
            trigrams_BJ3 = torch.cat([self._last_BJ2, guess_BJ[:, :, None]], -1)
            self._last_BJ2 = trigrams_BJ3[:, :, 1:]
        u_BJD = self._draft.embed(self._parts, trigrams_BJ3)
        positions_BN = torch.cat([self._position_BJ + depth, self._position_BJ + depth + 1], 1)
        self._slots_BK = torch.cat([self._slots_BK, positions_BN], 1)
        visible_BNK = branch_visible(length, depth, u_BJD.device)[None].expand(len(u_BJD), -1, -1)
        visible_BNK = self._draft.in_window(visible_BNK, positions_BN, self._slots_BK)
        rows_BND = torch.cat([first_BJD, u_BJD], 1)
        encoded_BND = self._draft.encode(self._parts, rows_BND, positions_BN, visible_BNK, self._cache)
        self._z_BJD = encoded_BND[:, length:]
        if depth == 0:
            self.first_BJD = self._z_BJD
        self._depth += 1
        return self._z_BJD


def branch_visible(length: int, depth: int, device: torch.device | None = None) -> Tensor:
    """Return what the rows of a depth see, bool [2J, (depth + 1) 2J]: the slots of the depths before, then their own.

    Slots and rows of depth 0 are H then U, of a depth m >= 1 Z^{m-1} then U'_m. Rows with unused output (H, Z) see as
    little as possible. `length` is J.
    """
    eye_JJ = torch.eye(length, dtype=torch.bool, device=device)
    causal_JJ = torch.ones((length, length), dtype=torch.bool, device=device).tril()
    none_JJ = torch.zeros_like(eye_JJ)
    if depth == 0:
        return torch.cat([torch.cat([causal_JJ, none_JJ], 1), torch.cat([causal_JJ, causal_JJ], 1)], 0)
    before = [none_JJ] * (2 * depth)
    own = [causal_JJ, none_JJ, *[eye_JJ, none_JJ] * (depth - 1)]  # h_0..h_j, and z^0..z^{m-2}
    return torch.cat([torch.cat([*before, eye_JJ, none_JJ], 1), torch.cat([*own, eye_JJ, eye_JJ], 1)], 0)
