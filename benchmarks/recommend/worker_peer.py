"""Train BERT4Rec by RecTools on prepared sequences, and print ranks, examples and seconds as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
data, settings = json.loads(Path(sys.argv[1]).read_text()), json.loads(sys.argv[2])
torch.set_num_threads(settings["threads"])
seed_everything(settings["seed"], verbose=False)


def dataset(sequences: dict[str, list[int]]) -> Dataset:
    rows = [
        (user, item, 1.0, pd.Timestamp(t, unit="s")) for user, ids in sequences.items() for t, item in enumerate(ids)
    ]
    return Dataset.construct(pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]))


def trainer() -> Trainer:
    return Trainer(
        max_epochs=settings["epochs"], enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, accelerator="cpu", devices=1,
    )  # fmt: skip


model = BERT4RecModel(
    n_blocks=settings["depth"], n_heads=settings["heads"], n_factors=settings["width"],
    session_max_len=settings["length"], batch_size=settings["batch_size"], lr=settings["learning_rate"],
    dropout_rate=settings["dropout"], mask_prob=settings["mask_ratio"], loss="softmax", get_trainer_func=trainer,
    dataloader_num_workers=0, recommend_torch_device="cpu",
)  # fmt: skip
trained = dataset(data["sequences"])
started = time.perf_counter()
model.fit(trained)
seconds = time.perf_counter() - started
users = list(data["sequences"])
whole = dataset(data["seen"])
listed = model.recommend(users, dataset=whole, k=10, filter_viewed=True)
place = {(row.user_id, row.item_id): int(row.rank) - 1 for row in listed.itertuples()}
found = [place.get((user, data["targets"][user])) for user in users]
steps = settings["epochs"] * -(-len(users) // settings["batch_size"])
print(json.dumps({"ranks": found, "examples": steps * settings["batch_size"], "steps": steps, "seconds": seconds}))
