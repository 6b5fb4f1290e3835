"""Features of a dictionary on texts: firing rates, top contexts, and the tokens that they promote.

Dimension letters: B batch, L sequence, D width, M latents, C contexts, W window, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint
from intaglio.data.segments import Segments
from intaglio.dictionaries.activations import check_finite, token_segments
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress, no_progress
from intaglio.modeling.anatomy import Anatomy, anatomy
from intaglio.modeling.sites import read_sites
from intaglio.report.features import LEVELS

BEFORE, AFTER = 14, 5
"""Tokens of a context before and after the one with the highest code."""
ROWS = 256
"""Latents whose product with the vocabulary is computed at a time."""


class TopContexts:
    """The segments in which each latent's code is highest, with the window around the highest one.

    Args:
        width: latents M.
        contexts: kept of each latent C.
    """

    def __init__(self, width: int, contexts: int) -> None:
        window = BEFORE + 1 + AFTER
        self.contexts = contexts
        self.peaks_MC = torch.zeros(width, contexts)
        self.ids_MCW = torch.full((width, contexts, window), -1)
        self.codes_MCW = torch.zeros(width, contexts, window)
        self.count_M = torch.zeros(width, dtype=torch.int64)
        self.sum_M = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def update(self, ids_BL: Tensor, codes_BLM: Tensor, valid_BL: Tensor) -> None:
        """Add a batch; codes of tokens that are not valid count as 0."""
        codes_BLM = (codes_BLM * valid_BL[..., None]).float().cpu()
        self.tokens += int(valid_BL.sum())
        self.count_M += (codes_BLM > 0).sum((0, 1))
        self.sum_M += codes_BLM.double().sum((0, 1))
        peaks_BM, at_BM = codes_BLM.max(1)
        offsets_W = torch.arange(-BEFORE, AFTER + 1)
        places_BMW = at_BM[..., None] + offsets_W
        inside_BMW = (places_BMW >= 0) & (places_BMW < ids_BL.shape[1])
        places_BMW = places_BMW.clamp(0, ids_BL.shape[1] - 1)
        width = codes_BLM.shape[2]
        rows_B11 = torch.arange(len(ids_BL))[:, None, None]
        ids_BMW = ids_BL.cpu()[rows_B11, places_BMW].masked_fill(~inside_BMW, -1)
        codes_BMW = codes_BLM[rows_B11, places_BMW, torch.arange(width)[None, :, None]] * inside_BMW
        peaks_MX = torch.cat([self.peaks_MC, peaks_BM.T], 1)
        self.peaks_MC, best_MC = peaks_MX.topk(self.contexts, dim=1)
        best_MCW = best_MC[..., None].expand(-1, -1, len(offsets_W))
        self.ids_MCW = torch.cat([self.ids_MCW, ids_BMW.transpose(0, 1)], 1).gather(1, best_MCW)
        self.codes_MCW = torch.cat([self.codes_MCW, codes_BMW.transpose(0, 1)], 1).gather(1, best_MCW)


def promoted_tokens(parts: Anatomy, directions_MD: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the tokens whose logits each direction raises and lowers most, int64 [M, count] each.

    A direction goes through the gain of the final norm and the unembedding (of an encoder: the token embedding). None
    where the directions are not of the model's width.
    """
    if directions_MD.shape[1] != int(parts.config.hidden_size):
        return None
    owner: Any = parts.head or parts.embedding
    weight_VD: Tensor = owner.weight.detach().float()
    if weight_VD.shape[1] != directions_MD.shape[1]:
        return None
    gain_D = _gain(parts, directions_MD) if parts.head is not None else torch.ones_like(directions_MD[0])
    raised, lowered = [], []
    for part_MD in directions_MD.split(ROWS):
        logits_MV = (part_MD * gain_D) @ weight_VD.T
        raised.append(logits_MV.topk(count, dim=1).indices)
        lowered.append((-logits_MV).topk(count, dim=1).indices)
    return torch.cat(raised), torch.cat(lowered)


def _gain(parts: Anatomy, like_MD: Tensor) -> Tensor:
    """Return the factor of each feature in the final norm, whether the module stores it as such or around 1."""
    norm = parts.final_norm
    if norm is None:
        return torch.ones_like(like_MD[0])
    probe_D = torch.ones_like(like_MD[0])
    probe_D[1::2] = -1  # mean 0 and variance 1
    dtype = next(norm.parameters()).dtype
    upper_D, lower_D = (norm((sign * probe_D).to(dtype)[None, None])[0, 0].float() for sign in (1, -1))
    gain_D: Tensor = (upper_D - lower_D) / (2 * probe_D)
    return gain_D


@torch.no_grad()
def describe_features(
    checkpoint: Checkpoint,
    name: str,
    dictionary: SparseDictionary,
    texts: Any,
    *,
    tokens: int = 65_536,
    length: int = 128,
    skip: int = 1,
    contexts: int = 6,
    nearest: int = 8,
    most: int = 4096,
    seed: int = 0,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the features of a dictionary on texts as plain data for `report.features_page`.

    Args:
        checkpoint: gives the activations; it has a tokenizer.
        name: of the dictionary.
        dictionary: trained on one of its sites.
        texts: a name for `load_texts`, texts, a corpus, or token ids [N, L].
        tokens: read in total. Default 65,536.
        length: tokens of a segment. Default 128.
        skip: first tokens of a segment that are left out. Default 1.
        contexts: shown of each feature, one a segment. Default 6.
        nearest: tokens that a feature raises, and lowers. Default 8.
        most: features shown, those that fire most often. Default 4,096.
        seed: of the order of the documents. Default 0.
        batch_size: segments of a pass. Default 4.
        progress: called after each pass.

    Returns:
        `{model, dictionary, site, texts, tokens, width, alive, l0, vocabulary, features}`. A feature has `id`, `rate`,
        `highest`, `mean` (over the tokens for which it fires), `contexts` (`[token indices, codes]`, the codes in
        `LEVELS` parts of the highest), `raised` and `lowered` (token indices); these point into `vocabulary`.

    Raises:
        IntaglioError: there is no tokenizer or no text, the dictionary's site is unknown, or activations are not
            finite; names the batch.
    """
    if checkpoint.tokenizer is None:
        raise IntaglioError(f"{checkpoint.source or 'the checkpoint'} has no tokenizer, so its tokens cannot be shown")
    if dictionary.site is None:
        raise IntaglioError(f"{name} does not name the activation that it was trained on")
    parts, site = anatomy(checkpoint.model), dictionary.site
    data: Segments = token_segments(checkpoint, texts, tokens, length, skip, seed)
    top, batches = TopContexts(dictionary.width, contexts), math.ceil(data.n / batch_size)
    for number, batch in enumerate(data.batches(batch_size)):
        x_BLD = read_sites(parts, (site,), batch)[site]
        check_finite(x_BLD, site, f"batch {number}")
        codes_BLM = dictionary.encode(x_BLD)
        valid_BL = torch.ones(codes_BLM.shape[:2], dtype=torch.bool, device=codes_BLM.device)
        if "attention_mask" in batch:
            valid_BL &= batch["attention_mask"].to(valid_BL.device).bool()
        valid_BL[:, :skip] = False
        top.update(batch["input_ids"], codes_BLM, valid_BL)
        progress(number + 1, batches, "reading features")
    promoted = promoted_tokens(parts, dictionary.decoder_MD, nearest)
    words = _Words(checkpoint.tokenizer)
    shown = [int(m) for m in top.count_M.argsort(descending=True, stable=True)[:most] if top.count_M[m]]
    return {
        "model": checkpoint.source,
        "dictionary": name,
        "site": site.name,
        "texts": texts if isinstance(texts, str) else "given texts",
        "tokens": top.tokens,
        "width": dictionary.width,
        "alive": int((top.count_M > 0).sum()),
        "l0": float(top.count_M.sum()) / max(top.tokens, 1),
        "features": [_feature(top, m, promoted, words) for m in shown],
        "vocabulary": words.texts,
    }


def _feature(top: TopContexts, m: int, promoted: tuple[Tensor, Tensor] | None, words: _Words) -> dict[str, Any]:
    highest = float(top.peaks_MC[m, 0])
    shown = []
    for peak, ids_W, codes_W in zip(top.peaks_MC[m].tolist(), top.ids_MCW[m], top.codes_MCW[m], strict=True):
        inside_W = ids_W >= 0
        if peak > 0:
            levels_W = (codes_W[inside_W] / highest * LEVELS).ceil().long()
            shown.append([[words.index(int(i)) for i in ids_W[inside_W]], levels_W.tolist()])
    fired = int(top.count_M[m])
    raised, lowered = promoted if promoted is not None else (None, None)
    return {
        "id": m,
        "rate": fired / max(top.tokens, 1),
        "highest": highest,
        "mean": float(top.sum_M[m]) / max(fired, 1),
        "contexts": shown,
        "raised": [] if raised is None else [words.index(int(i)) for i in raised[m]],
        "lowered": [] if lowered is None else [words.index(int(i)) for i in lowered[m]],
    }


class _Words:
    """Texts of tokens, each stored once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._places: dict[int, int] = {}
        self.texts: list[str] = []

    def index(self, token: int) -> int:
        """Return the place of a token's text in `texts`."""
        if token not in self._places:
            self._places[token] = len(self.texts)
            self.texts.append(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self._places[token]
