"""Test beds: models and data that claims share, each with four disjoint sets that follow from hashes.

A test bed is a frozen dataclass of its sizes. `training(seed)` follows from the seed alone; settings are chosen on the
set `validation`, probes use `pilot`, claims are measured on `evaluation`; another seed base draws other samples.
"""
