"""Designs: the runners of claims. Each is a frozen dataclass whose `run(arm, key, settings)` returns a `Result`.

- `training`: `Pretrain` (a small model from scratch) and `Finetune` (a trained one), then measure.
- `one_shot`: `OneShot`, edit a trained model with calibration data, then measure.
- `replay`: `Replay`, tokens per pass of drafters and decoders.
- `classify`: `Classify`, image classifiers; `retrieve`: `Retrieve`, per-query metrics; `generate`: `Generate`, outputs.
- `measures`: what is measured on a model; `drafters`: the arms of `Replay`.

A setting with the name of a method's field is given to that method, so that tuned values reach it.
"""
