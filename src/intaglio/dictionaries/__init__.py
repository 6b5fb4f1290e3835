"""Sparse dictionaries of a model's activations.

- `dictionary`: the `Dictionary` protocol, a trained dictionary, and sae_lens's files.
- `sparse_autoencoder`: the base of methods that train one, as a `fit` step or on activations in memory.
- `baselines`: L1, TopK, BatchTopK, JumpReLU and Gated autoencoders.
- `training`, `active_entries`: a training step, and its products with sparse codes.
- `activations`, `fitting`: streamed activations; several dictionaries in one pass, resumed and measured.
- `features`: what features fire on, for `intaglio inspect --features`.
- `steering`, `sources`: the step `steer`, and finding the dictionary that it names.
"""

from __future__ import annotations

from intaglio.dictionaries.dictionary import Dictionary, SparseDictionary
from intaglio.dictionaries.fitting import Job, fit_dictionaries
from intaglio.dictionaries.sparse_autoencoder import SparseAutoencoder

__all__ = ["Dictionary", "Job", "SparseAutoencoder", "SparseDictionary", "fit_dictionaries"]
