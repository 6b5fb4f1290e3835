"""Where text and interactions come from, and how they become token batches; nothing here knows about models.

- `assets`: the bundled models and texts: what they are, how they are fetched, where they lie.
- `wikitext`: MediaWiki pages to plain English prose (used by `assets`).
- `texts`: `Corpus`, a set of documents with stable hashes; `load_texts` reads one from a name, a file, a folder,
  the Hugging Face hub or a list; calibration and held-out texts that never overlap.
- `python_source`: source files of the standard library and of installed packages.
- `docstrings`: documented functions out of those, as pairs of text and code.
- `interactions`: who did what when: tables of users and items.
- `segments`: `Segments`, token ids of equal length ready for a model, cut from a corpus in a seeded order.

Importing this package, `assets` or `texts` does not import torch; `segments` does.
"""
