"""Test beds: models and data that claims share, each with four disjoint sets that follow from hashes.

A test bed is a frozen dataclass of its sizes. `training(seed)` follows from the seed alone; settings are chosen on the
set `validation`, probes use `pilot`, claims are measured on `evaluation`; another seed base draws other samples.

Fields that all share: `*_run` counts evaluation samples, `*_pilot` those of `validation` and `pilot`; `width`, `depth`,
`context` are sizes of the model, `steps`, `batch` (rows of a step) and `learning_rate` (peak) of its training;
`packages` are those whose source is read, and `folder`, used by tests, replaces them. `toy()` is the same in miniature.
"""
