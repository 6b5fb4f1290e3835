"""Speculative decoding: one loop, through which every drafter runs.

    from intaglio.speculative import Speculative
    from intaglio.speculative.drafters import PromptLookup

    decoder = Speculative(PromptLookup())
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=128)
    print(decoder.statistics.tokens_per_pass)

- `loop.py`: `Speculative`, the `custom_generate` callable; `decoder_mixin.py`: the base of speculative methods
- `protocols.py`: the protocols of a drafter (`Drafter`, `Session`, `ForwardSession`, `AcceptingSession`) and their data
- `tree.py`: `TokenTree`, the guesses that one pass verifies; `static_tree.py`: trees fixed beforehand
- `acceptance.py`: acceptance; `sampling.py`: the rule for drawn nodes, and why it keeps the target's distribution
- `target_model.py`: a model with its cache: positions, masks by layer type, ragged rows; `cache.py`: row operations;
  `tree_attention.py`: grouped heads under a mask; `prepacked_linear.py`: linear weights laid out for few tokens
- `request.py`: the checked arguments of `generate`; `sequences.py`: the state of a sequence
- `outputs.py`: the returned object and the streamer; `statistics.py`: the cost of a run
- `beam_groups.py`: stock beam search over groups that choose in order
- `drafters/`: the plain drafters; `factory.py`: drafters by name
"""

from __future__ import annotations

from intaglio.speculative.loop import Speculative
from intaglio.speculative.outputs import SpeculativeOutput
from intaglio.speculative.protocols import (
    AcceptingSession,
    DecodingRun,
    Drafter,
    ForwardSession,
    RowSession,
    Session,
    Step,
    TreePass,
    by_row,
)
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.tree import TokenTree, chain, root_only, trie

__all__ = [
    "AcceptingSession",
    "DecodingRun",
    "Drafter",
    "ForwardSession",
    "RowSession",
    "Session",
    "Speculative",
    "SpeculativeOutput",
    "Statistics",
    "Step",
    "TokenTree",
    "TreePass",
    "by_row",
    "chain",
    "root_only",
    "trie",
]
