"""The plain drafters: what every method that drafts is measured against, and may build on.

They live here and not in the room `decoding` because a room's files are the methods of the catalogue, and because
drafters of several rooms, the benchmarks and the evidence share them.

- `lookup.py`: `PromptLookup`, what followed the last tokens when they stood in the context before
- `ngrams.py`: `NGramStore`, n-grams counted in a corpus, saved as safetensors
- `counting.py`: how n-grams are counted, also for other tables
- `draft_model.py`: `DraftModel`, a smaller model with its own cache, a chain or a fixed tree, with draft probabilities
- `shapes.py`: fixed trees: chains, widths, and the best shape for given chances of acceptance
- `ranks.py`: those chances, from other texts
- `growing.py`: what drafters with a draft have in common: trees that grow, the draft's cache, its laws
- `medusa.py`: `Medusa`, heads on the last hidden state, the baseline of trained heads; imported from there, as it comes
  with what trains them
"""

from __future__ import annotations

from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.prompt_lookup import PromptLookup

__all__ = ["DraftModel", "NGramStore", "PromptLookup"]
