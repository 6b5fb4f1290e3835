"""Modifiers, selectors, adapters, early stopping: each does its part, and resumes exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intaglio.checkpoint import Checkpoint
from intaglio.errors import IntaglioError
from intaglio.methods.base import Progress
from intaglio.methods.objectives.codegen2 import CodeGen2
from intaglio.trainer import CausalLM, Example, KeyedRNG, Lora, Loss, ModifierSession, TrainingRun
from intaglio.trainer import resume as run_state
from intaglio.trainer.sparsity_mask import linear_modules
from tests.families import VOCAB
from tests.trainer.helpers import TEXTS, checkpoint, far, run, same, weights
from tests.trainer.test_resume import Killed, killer

MLP = "model.layers.0.mlp.down_proj"


class Halve(nn.Module):
    """A mask over a weight that can change while training."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Pruning(ModifierSession):
    """Prunes one more column a step, pulls a norm to a centre of its own, learns a temperature."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.centre = torch.zeros(())
        self.rates = [0.5]
        self.temperature = nn.Parameter(torch.ones(()))

    def attach(self, run: TrainingRun) -> Pruning:
        self.run = run
        linear = run.model.get_submodule(MLP)
        self.mask = Halve(linear.weight)
        parametrize.register_parametrization(linear, "weight", self.mask)
        self.calls.append("attach")
        return self

    def before_step(self, step: int, batch: dict[str, Any]) -> None:
        self.calls.append(f"before {step} {tuple(batch['input_ids'].shape)}")

    def after_step(self, step: int) -> None:
        self.mask.mask[:, step - 1] = 0
        self.centre = self.centre * 0.9 + step
        self.rates.append(0.5 / step)
        self.calls.append(f"after {step}")

    def extra_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Loss:
        assert batch["id"].tolist() == [int(n) for n in batch["id"] if 0 <= n < self.run.rows]
        assert outputs.shape[:2] == batch["input_ids"].shape
        norm = model.get_submodule("model.norm").weight
        pull = self.temperature * (norm.mean() - self.centre).square() * 1e-3
        return Loss(pull + sum(self.rates) * 0, {"pull": pull, "rate": self.rates[-1]})

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.temperature], "lr": 0.1, "weight_decay": 0.0}]

    def state_dict(self) -> dict[str, Any]:
        return {"centre": self.centre, "rates": self.rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.centre, self.rates = state["centre"], state["rates"]

    def detach(self) -> None:
        linear = self.run.model.get_submodule(MLP)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
        self.calls.append("detach")


def test_a_modifier_is_called_in_order_and_baked() -> None:
    ckpt, modifier = checkpoint(), Pruning()
    names = set(weights(ckpt))
    done = run(ckpt, modifiers=[modifier], steps=3, gradient_accumulation_steps=2)
    body = [call for t in (1, 2, 3) for call in (f"before {t} (2, 24)", f"after {t}")]
    assert modifier.calls == ["attach", *body, "detach"]
    assert set(weights(ckpt)) == names
    linear = ckpt.model.get_submodule(MLP)
    assert type(linear) is nn.Linear
    assert not linear.weight[:, :3].any()
    assert linear.weight[:, 3:].all()
    assert float(modifier.temperature.detach()) != 1.0
    assert all(line.parts["pull"] > 0 for line in done.history)


def test_a_modifier_resumes_exactly(tmp_path: Path) -> None:
    whole, one = checkpoint(attention_dropout=0.1), Pruning()
    unbroken = run(whole, modifiers=[one])
    with pytest.raises(Killed):
        run(
            checkpoint(attention_dropout=0.1),
            modifiers=[Pruning()],
            directory=tmp_path,
            progress=killer(5),
            save_every=2,
        )
    again, two = checkpoint(attention_dropout=0.1), Pruning()
    resumed = run(again, modifiers=[two], directory=tmp_path, save_every=2)
    assert resumed.history == unbroken.history
    assert same(weights(again), weights(whole))
    assert two.rates == one.rates
    assert torch.equal(two.temperature, one.temperature)


def test_a_modifier_is_detached_after_an_error() -> None:
    ckpt, modifier = checkpoint(), Pruning()
    with pytest.raises(Killed):
        run(ckpt, modifiers=[modifier], progress=killer(2))
    assert modifier.calls[-1] == "detach"
    assert type(ckpt.model.get_submodule(MLP)) is nn.Linear


def test_states_with_tensors_travel_as_json_and_safetensors() -> None:
    state = {"a": torch.arange(3), "b": [1, {"c": torch.ones(2, 2)}], "d": None, "e": "x"}
    tensors: dict[str, Tensor] = {}
    back = run_state.join(run_state.plain(run_state.split(state, tensors)), tensors)
    assert torch.equal(back["a"], state["a"])
    assert torch.equal(back["b"][1]["c"], torch.ones(2, 2))
    assert (back["b"][0], back["d"], back["e"]) == (1, None, "x")


class Picks:
    """A selector with fixed picks."""

    def __init__(self, picks: Sequence[Any]) -> None:
        self.picks, self.budget = picks, 0.5

    def select(
        self,
        dataset: Sequence[Example],
        model: Checkpoint,
        original: Checkpoint | None,
        budget: float,
        rng: KeyedRNG,
        *,
        progress: Progress,
    ) -> Sequence[Any]:
        assert (budget, rng.seed) == (0.5, 0)
        assert [example["id"] for example in dataset] == list(range(len(dataset)))
        return self.picks


def test_a_selector_chooses_the_examples() -> None:
    ids = [[n, n + 1, n + 2, n + 3] for n in range(3, 11)]
    rows = CausalLM(length=8, pack=False)

    def trained(data: Any, **more: Any) -> dict[str, Tensor]:
        ckpt = checkpoint()
        run(ckpt, data, objective=rows, steps=3, **more)
        return weights(ckpt)

    assert same(trained(ids, select=Picks([5, 1, 2])), trained([ids[1], ids[2], ids[5]]))
    copies = trained(ids, select=Picks([0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]))
    assert same(copies, trained([ids[0]] * 4 + [ids[2]] * 2 + [ids[3]] * 2))


@pytest.mark.parametrize(
    ("picks", "sentence"),
    [
        ([], "Picks chose none of the 30 examples"),
        ([30], "Picks chose the example 30; there are 30"),
        ([0.5], "Picks gave 1 weights for 30 examples"),
        ([-1.0] * 30, "one at least 0 for each is needed"),
    ],
)
def test_a_selector_that_chooses_badly_is_one_sentence(picks: list[Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        run(checkpoint(), select=Picks(picks))


def half_zero(family: str) -> Checkpoint:
    """A checkpoint half of whose linear weights are zero, but for one dense layer."""
    ckpt, draw = checkpoint(family), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in list(linear_modules(ckpt.model).values())[1:]:
            module.weight[torch.rand(module.weight.shape, generator=draw) < 0.5] = 0
    return ckpt


def zeros(ckpt: Checkpoint) -> dict[str, Tensor]:
    """Where the weights are zero."""
    return {name: value == 0 for name, value in weights(ckpt).items()}


@pytest.mark.parametrize("lora", [None, {"r": 2, "dropout": 0.1}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_zeros_of_a_pruned_model_stay(family: str, lora: dict[str, Any] | None) -> None:
    ckpt = half_zero(family)
    pattern, before = zeros(ckpt), weights(ckpt)
    run(ckpt, steps=3, lora=lora, learning_rate=1e-2)
    assert same(zeros(ckpt), pattern)
    changed = {name for name, value in weights(ckpt).items() if not torch.equal(value, before[name])}
    linear = {f"{name}.weight" for name in linear_modules(ckpt.model)}
    assert changed >= linear
    assert lora is None or changed == linear
    loose = half_zero(family)
    run(loose, steps=3, lora=lora, learning_rate=1e-2, keep_mask=False)
    assert not same(zeros(loose), pattern)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_an_adapter_changes_nothing_but_where_the_numbers_are(family: str) -> None:
    ckpt = half_zero(family)
    ids = torch.arange(3, 23)[None]
    seen: list[Tensor] = []

    def measure(ckpt: Checkpoint) -> dict[str, float]:
        seen.append(ckpt.model(ids).logits)
        return {"loss": 0.0}

    names, modules = set(weights(ckpt)), [type(module) for module in ckpt.model.modules()]
    run(ckpt, steps=3, lora={"r": 2}, learning_rate=1e-2, evaluate=measure, evaluate_every=3)
    with torch.no_grad():
        assert torch.allclose(ckpt.model(ids).logits, seen[-1], atol=1e-4)
    assert (set(weights(ckpt)), [type(module) for module in ckpt.model.modules()]) == (names, modules)
    assert all(p.requires_grad for p in ckpt.model.parameters())
    assert not hasattr(ckpt.model, "peft_config")
    assert ckpt.record.steps[0].parameters["lora"]["r"] == 2


def test_adapters_resume_exactly_and_their_states_are_small(tmp_path: Path) -> None:
    lora = {"r": 2, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}
    whole = half_zero("llama")
    unbroken = run(whole, lora=lora)
    with pytest.raises(Killed):
        run(half_zero("llama"), lora=lora, directory=tmp_path, progress=killer(5), save_every=2)
    state = run_state.checkpoint_path(tmp_path, 4) / "model.safetensors"
    assert state.stat().st_size < 10_000
    again = half_zero("llama")
    assert run(again, lora=lora, directory=tmp_path, save_every=2).history == unbroken.history
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
def test_rows_of_new_tokens_are_trained_with_adapters(family: str, tmp_path: Path) -> None:
    ids, seen = torch.arange(150, VOCAB + 3)[None], list[Tensor]()

    def measure(ckpt: Checkpoint) -> dict[str, float]:
        seen.append(ckpt.model(ids).logits)
        return {"loss": 0.0}

    objective = CodeGen2(
        length=48, pack=False, corruption_ratio=1.0, sentinels=2, noise_ratio=0.4, mean_span_length=2.0
    )
    fields: dict[str, Any] = {"objective": objective, "lora": {"r": 2}, "learning_rate": 1e-2, "steps": 4}
    start, trained, killed, again = (checkpoint(family, layers=1) for _ in range(4))
    list(objective.prepare(start, [], KeyedRNG(0)))
    run(trained, **fields, evaluate=measure, evaluate_every=4)
    with torch.no_grad():
        assert torch.allclose(trained.model(ids).logits, seen[-1], atol=1e-4)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(ckpt.model, part)().weight for ckpt in (start, trained))
        assert torch.equal(before[:VOCAB], after[:VOCAB])
        assert (before[VOCAB:] != after[VOCAB:]).any(1).all()
    assert weights(trained).keys() == weights(start).keys()
    with pytest.raises(Killed):
        run(killed, **fields, directory=tmp_path, progress=killer(3), save_every=1)
    run(again, **fields, directory=tmp_path, save_every=1)
    assert same(weights(again), weights(trained))


def test_an_adapter_is_taken_out_unmerged_after_an_error() -> None:
    ckpt = checkpoint()
    before = weights(ckpt)
    with pytest.raises(Killed):
        run(ckpt, lora=Lora(r=2), progress=killer(3))
    assert same(before, weights(ckpt))


def test_half_precision_weights_take_adapters() -> None:
    ckpt = checkpoint(dtype=torch.bfloat16)
    before = weights(ckpt)
    run(ckpt, lora={"r": 2}, steps=3, learning_rate=1e-2)
    assert not same(before, weights(ckpt))
    assert ckpt.model.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_weights_and_is_switched_off() -> None:
    plain, checkpointed = checkpoint(), checkpoint()
    run(plain, steps=3)
    run(checkpointed, steps=3, gradient_checkpointing=True)
    assert far(weights(plain), weights(checkpointed)) < 1e-6
    assert not any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.model.modules())


def test_patience_stops_early_and_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 2.5, 1.0, 1.0])
    arguments = {
        "evaluate_every": 1,
        "early_stopping_patience": 2,
        "metric_for_best_model": "error",
        "directory": tmp_path,
    }
    first, second = checkpoint(), checkpoint()
    done = run(first, evaluate=lambda ckpt: {"error": next(values)}, **arguments)
    assert done.steps == 4
    again = run(second, evaluate=lambda ckpt: {"error": next(values)}, **arguments)
    assert (again.steps, again.history, again.tokens) == (4, done.history, done.tokens)
    assert same(weights(first), weights(second))
    watch = {"early_stopping_patience": 1, "metric_for_best_model": "eror"}
    with pytest.raises(IntaglioError, match="metric_for_best_model is 'eror'; did you mean error"):
        run(checkpoint(), evaluate=lambda ckpt: {"error": 1.0}, **watch)


def test_earlier_spellings_of_settings_are_accepted() -> None:
    new, old = checkpoint(), checkpoint()
    names = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "min_lr_ratio": 0.5, "early_stopping_patience": 3}
    run(new, modifiers=[Pruning()], steps=3, **names)
    former = dict(zip(("accumulate", "clip", "final_share", "patience"), names.values(), strict=True))
    run(old, shape=[Pruning()], steps=3, watch="loss", **former)
    assert same(weights(new), weights(old))
    assert new.record.steps[0].parameters == old.record.steps[0].parameters
    with pytest.raises(IntaglioError, match="clip: there is no such field here"):
        run(checkpoint(), clip=1.0, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"lora": {"targets": ["q_pro"]}}, "lora: no linear layer is named 'q_pro'; did you mean q_proj"),
        ({"lora": {"r": 0}}, r"lora\.r: 0 is not accepted, it should be greater"),
        ({"lora": {"rank": 4}}, "lora.rank: there is no such field here; accepted: alpha, dropout, r, targets"),
        ({"modifiers": [3]}, "modifiers holds int; a training modifier has attach"),
        ({"select": 3}, "select is int; it needs select and budget"),
        ({"select": Picks([0]), "data": iter(TEXTS)}, "select needs data in memory"),
        ({"report_to": ["nowhere"]}, "report_to names 'nowhere', which is not installed"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    ckpt = checkpoint()
    before = weights(ckpt)
    with pytest.raises(IntaglioError, match=sentence) as caught:
        run(ckpt, **arguments)
    assert "\n" not in str(caught.value)
    assert same(before, weights(ckpt))


def test_fsdp_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(IntaglioError, match="FSDP is requested on CPUs, where accelerate silently runs DDP"):
        run(checkpoint())


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from tests.trainer.helpers import checkpoint, run, weights
from tests.trainer.test_modifiers import two_process_run
from tests.trainer.test_resume import Killed, killer
arguments = two_process_run(sys.argv[4]) | {"save_every": 2}
if sys.argv[2] == "killed":
    try:
        run(checkpoint(), directory=sys.argv[3], progress=killer(3), **arguments)
    except Killed:
        pass
    os._exit(0)
ckpt = checkpoint()
done = run(ckpt, directory=sys.argv[3], **arguments)
if os.environ["RANK"] == "0":
    save_file(weights(ckpt), sys.argv[1])
    print(done.tokens, *[line.loss for line in done.history])
"""


ADAPTERS = {"lora": {"r": 2}, "weight_decay": 0.1}


def two_process_run(case: str) -> dict[str, Any]:
    """Arguments of a run that two processes share."""
    from tests.trainer.test_loop import Owning

    sizes: dict[str, Any] = {"objective": Owning(), "batch_size": 4, "gradient_accumulation_steps": 2, "steps": 6}
    return sizes | (ADAPTERS if case == "adapters" else {})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole", "adapters"])
def test_two_processes_are_one(case: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out, script = tmp_path / "out.safetensors", tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    arguments = [str(out), "killed", str(tmp_path / "run"), case]
    subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
    arguments[1] = "resumed"
    done = subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True, text=True)
    alone = checkpoint()
    before = weights(alone)
    one = run(alone, **two_process_run(case))
    assert far(load_file(out), weights(alone)) < 1e-5
    assert far(before, weights(alone)) > 1e-4
    tokens, *losses = done.stdout.split()
    assert int(tokens) == one.tokens
    assert [float(loss) for loss in losses] == pytest.approx([line.loss for line in one.history], abs=1e-5)
