"""Recipes: read, validated, planned, run and resumed; a killed run resumes to the same bytes.

- `schema`: `Recipe`, its steps and its JSON Schema; `yaml`: YAML with line numbers.
- `source`: `RunSpec`, and the checkpoint that a run starts from.
- `compatibility`: the steps against the recorded history of the source.
- `data`: calibration and held-out data.
- `steps`: whether a step fits a model, and how it is applied.
- `plan`: dry run and cost estimate.
- `run`: `carve` and `compare`; `resume`: the state of an unfinished run.
- `report_document`: the report of a run.

Nothing is imported here: reading a recipe needs neither torch nor transformers.
"""
