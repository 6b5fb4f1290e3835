"""Evidence: each method's published claim as a registered comparison that anyone can rerun.

- `claims`: one file a method; `records`: their results; `journals`: unfinished runs.
- `engine`: from a claim to a record; `designs`: runners that claims share; `testbeds`: models and data, split by hash.
- `baselines`: what a method is compared with, where the library has no other use for it.
"""
