"""The one lossless verify loop, through which every speculative decoder runs.

    from intaglio.speculative import Speculative
    from intaglio.speculative.drafters import PromptLookup

    decoder = Speculative(PromptLookup())
    model.generate(**inputs, custom_generate=decoder, max_new_tokens=128)
    print(decoder.statistics.tokens_per_pass)

- `loop.py`: `Speculative`, the `custom_generate` callable; `decoder.py`: the same as a part of a method
- `protocols.py`: what a drafter is: `Drafter`, `Session`, `PassingSession`, and what it is told: `Run`, `Step`, `Pass`
- `tree.py`: `TokenTree`, the guesses that one pass verifies
- `walk.py`: which nodes are accepted; `sampling.py`: the rule for drawn ones, and why it keeps the target's law
- `reader.py`: a model with its cache: positions, masks by layer type, ragged rows; `cache.py`: keeping its rows;
  `attention.py`: grouped heads under a mask; `prepack.py`: linears with their weights laid out for few tokens
- `request.py`: what `generate` asks for and what is refused; `rows.py`: a row as it grows, and what ends it
- `output.py`: what is returned, and the streamer; `statistics.py`: what a run cost
- `drafters/`: the plain drafters
"""

from __future__ import annotations

from intaglio.speculative.loop import Speculative
from intaglio.speculative.outputs import SpeculativeOutput
from intaglio.speculative.protocols import Drafter, Pass, PassingSession, RowSession, Run, Session, Step, by_row
from intaglio.speculative.statistics import Statistics
from intaglio.speculative.tree import TokenTree, chain, root_only, trie

__all__ = [
    "Drafter",
    "Pass",
    "PassingSession",
    "RowSession",
    "Run",
    "Session",
    "Speculative",
    "SpeculativeOutput",
    "Statistics",
    "Step",
    "TokenTree",
    "by_row",
    "chain",
    "root_only",
    "trie",
]
