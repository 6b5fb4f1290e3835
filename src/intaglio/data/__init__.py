"""Texts, labelled texts and interactions, and token batches made from them; independent of models.

- `assets`: bundled models and texts: table, download, cache.
- `wikitext`: MediaWiki pages to plain English prose (used by `assets`).
- `texts`: `Corpus`, documents with stable hashes, and `load_texts`; disjoint calibration and held-out texts.
- `streaming`: corpora larger than memory.
- `python_source`: source files of the standard library and of installed packages.
- `docstrings`: documented functions from those, as pairs of text and code.
- `identifier_roles`: identifiers in those with their roles.
- `token_classification`: token-classification data.
- `interactions`: tables of users, items and times.
- `item_sequences`: item ids of each user in the order of time, the last two held out.
- `labelled_texts`, `labelled_images`, `labelled_examples`: texts or images with a class each.
- `images`: the images of the digits test bed.
- `segments`: `Segments`, token ids of equal length, cut from a corpus in a seeded order.

Importing this package, `assets` or `texts` does not import torch; `images` and `segments` do.
"""
