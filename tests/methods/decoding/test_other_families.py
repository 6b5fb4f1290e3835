"""Draft heads on families beyond the conformance suite: stock output, or a refusal in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.chimera import Chimera
from intaglio.methods.decoding.chimera.model import ChimeraModel
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.methods.decoding.hidden_transfer.heads import TransferHeads
from intaglio.speculative.heads.objective import head_batch
from tests.causal_lms import tiny_lm

SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
# Kind, more of its configuration, and the refusal if it has one.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("falcon", {}, ""),
    "falcon_grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ""),
    "falcon_alibi": ("falcon", {"alibi": True}, "'?falcon'? .*(is not supported|cannot read a tree)"),
    "gpt_neo": ("gpt_neo", {}, "hides cache slots by its own buffer|use start_from: copy"),
    "opt": ("opt", {}, ""),
    "gemma3n": ("gemma3n_text", SHARED, "'gemma3n_text' is not supported"),
}


@pytest.mark.parametrize("slug", ["chimera", "hidden_transfer"])
@pytest.mark.parametrize("case", CASES)
def test_draft_heads_keep_stock_output_or_are_refused(case: str, slug: str) -> None:
    kind, more, sentence = CASES[case]
    model = tiny_lm(kind, **more).double()
    ids = torch.randint(8, 150, (2, 12), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        decoder: Any
        heads: Any
        if slug == "chimera":
            heads, decoder = ChimeraModel(model, heads=2), Chimera(untrained=True, heads=2)
        else:
            heads, decoder = TransferHeads(model, [0, 1]), HiddenTransfer(untrained=True, ahead=2, layers=[0, 1])
        heads = heads.double()
        heads.loss(model, head_batch([{"input_ids": row} for row in ids])).total.backward()
        decoder._heads, decoder._about = heads, {"model": fingerprint(model)}
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, **options, custom_generate=decoder), expected)

    if not sentence:
        run()
        return
    with pytest.raises(IntaglioError, match=sentence):
        run()
