"""Generator of the site's pages from the catalogue, the method classes, and the committed claims and records.

- `cards`: the page of each method, and the catalogue.
- `evidence`: a claim and its record as text and table rows.
- `facts`: the example recipe and the constructor call of a method.
- `notes`: the hand-written part of a method's page.
- `pages`: pages from the README, other repository files and docstrings.
- `style`: the colours of the site.
- `text`: links, inline code, templates.

Nothing here depends on MkDocs, which gets the pages from `docs/hooks.py`.
"""
