"""Whether a drafter leaves the law of what is drawn alone: three tokens of a vocabulary of eight, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.families import tiny_model


def check_law(make: Callable[[Any], Any], rows: int = 250, draws: int = 4, processor: Any = None) -> None:
    """Draw with the drafter that `make(model)` gives, and compare with the target's own law (chi squared).

    With a logits processor, the target is the model with it.
    """
    from scipy.stats import chi2

    model = tiny_model("llama", layers=2, vocab_size=8, dtype=torch.float64, eos_token_id=None)
    context_NL, law_N = torch.tensor([[3, 4, 5, 3, 4]]), torch.ones(1, dtype=torch.float64)
    ids = context_NL
    for _ in range(3):  # what drafts inside the target's pass has its first draft behind the second token
        with torch.no_grad():
            logits_NV = model(context_NL).logits[:, -1].float()
            if processor is not None and law_N.min() == 0:  # contexts that the target never reaches have no law
                logits_NV[law_N > 0] = processor(context_NL[law_N > 0], logits_NV[law_N > 0])
            elif processor is not None:
                logits_NV = processor(context_NL, logits_NV)
            next_NV = torch.softmax(logits_NV / 1.5, -1)
        law_N = (law_N[:, None] * next_NV).reshape(-1)
        tokens = torch.arange(8).repeat(len(context_NL))[:, None]
        context_NL = torch.cat([context_NL.repeat_interleave(8, 0), tokens], 1)
    expected = law_N.numpy() * rows * draws
    decoder, counts, accepted = make(model), np.zeros(512), 0
    torch.manual_seed(0)
    for _ in range(draws):
        found = model.generate(
            ids.expand(rows, -1), do_sample=True, temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=4,
            custom_generate=decoder, logits_processor=[] if processor is None else [processor],
        )  # fmt: skip
        counts += np.bincount((found[:, 5] * 64 + found[:, 6] * 8 + found[:, 7]).numpy(), minlength=512)
        accepted += decoder.statistics.accepted
    few = expected < 5
    seen, wanted = np.append(counts[~few], counts[few].sum()), np.append(expected[~few], expected[few].sum())
    statistic = float(((seen - wanted) ** 2 / wanted.clip(1e-9)).sum())
    assert chi2.sf(statistic, len(wanted) - 1) > 1e-4
    assert accepted > 0
