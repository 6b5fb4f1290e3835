"""A killed run, called again, ends like one that was never killed: bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.errors import IntaglioError, OtherRunError
from intaglio.trainer import CausalLM
from intaglio.trainer import resume as run_state
from tests.trainer.helpers import TEXTS, checkpoint, run, same, weights


class Killed(Exception):
    """Stands for the death of the process."""


def killer(at: int) -> Any:
    """A progress that dies after step `at`."""

    def progress(done: int, total: int, what: str) -> None:
        if done == at:
            raise Killed

    return progress


def stream() -> Any:
    """Texts that can only be read in their order, more than once."""

    class Endless:
        def __iter__(self) -> Any:
            return iter(TEXTS)

    return Endless()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, log interval cut": {"accumulate": 2, "log_every": 3, "save_every": 2},
    "bfloat16": {"precision": "bfloat16"},
    "whole documents, several epochs": {"data": TEXTS[:3], "objective": CausalLM(length=40, pack=False)},
    "stream": {"data": stream()},
    "evaluated": {"evaluate": TEXTS[:3], "evaluate_every": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_the_unbroken_run(case: str, tmp_path: Path) -> None:
    arguments = {"save_every": 1, **CASES[case]}
    whole = checkpoint(attention_dropout=0.2)
    unbroken = run(whole, **arguments)
    for at in (1, 5) if case == "plain" else (5,):
        directory = tmp_path / str(at)
        with pytest.raises(Killed):
            run(checkpoint(attention_dropout=0.2), directory=directory, progress=killer(at), **arguments)
        again = checkpoint(attention_dropout=0.2)
        resumed = run(again, directory=directory, **arguments)
        assert resumed.history == unbroken.history
        assert same(weights(again), weights(whole))
        assert (resumed.steps, resumed.tokens) == (unbroken.steps, unbroken.tokens)


def test_dropout_is_at_work_in_these_tests() -> None:
    with_dropout, without = checkpoint(attention_dropout=0.2), checkpoint()
    run(with_dropout)
    run(without)
    assert not same(weights(with_dropout), weights(without))


@pytest.mark.parametrize("lost", ["loop.json", "model.safetensors", "everything but the weights"])
def test_a_death_while_saving_costs_the_steps_since_the_save_before(lost: str, tmp_path: Path) -> None:
    whole = checkpoint()
    unbroken = run(whole, save_every=2)
    with pytest.raises(Killed):
        run(checkpoint(), directory=tmp_path, progress=killer(7), save_every=2)
    newest = run_state.checkpoint_path(tmp_path, 6)
    # loop.json is written last: it is missing whatever else is.
    (newest / "loop.json").unlink()
    if lost == "model.safetensors":
        (newest / lost).write_bytes(b"half")
    elif lost == "everything but the weights":
        for file in newest.iterdir():
            if file.name != "model.safetensors":
                file.unlink()
    assert run_state.steps_saved(tmp_path) == [4]
    again = checkpoint()
    resumed = run(again, directory=tmp_path, save_every=2)
    assert resumed.history == unbroken.history
    assert same(weights(again), weights(whole))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first, second = checkpoint(), checkpoint()
    done = run(first, directory=tmp_path)
    called: list[int] = []
    again = run(second, directory=tmp_path, progress=lambda done, total, what: called.append(done))
    assert called == []
    assert same(weights(first), weights(second))
    assert (again.history, again.tokens) == (done.history, done.tokens)


def test_resume_false_starts_over(tmp_path: Path) -> None:
    run(checkpoint(), directory=tmp_path)
    fresh, lone = checkpoint(), checkpoint()
    run(fresh, directory=tmp_path, resume=False, seed=5)
    run(lone, seed=5)
    assert same(weights(fresh), weights(lone))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"objective": CausalLM(length=20)}, "length"),
        ({"data": TEXTS[:-1]}, "data"),
        ({"steps": 9}, "steps"),
    ],
)
def test_the_directory_of_another_run_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(checkpoint(), directory=tmp_path, progress=killer(2))
    with pytest.raises(IntaglioError, match=f"holds a run with another {named}") as caught:
        run(checkpoint(), directory=tmp_path, **change)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_earlier_version_is_resumed_where_the_new_option_is_none(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(checkpoint(), directory=tmp_path, progress=killer(4))
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["arguments"].pop("early_stopping_patience") is None
    (tmp_path / "run.json").write_text(json.dumps(saved))
    resumed, whole = checkpoint(), checkpoint()
    run(resumed, directory=tmp_path)
    run(whole)
    assert same(weights(resumed), weights(whole))
    with pytest.raises(OtherRunError, match=r"holds a run with another early_stopping_patience \(None, not 3\)"):
        run(checkpoint(), directory=tmp_path, early_stopping_patience=3, evaluate=TEXTS)
    saved["arguments"]["removed_option"] = 1
    (tmp_path / "run.json").write_text(json.dumps(saved))
    with pytest.raises(OtherRunError, match="another removed_option"):
        run(checkpoint(), directory=tmp_path)


def test_another_model_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(checkpoint(), directory=tmp_path / "run", progress=killer(2))
    with pytest.raises(IntaglioError, match="another model"):
        run(checkpoint(seed=1), directory=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(IntaglioError, match="exists and is not empty"):
        run(checkpoint(), directory=tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(IntaglioError, match="is damaged"):
        run(checkpoint(), directory=tmp_path / "run")


def test_few_checkpoints_stay_and_none_is_a_pickle_of_ours(tmp_path: Path) -> None:
    run(checkpoint(), directory=tmp_path, save_every=1)
    assert run_state.steps_saved(tmp_path) == [7, 8]
    names = {file.name for file in run_state.checkpoint_path(tmp_path, 8).iterdir()}
    assert names == {
        "loop.json",
        "model.safetensors",
        "modifiers.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    torch.load(run_state.checkpoint_path(tmp_path, 8) / "optimizer.pt", weights_only=True)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tests.trainer.helpers import checkpoint, run, weights
from safetensors.torch import save_file
ckpt = checkpoint(attention_dropout=0.2)
run(ckpt, directory=sys.argv[1], steps=60, save_every=1)
save_file(weights(ckpt), sys.argv[2])
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = checkpoint(attention_dropout=0.2)
    run(whole, steps=60)
    for delay in (0.0, 0.13, 0.31):
        directory, out = tmp_path / "run", tmp_path / "out.safetensors"
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(directory), str(out)])
            while not directory.is_dir() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.4 + delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run([sys.executable, "-c", SCRIPT, str(directory), str(out)], check=True)
        assert same(load_file(out), weights(whole))
        shutil.rmtree(directory)
        out.unlink()
