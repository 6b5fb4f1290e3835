"""Masks over examples and gradients: what is trained on, and how strongly.

What lives here:

- `paser`: chooses the examples that win back what pruning lost.
"""
