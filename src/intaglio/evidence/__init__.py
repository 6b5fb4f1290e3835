"""Evidence: each method's published claim as an experiment that anybody can run again.

What lives here, beside one file a method (`dsnot` ...):

- `experiment`: what a claim is, fixed before its first run.
- `statistics`: paired comparisons, intervals, verdicts, numbers of units.
- `run`: `prove`, which runs an experiment and reports what falls.
- `journal`: the units of a run as they finish; a killed run goes on.
- `record`: what is committed and shipped of a run, and whether it is stale.
- `sources`: hashes of the code that a record depends on; `parsed`: files taken apart for it.
- `plot`, `summary`: what a record says, as a picture and in words; `outlook`: what would decide a claim left open.
- `carving`, `continuing`: what the runs of several claims share, of carvings and of drafters.
- `worlds`: models and data that experiments share, split and sealed.
"""
