"""Train BERT4Rec by Intaglio on prepared sequences, and print ranks, examples and seconds as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from intaglio import BERT4Rec, train
from intaglio.data.item_sequences import ItemSequences, Question
from intaglio.methods.objectives.next_item import new_recommender, ranks

data, settings = json.loads(Path(sys.argv[1]).read_text()), json.loads(sys.argv[2])
torch.set_num_threads(settings["threads"])
counts = tuple([0] * (data["items"] + 1))
items = ItemSequences({}, ("", *data["names"]), tuple([""] * (data["items"] + 1)), counts, "")
sizes = {name: settings[name] for name in ("width", "depth", "heads", "dropout", "seed")}
checkpoint = new_recommender(items, "bert", context=settings["length"], **sizes)
rows = [{"input_ids": ids} for ids in data["sequences"].values()]
steps = settings["epochs"] * -(-len(rows) // settings["batch_size"])
started = time.perf_counter()
train(
    checkpoint, rows, objective=BERT4Rec(mask_ratio=settings["mask_ratio"]), steps=steps, seed=settings["seed"],
    batch_size=settings["batch_size"], learning_rate=settings["learning_rate"], schedule="constant", warmup=0,
    betas=(0.9, 0.98), max_grad_norm=0.0,
)  # fmt: skip
seconds = time.perf_counter() - started
checkpoint.model.eval()
questions = [Question(user, tuple(ids), data["targets"][user]) for user, ids in data["seen"].items()]
found = ranks(checkpoint, questions).tolist()
print(json.dumps({"ranks": found, "examples": steps * settings["batch_size"], "steps": steps, "seconds": seconds}))
