"""The evidence engine: from a registered claim to a record with a verdict.

- `claim`: the protocol between a claim and the design that runs it.
- `statistics`: intervals, verdicts, probe and futility rules.
- `run`: tune, probe, looks, ablations; `journal`: finished runs on disk; `registration`: checks against git.
- `record`: columnar records; `tables`, `plot`: records in the terminal and as a picture.
- `pending`, `spot`, `golden`: unproved claims, reruns of one unit, numbers of the toy configuration.
"""
