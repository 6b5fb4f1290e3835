"""RUM-SUNDAE: a non-autoregressive sequence-to-sequence model whose encoder and decoder start from one masked LM.

    a ~ U(0, 1),  x0 = y with each token replaced with probability a,  x_k ~ softmax(dec(x_{k-1}, enc(s))), detached
    L = 1/K sum_{k<K} CE(dec(x_k, enc(s)), y) + c CE(length head, |y|)

The decoder sees both sides; cross-attention starts as a copy of the block's self-attention with a zero output
projection, so the first logits are the masked LM's. Training: Savinov et al., Step-unrolled Denoising Autoencoders for
Text Generation, ICLR 2022.

Dimension letters: B rows, S source tokens, L target tokens, N candidates, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy, block_list
from intaglio.trainer.causal_lm import IGNORED, cross_entropy
from intaglio.trainer.preserve_state import preserve_modes
from intaglio.trainer.rng import generator

ATTENTION, CROSS = "attention", "crossattention"
"""Names of a block's self-attention and cross-attention in the families that have the latter."""


class MlmSeq2Seq(nn.Module):
    """Decoder with cross-attention and a length head, made from a masked language model, which is the encoder.

    Args:
        model: a masked language model of a family with cross-attention (BERT, RoBERTa, XLM-R, ELECTRA).
        max_length: longest target in tokens.
        cross_attention: `copy` of each block's self-attention, or `random`; the output projection is zero in both.
            Default `copy`.
        seed: of random weights. Default 0.

    Raises:
        IntaglioError: another family.
    """

    def __init__(
        self, model: Any, max_length: int, cross_attention: Literal["copy", "random"] = "copy", seed: int = 0
    ) -> None:
        super().__init__()
        parts, kind = anatomy(model), model.config.model_type
        if parts.causal or parts.head is None:
            raise IntaglioError(f"seq2seq starts from a masked language model; {type(model).__name__} is none")
        config = copy.deepcopy(model.config)
        config.is_decoder, config.add_cross_attention, config.use_cache = True, True, False
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            self.decoder = AutoModelForCausalLM.from_config(config).to(next(model.parameters()).dtype)
        except ValueError as error:
            raise IntaglioError(
                f"seq2seq needs a family with cross-attention, such as bert; {kind} has none"
            ) from error
        finally:
            logging.set_verbosity(before)
        if not all(hasattr(block, CROSS) for block in block_list(self.decoder)):
            raise IntaglioError(f"seq2seq needs a family with cross-attention, such as bert; {kind} has none")
        missing = self.decoder.load_state_dict(model.state_dict(), strict=False).missing_keys
        other = [name for name in missing if f".{CROSS}." not in name]
        if other:
            raise IntaglioError(f"seq2seq cannot start from {type(model).__name__}: it has no weights for {other[0]}")
        rng = generator(seed, "cross-attention")
        with torch.no_grad():
            for block in block_list(self.decoder):
                self._start(getattr(block, ATTENTION), getattr(block, CROSS), cross_attention == "copy", rng)
        self.length_head = nn.Linear(model.config.hidden_size, max_length + 1)
        nn.init.zeros_(self.length_head.weight)
        nn.init.zeros_(self.length_head.bias)
        self.mask_id: int | None = None

    @staticmethod
    def _start(own: Any, cross: Any, copied: bool, rng: torch.Generator) -> None:
        for name, parameter in cross.named_parameters():
            if copied:
                parameter.copy_(own.get_parameter(name))
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=rng)
        cross.output.dense.weight.zero_()
        cross.output.dense.bias.zero_()
        # The norm after a residual sum would change the masked LM's activations even where nothing is added.
        cross.output.LayerNorm = nn.Identity()

    @property
    def max_length(self) -> int:
        """Longest target in tokens."""
        return self.length_head.out_features - 1

    def encode(self, model: Any, source_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the encoder's last hidden states [B, S, D]."""
        hidden: Tensor = anatomy(model).base(input_ids=source_BS, attention_mask=mask_BS).last_hidden_state
        return hidden

    def length_logits(self, hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Return logits [B, max_length + 1] of the target's length; no gradient flows into the encoder."""
        weight_BS1 = mask_BS[..., None].to(hidden_BSD.dtype)
        pooled: Tensor = (hidden_BSD.detach() * weight_BS1).sum(1) / weight_BS1.sum(1)
        logits: Tensor = self.length_head(pooled)
        return logits

    def _positions(self, ids_BL: Tensor) -> Tensor:
        """Return position ids [1, L]; RoBERTa counts from its padding index and skips tokens that equal it."""
        table = next(m for name, m in self.decoder.named_modules() if name.endswith("position_embeddings"))
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        return torch.arange(first, first + ids_BL.shape[1], device=ids_BL.device)[None]

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Return logits [B, L, V] for every position of a draft, given the encoded source."""
        seen_B1LL = mask_BL[:, None, None, :].bool().expand(-1, 1, ids_BL.shape[1], -1)
        blocked = torch.finfo(hidden_BSD.dtype).min
        full = torch.zeros(seen_B1LL.shape, dtype=hidden_BSD.dtype, device=ids_BL.device).masked_fill(
            ~seen_B1LL, blocked
        )
        logits: Tensor = self.decoder(
            input_ids=ids_BL,
            attention_mask=full,  # four dimensions, so that the family's causal mask is not made
            position_ids=self._positions(ids_BL),
            encoder_hidden_states=hidden_BSD,
            encoder_attention_mask=mask_BS,
            use_cache=False,
        ).logits
        return logits


def corrupt(
    target_L: Tensor, rate: float, vocabulary: int, mask_id: int | None, rng: torch.Generator, mask_share: float = 0.0
) -> Tensor:
    """Return a copy with each token replaced with probability `rate`, int64 [L].

    Args:
        target_L: token ids.
        rate: in [0, 1]; 0 leaves the target as it is.
        vocabulary: replacements are uniform below it.
        mask_id: mask token, for `mask_share`.
        rng: source of the draws.
        mask_share: probability that a replacement is the mask token. Default 0.
    """
    replaced = torch.rand(len(target_L), generator=rng) < rate
    tokens = torch.randint(vocabulary, target_L.shape, generator=rng)
    if mask_id is not None:
        tokens[torch.rand(len(target_L), generator=rng) < mask_share] = mask_id
    return torch.where(replaced, tokens, target_L)


def sundae_loss(
    network: MlmSeq2Seq, model: Any, batch: dict[str, Tensor], unroll: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the mean denoising loss over `unroll` drafts, and the loss of the length head, in nats.

    Args:
        network: decoder and length head.
        model: the encoder.
        batch: `source`, `source_mask` [B, S]; `draft` (x0), `target` [B, L], -100 at padding.
        unroll: drafts K; the first is x0, each other is sampled from the logits before it without a gradient.
        seed: of the sampled drafts.
    """
    target_BL, mask_BS = batch["target"], batch["source_mask"]
    mask_BL = (target_BL != IGNORED).long()
    hidden_BSD = network.encode(model, batch["source"], mask_BS)
    rng = torch.Generator(target_BL.device).manual_seed(seed)
    draft_BL, losses = batch["draft"], []
    for turn in range(unroll):
        logits_BLV = network(draft_BL, mask_BL, hidden_BSD, mask_BS)
        losses.append(cross_entropy(logits_BLV, target_BL))
        if turn + 1 < unroll:
            draft_BL = sample(logits_BLV.detach(), 1.0, rng)
    lengths_B = mask_BL.sum(1)
    return torch.stack(losses).mean(), F.cross_entropy(network.length_logits(hidden_BSD, mask_BS), lengths_B)


def sample(logits_BLV: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """Draw a token for each position, or take the most likely at temperature 0; int64 [B, L]."""
    if temperature == 0:
        return logits_BLV.argmax(-1)
    probs = (logits_BLV.float() / temperature).softmax(-1)
    return torch.multinomial(probs.flatten(0, 1), 1, generator=rng).view(logits_BLV.shape[:2])


@torch.no_grad()
def sundae_decode(
    network: MlmSeq2Seq,
    model: Any,
    source_S: Tensor,
    *,
    steps: int = 10,
    temperature: float = 0.3,
    update_share: float = 0.5,
    lengths: int = 4,
    samples: int = 1,
    start: Literal["random", "mask"] = "random",
    seed: int = 0,
) -> tuple[list[int], float]:
    """Return the target of a source, and its mean log-probability in the last step.

    Drafts of the most likely lengths are refined together; each step redraws a random share of the positions. A draft
    that the most likely tokens would not change is a fixed point and stays. The result has the highest mean
    log-probability of its tokens plus that of its length.

    Args:
        network: decoder and length head.
        model: the encoder.
        source_S: source token ids, int64 [S].
        steps: most steps. Default 10.
        temperature: of the draws; 0 takes the most likely tokens. Default 0.3.
        update_share: expected share of positions that a step redraws. Default 0.5.
        lengths: number of candidate lengths, the most likely. Default 4.
        samples: drafts of each length. Default 1.
        start: first draft: `random` tokens or the `mask` token. Default `random`.
        seed: of the draws. Default 0.
    """
    with preserve_modes(network), preserve_modes(model):
        network.eval()
        model.eval()
        return _refine(network, model, source_S, steps, temperature, update_share, lengths, samples, start, seed)


def _refine(
    network: MlmSeq2Seq,
    model: Any,
    source_S: Tensor,
    steps: int,
    temperature: float,
    update_share: float,
    lengths: int,
    samples: int,
    start: str,
    seed: int,
) -> tuple[list[int], float]:
    """Return the best of the refined drafts; see `sundae_decode`."""
    device = source_S.device
    rng = torch.Generator(device).manual_seed(seed)
    mask_1S = torch.ones(1, len(source_S), dtype=torch.long, device=device)
    hidden_1SD = network.encode(model, source_S[None], mask_1S)
    lengths_n = network.length_logits(hidden_1SD, mask_1S)[0, 1:].log_softmax(-1)  # an empty target is never drafted
    tried = lengths_n.topk(min(lengths, len(lengths_n))).indices.repeat_interleave(samples) + 1
    mask_NL = (torch.arange(int(tried.max()), device=device) < tried[:, None]).long()
    draft_NL = torch.randint(network.decoder.config.vocab_size, mask_NL.shape, generator=rng, device=device)
    if start == "mask" and network.mask_id is not None:
        draft_NL = torch.full_like(draft_NL, network.mask_id)
    hidden_NSD = hidden_1SD.expand(len(tried), -1, -1)
    mask_NS = mask_1S.expand(len(tried), -1)
    for _ in range(steps):
        logits_NLV = network(draft_NL, mask_NL, hidden_NSD, mask_NS)
        changed_N = ((logits_NLV.argmax(-1) != draft_NL) & mask_NL.bool()).any(1)
        if not changed_N.any():
            break
        redrawn = torch.rand(draft_NL.shape, generator=rng, device=device) < update_share
        new_NL = sample(logits_NLV, temperature, rng)
        draft_NL = torch.where(redrawn & changed_N[:, None], new_NL, draft_NL)
    logits_NLV = network(draft_NL, mask_NL, hidden_NSD, mask_NS)
    log_probs_NL = logits_NLV.float().log_softmax(-1).gather(-1, draft_NL[..., None])[..., 0]
    scores_N = (log_probs_NL * mask_NL).sum(1) / mask_NL.sum(1)
    best = int((scores_N + lengths_n[tried - 1]).argmax())
    return draft_NL[best, : int(tried[best])].tolist(), float(scores_N[best])
