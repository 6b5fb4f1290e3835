"""Plain drafters: the baselines of every method that drafts, which some methods build on.

- `prompt_lookup.py`: `PromptLookup`, continuations of earlier occurrences of the last tokens
- `ngrams.py`: `NGramStore`, n-grams counted in a corpus, saved as safetensors
- `ngram_counts.py`: bounded n-gram counting
- `draft_model.py`: `DraftModel`, a smaller model with its own cache, a chain or a static tree
- `rank_statistics.py`: acceptance statistics by rank, for the best static tree
- `dynamic_tree.py`: dynamically grown trees and the drafts behind them
- `undrafted.py`: `Undrafted`, no drafts
- `medusa.py`: `Medusa`, heads on the last hidden state, the baseline of trained heads; not imported here, as it needs
  the training code
"""

from __future__ import annotations

from intaglio.speculative.drafters.draft_model import DraftModel
from intaglio.speculative.drafters.ngrams import NGramStore
from intaglio.speculative.drafters.prompt_lookup import PromptLookup
from intaglio.speculative.drafters.undrafted import Undrafted

__all__ = ["DraftModel", "NGramStore", "PromptLookup", "Undrafted"]
