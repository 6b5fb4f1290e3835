"""The command line: what each verb prints, where, and what it costs. `demo` is tested with the real model."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from intaglio.checkpoint import RECORD, Checkpoint, load, weights_digest
from intaglio.cli.app import app
from intaglio.cli.console import progress_bar
from intaglio.cli.generate import DraftPainter, count_passes, generate
from intaglio.environment import tuning
from intaglio.evidence.engine.record import all_committed
from intaglio.exporters import FORMATS
from intaglio.methods.decoding.aded import ADED, Table
from intaglio.methods.decoding.lud import LUD
from intaglio.methods.describe import describe
from intaglio.methods.registry import PUBLISHED, get_method
from intaglio.recipe.schema import Recipe, json_schema
from intaglio.speculative.factory import decoder_names
from intaglio.speculative.protocols import Step
from intaglio.trainer import train
from tests.conftest import TinyDir
from tests.families import tiny_model
from tests.tuners import GivenTimes

VERBS = ["list", "show", "schema", "carve", "compare", "generate", "tune", "assets", "demo"]
SIDE = {
    "perplexity",
    "bits_per_byte",
    "kl_mean",
    "top1_agreement",
    "cosine",
    "tokens",
    "zero_fraction",
    "zeros",
    "token_sparsity",
    "chunk_sparsity",
    "activation_sparsity",
    "bytes",
    "parameters",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
}
RESTING = {"token_sparsity", "chunk_sparsity", "activation_sparsity"}
"""What a stock model has none of: its units never rest."""
PROMPT = "the quick brown fox"


def run(*words: str | Path, stdin: str | None = None) -> Any:
    """The outcome of a command that is expected to go well."""
    found = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert found.exit_code == 0, found.stderr
    return found


def document(*words: str | Path) -> Any:
    """What `--json` printed: one document on stdout, and nothing else there."""
    found = run(*words, "--json")
    assert found.stdout.endswith("\n")
    return json.loads(found.stdout)


@pytest.fixture
def recipe(tmp_path: Path, corpus_file: Path) -> Callable[..., Path]:
    def write(*steps: dict[str, Any], **header: Any) -> Path:
        calibration = {"texts": str(corpus_file), "samples": 2, "length": 32}
        measure = {"texts": str(corpus_file), "samples": 2, "length": 32}
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps({"calibration": calibration, "measure": measure, **header, "steps": list(steps)}))
        return path

    return write


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_list() -> None:
    rows = document("list")
    assert [set(row) for row in rows] == [{"slug", "area", "kind", "paper", "verdict"}] * len(PUBLISHED)
    assert [row["slug"] for row in rows] == list(PUBLISHED)
    assert {row["slug"]: row["kind"] for row in rows}["wanda"] == ["carving"]
    records = all_committed()
    assert {row["slug"]: row["verdict"] for row in rows if row["verdict"]} == {s: r.verdict for s, r in records.items()}
    weights = [slug for slug, entry in PUBLISHED.items() if entry.area == "weights"]
    assert [row["slug"] for row in document("list", "--area", "weights")] == weights
    assert document("list", "--room", "weights") == document("list", "--area", "weights")  # its former name
    shown = run("list").stdout
    assert all(slug in shown for slug in PUBLISHED)


@pytest.mark.parametrize("slug", PUBLISHED)
def test_show(slug: str) -> None:
    found = document("show", slug)
    assert {"slug", "area", "kind", "name", "paper", "verdict", "parameters", "description"} <= set(found)
    record = all_committed().get(slug)
    assert (found["slug"], found["verdict"]) == (slug, record and record.verdict)
    fields = get_method(slug).model_fields
    assert set(found["parameters"]) == {name for name in fields if not fields[name].exclude}
    shown = run("show", slug).stdout
    assert PUBLISHED[slug].name in shown
    assert all(name in shown for name in get_method(slug).model_fields)
    assert "Source:" in shown
    for block in describe(inspect.getdoc(get_method(slug)) or "").prose.split("\n\n"):
        if all(line.startswith("    ") for line in block.split("\n")):  # neither wrapped nor cut
            assert all(line in shown for line in block.split("\n"))


def test_schema() -> None:
    assert document("schema") == json_schema()
    assert json.loads(run("schema").stdout) == json_schema()


def test_assets_with_nothing_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def fetch(names: Any, progress: Any) -> list[Path]:
        asked.append(names)
        progress("a long step")
        return [tmp_path / "smollm2"]

    monkeypatch.setattr("intaglio.data.assets.fetch", fetch)
    assert document("assets") == [{"name": "smollm2", "path": str(tmp_path / "smollm2")}]
    found = run("assets", "smollm2", "wikipedia")
    assert found.stdout == f"smollm2: {tmp_path / 'smollm2'}\n"
    assert found.stderr == "a long step\n"
    assert asked == [None, ["smollm2", "wikipedia"]]


def test_version_and_help() -> None:
    assert run("--version").stdout == version("intaglio") + "\n"
    shown = run("--help").stdout
    assert all(verb in shown for verb in VERBS)
    assert "..." not in (shown + run("index", "--help").stdout).replace("[ARGS]...", "")  # no line is cut
    assert CliRunner().invoke(app, []).exit_code == 2  # nothing was asked for: the help, and no success
    assert CliRunner().invoke(app, ["crave"]).exit_code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_and_has_json(verb: str) -> None:
    shown = run(verb, "--help").stdout
    assert "--json" in shown
    assert CliRunner().invoke(app, [verb, "--no-such-option"]).exit_code == 2


def test_help_names_every_format_and_decoder() -> None:
    for verb, names in (("export", FORMATS), ("generate", decoder_names())):
        shown = "".join(run(verb, "--help").stdout.split())
        assert [name for name in names if name not in shown] == []


# --- carve and compare -----------------------------------------------------------------------------------------------


def test_carve(tiny_dir: TinyDir, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path, out = recipe({"wanda": {"sparsity": 0.5}}, {"magnitude": {"pattern": "2:4"}}, seed=3), tmp_path / "out"
    found = document("carve", tiny_dir("llama"), "-r", path, "-o", out)
    assert {"kind", "steps", "before", "after"} <= set(found)
    assert found["kind"] == "standalone"
    assert set(found["before"]) == set(found["after"]) == SIDE
    assert [(step["slug"], step["seed"]) for step in found["steps"]] == [("wanda", 3), ("magnitude", 3)]
    before, after = found["before"], found["after"]
    assert all(before[key] is not None for key in SIDE - RESTING - {"cosine"})
    assert before["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert before["top1_agreement"] == 1
    assert after["kl_mean"] > 0.01
    assert after["perplexity"] != before["perplexity"]
    assert set(before["zero_fraction"].values()) == {0}
    assert len(after["zero_fraction"]) == 14
    assert all(share >= 0.5 for share in after["zero_fraction"].values())
    assert (after["bytes"], after["parameters"]) == (before["bytes"], before["parameters"])
    assert json.loads((out / "report.json").read_text()) == found
    files = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", RECORD, "report.html", "report.json"} <= files
    assert set(os.listdir(tmp_path)) == {"out", "r.yaml"}
    # The recipe in the report does the same again.
    again = tmp_path / "again.yaml"
    again.write_text(found["recipe"])
    assert Recipe.read(again) == Recipe.read(path)
    # Without --json: a table for people, and where things are. Replacing an earlier result has to be asked for.
    shown = run("carve", tiny_dir("llama"), "-r", path, "-o", out, "--overwrite").stdout
    assert f"checkpoint: {out}\nreport: {out / 'report.html'}\n" in shown


def test_an_encoder_has_a_cosine(tiny_dir: TinyDir, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe({"magnitude": {"sparsity": 0.5}})
    found = document("carve", tiny_dir("bert"), "-r", path, "-o", tmp_path / "out")
    assert found["before"]["cosine"] == pytest.approx(1)
    assert 0 < found["after"]["cosine"] < 0.999
    nothing = {"perplexity", "bits_per_byte", "kl_mean", "top1_agreement", "decode_tokens_per_s"}
    assert {key for key in SIDE if found["after"][key] is None} == nothing | RESTING


def test_the_model_on_the_command_line_wins(tiny_dir: TinyDir, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe({"magnitude": {"sparsity": 0.5}}, model=str(tiny_dir("qwen3")))
    for words, family in (((), "qwen3"), ((str(tiny_dir("llama")),), "llama")):
        out = tmp_path / family
        found = document("carve", *words, "-r", path, "-o", out)
        assert found["model"] == str(tiny_dir(family))
        assert load(out).config.model_type == family
        assert document("carve", *words, "-r", path, "--dry-run")["model"] == str(tiny_dir(family))


def test_the_seed_on_the_command_line_wins(tiny_dir: TinyDir, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe({"wanda": {"sparsity": 0.5}}, seed=1)
    digests = []
    for name, words in (("a", []), ("b", ["--seed", "2"]), ("c", ["--seed", "1"])):
        found = document("carve", tiny_dir("llama"), "-r", path, "-o", tmp_path / name, *words)
        assert found["steps"][0]["seed"] == (2 if name == "b" else 1)
        digests.append(weights_digest(tmp_path / name))
    assert digests[0] == digests[2] != digests[1]


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    tiny_dir: TinyDir, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("intaglio.recipe.source.load", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    steps = [{"magnitude": {"sparsity": 0.5}}, {"dsnot": {"pattern": "2:4", "base": "sparsegpt"}}]
    words = ("carve", tiny_dir("llama"), "-r", recipe(*steps), "-o", tmp_path / "out", "--dry-run")
    before = sorted(tmp_path.rglob("*"))
    found = document(*words)
    assert {"model", "parameters", "bytes", "steps", "seconds", "memory_bytes"} <= set(found)
    assert [step["slug"] for step in found["steps"]] == ["magnitude", "dsnot"]
    assert all(step["seconds"] > 0 and step["memory_bytes"] > found["bytes"] for step in found["steps"])
    assert "nothing is done" in run(*words).stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_shows_what_was_given_and_json_everything(tiny_dir: TinyDir, recipe: Callable[..., Path]) -> None:
    step = {"train": {"steps": 3, "lora": {"r": 2}, "select": {"random": {"budget": 0.5}}, "length": 16}}
    searched = recipe({"r_sparse": {"search": {}}})
    assert "population" in run("carve", tiny_dir("llama"), "-r", searched, "--dry-run").stdout
    words = ("carve", tiny_dir("llama"), "-r", recipe(step), "--dry-run")
    found = document(*words)["steps"][0]
    assert found["given"] == {"steps": 3, "lora": {"r": 2}, "select": {"random": {"budget": 0.5}}, "length": 16}
    assert found["parameters"]["batch_size"] == 8
    shown = " ".join(run(*words).stdout.split())
    assert "learning_rate" not in shown
    assert "budget: 0.5" in shown


def test_compare(tiny_dir: TinyDir, recipe: Callable[..., Path], corpus_file: Path, tmp_path: Path) -> None:
    run("carve", tiny_dir("llama"), "-r", recipe({"magnitude": {"sparsity": 0.5}}), "-o", tmp_path / "out")
    texts = ("--texts", corpus_file, "--samples", "2", "--length", "32")
    page = tmp_path / "page.html"
    found = document("compare", tiny_dir("llama"), tmp_path / "out", *texts, "-o", page)
    assert set(found["a"]) == set(found["b"]) == SIDE | {"model"}
    assert found["a"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert found["b"]["kl_mean"] > 0.01
    assert all(share == 0.5 for share in found["b"]["zero_fraction"].values())
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    # Two that share no tokens of their own: agreement has no meaning.
    found = document("compare", tiny_dir("llama"), tiny_dir("bert"), *texts)
    assert found["b"]["kl_mean"] is None
    assert found["b"]["cosine"] is None
    assert "report: " in run("compare", tiny_dir("llama"), tiny_dir("llama"), *texts, "-o", page).stdout


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tiny_dir: TinyDir) -> Checkpoint:
    return load(tiny_dir("llama"))


def stock(checkpoint: Checkpoint, tokens: int) -> list[int]:
    ids = checkpoint.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    model: Any = checkpoint.model
    whole = model.generate(**ids, do_sample=False, max_new_tokens=tokens)
    found: list[int] = whole[0, ids["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "gpt2"])
def test_greedy_is_the_stock_librarys(family: str, tiny_dir: TinyDir) -> None:
    found = document("generate", tiny_dir(family), PROMPT, "--max-new-tokens", "12")
    assert {"text", "token_ids", "passes", "seconds"} <= set(found)
    checkpoint = load(tiny_dir(family))
    assert found["token_ids"] == stock(checkpoint, 12)
    assert found["text"] == checkpoint.tokenizer.decode(found["token_ids"], skip_special_tokens=True)
    assert found["passes"] == found["new_tokens"] == len(found["token_ids"])  # the prefill gives the first token
    assert found["prompt_tokens"] == len(checkpoint.tokenizer(PROMPT)["input_ids"])
    assert found["seconds"] > 0


def test_passes_are_calls_of_the_model(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [0], llama.model.forward

    def counted(*words: Any, **options: Any) -> Any:
        calls[0] += 1
        return forward(*words, **options)

    monkeypatch.setattr(llama.model, "forward", counted)
    assert generate(llama, PROMPT, max_new_tokens=9)["passes"] == calls[0]
    with count_passes(llama.model) as passes:
        llama.model(torch.tensor([[5]]))
    llama.model(torch.tensor([[5]]))
    assert passes == [1]  # the count ends with the block


def test_the_end_of_the_text_ends_it(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    third = stock(llama, 12)[2]
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", third)
    found = generate(llama, PROMPT, max_new_tokens=12)
    assert found["token_ids"][-1] == third
    assert found["passes"] == len(found["token_ids"]) <= 3


def test_a_seed_decides_what_is_drawn(tiny_dir: TinyDir, llama: Checkpoint) -> None:
    def drawn(seed: int, **options: Any) -> list[int]:
        found: list[int] = generate(llama, PROMPT, decoder="sample", seed=seed, max_new_tokens=12, **options)[
            "token_ids"
        ]
        return found

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, temperature=3.0) != drawn(1)
    assert drawn(1, top_k=1) == drawn(2, top_p=1e-6) == stock(llama, 12)
    assert torch.equal(torch.random.get_rng_state(), state)
    words = ("generate", tiny_dir("llama"), PROMPT, "--decoder", "sample", "--max-new-tokens", "12")
    assert document(*words, "--seed", "1")["token_ids"] == drawn(1)
    found = document(*words, "--seed", "2", "--temperature", "1.5", "--top-k", "20", "--top-p", "0.9")["token_ids"]
    assert found == drawn(2, temperature=1.5, top_k=20, top_p=0.9)


def test_the_checkpoints_own_sampling_settings_do_not_leak(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(llama, PROMPT, decoder="sample", max_new_tokens=12)["token_ids"]
    greedy = generate(llama, PROMPT, max_new_tokens=12)["token_ids"]
    for name, value in {"do_sample": True, "temperature": 9.0, "top_k": 2, "top_p": 0.1}.items():
        monkeypatch.setattr(llama.model.generation_config, name, value)
    assert generate(llama, PROMPT, decoder="sample", max_new_tokens=12)["token_ids"] == expected
    assert generate(llama, PROMPT, max_new_tokens=12)["token_ids"] == greedy


def test_what_is_streamed_is_the_text(tiny_dir: TinyDir) -> None:
    for chat in ([], ["--chat"]):
        words = ("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "30", *chat)
        found, streamed = document(*words), run(*words)
        assert streamed.stdout == found["text"] + "\n"
        assert f"{found['new_tokens']} tokens in {found['passes']} passes" in streamed.stderr
    pieces: list[str] = []
    text = generate(load(tiny_dir("llama")), PROMPT, max_new_tokens=30, write=pieces.append)["text"]
    assert "".join(pieces) == text
    assert sum(bool(piece) for piece in pieces) > 1  # as it comes, not at the end


def test_a_chat_uses_the_template(tiny_dir: TinyDir, llama: Checkpoint) -> None:
    plain = document("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "4")
    chat = document("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "4", "--chat")
    turns = [{"role": "user", "content": PROMPT}]
    ids = llama.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat["prompt_tokens"] == len(ids) > plain["prompt_tokens"]


def test_a_prompt_from_stdin_or_a_file(tiny_dir: TinyDir, tmp_path: Path) -> None:
    words = ("generate", tiny_dir("llama"), "--max-new-tokens", "4")
    plain = run(*words, PROMPT).stdout
    assert run(*words, "-", stdin=PROMPT).stdout == plain
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    assert run(*words, f"@{path}").stdout == plain
    missing = CliRunner().invoke(app, [*map(str, words), "@none.txt"])
    assert missing.exit_code == 2
    assert "cannot read the text none.txt" in missing.stderr


def test_the_device_and_the_dtype_are_passed_on(tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noted(model: str, **options: Any) -> Checkpoint:
        asked.append(options)
        return load(model, **options)

    monkeypatch.setattr("intaglio.checkpoint.load", noted)
    run("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "2", "--device", "cpu", "--dtype", "bfloat16")
    assert asked == [{"device": "cpu", "dtype": "bfloat16"}]


# --- decoders that draft ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tiny_dir: TinyDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an attached table of what it says itself."""
    checkpoint = load(tiny_dir("llama"))
    ids = checkpoint.tokenizer(PROMPT)["input_ids"] + stock(checkpoint, 30)
    ADED(corpus=[ids], nodes=9).fit(checkpoint)
    return checkpoint.save(tmp_path_factory.mktemp("fitted") / "llama")


def drafting_words(decoder: str, tiny_dir: TinyDir, corpus_file: Path) -> list[str]:
    settings = {
        "aded": [f"corpus={corpus_file}", "draft_cost=0", "token_cost=0", "search=best"],
        "dyspec": [f"draft={tiny_dir('llama')}", "budget=8"],
        "prompt_lookup": ["nodes=7"],
        "ngram": [f"corpus={corpus_file}", "nodes=7"],
        "draft_model": [f"model={tiny_dir('llama')}", "length=3"],
    }
    return ["--decoder", decoder, *(word for setting in settings[decoder] for word in ("--set", setting))]


def test_tune_measures_and_prints_what_it_keeps(
    tiny_dir: TinyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "BUSY", 1.0)  # times are kept on a busy machine as well
    found = document("tune", tiny_dir("llama"), "--rows", "1,2")
    assert [item["rows"] for item in found["passes"]] == [1, 2]
    assert all(set(item["cost"]) == {"1", "2", "4", "8", "16"} for item in found["passes"])
    assert all(found["times"][key][name] > 0 for key, name in found["choices"].items())
    kept = tuning.default_path()
    assert found["times"].items() <= json.loads(kept.read_text())["times"].items()
    again = document("tune", tiny_dir("llama"), "--rows", "1,2")
    assert found["times"].items() <= again["times"].items()  # nothing is measured again
    shown = run("tune", tiny_dir("llama"))
    assert "a further token" in shown.stdout
    assert f"kept in {kept}" in shown.stdout
    table = tmp_path / "table.json"
    table.write_text(json.dumps(found))
    fixed = tuning.Tuner(table, measured=False)  # as with INTAGLIO_TUNING=table.json
    for key, times in found["times"].items():
        assert fixed.times(key, dict.fromkeys(times, print)) == times


def test_tune_refuses_what_it_cannot_measure(tiny_dir: TinyDir) -> None:
    for words, sentence in (
        (["tune", str(tiny_dir("llama")), "--rows", "1,0"], "rows is '1,0'; numbers from 1 on, separated by commas"),
        (["tune", str(tiny_dir("bert"))], "speculative decoding needs a decoder"),
    ):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2
        assert sentence in found.stderr


def test_heads_that_lose_say_so_in_the_closing_line(tiny_dir: TinyDir) -> None:
    words = ("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "4", "--decoder", "chimera")
    with tuning.using(GivenTimes()):
        shown = run(*words, "--set", "untrained=true")
    assert "nothing was drafted: on this processor the best tree of chimera is expected to run at 0." in shown.stderr


def test_diverse_beams_are_written_one_after_the_other_with_their_groups(tiny_dir: TinyDir) -> None:
    words = ("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "8", "--decoder", "diverse_beam_search")
    words = (*words, "--set", "num_beams=4", "--set", "num_beam_groups=2", "--set", "num_return_sequences=2")
    found = document(*words)
    assert [output["group"] for output in found["outputs"]] == [0, 1]
    assert found["token_ids"] == found["outputs"][0]["token_ids"]
    assert found["new_tokens"] == sum(output["length"] for output in found["outputs"])
    assert (found["accepted_share"], found["lossy"]) == (None, None)
    shown = run(*words).stdout
    for number, output in enumerate(found["outputs"], 1):
        assert f"--- {number}: group {output['group']}, log prob {output['log_prob']:.2f}" in shown
    assert document(*words[:5], "--decoder", "greedy")["outputs"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--set", "num_beams=4", "--set", "num_beam_groups=3"), "num_beam_groups is 3 and num_beams 4"),
        (("--set", "num_beams=2", "--set", "num_beam_groups=4"), "at most one group a beam"),
        (("--show-drafts",), "the decoder diverse_beam_search drafts nothing for --show-drafts to show"),
        (("--set", "beams=4"), "beams: there is no such field here"),
    ],
)
def test_wrong_beams_are_one_sentence_before_the_model_loads(words: tuple[str, ...], sentence: str) -> None:
    given = ["generate", "no-such-model", PROMPT, "--decoder", "diverse_beam_search", *words]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 2
    assert sentence in found.stderr.replace("\n", " ")


def test_compare_shows_continuations_side_by_side(tiny_dir: TinyDir, corpus_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sizes = ("--texts", corpus_file, "--samples", "2", "--length", "24", "--continuations", "2")
    words = ("compare", tiny_dir("llama"), tiny_dir("qwen3"), *sizes)
    found = document(*words, "--output", str(page))
    for side in ("a", "b"):
        assert len(found[side]["continuations"]["texts"]) == 2
        assert 0 < found[side]["continuations"]["type_token_ratio"] <= 1
    html = page.read_text(encoding="utf-8")
    assert html.count('class="beside"') == 2
    assert "Texts side by side" in html
    assert html.count("B against A") == 1  # the texts have no such column


@pytest.mark.parametrize("decoder", ["aded", "dyspec", "prompt_lookup", "ngram", "draft_model"])
def test_a_decoder_that_drafts(decoder: str, tiny_dir: TinyDir, llama: Checkpoint, corpus_file: Path) -> None:
    words = ("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "12")
    drafts = drafting_words(decoder, tiny_dir, corpus_file)
    found = document(*words, *drafts)
    assert found["token_ids"] == stock(llama, 12)
    assert found["decoder"] == decoder
    assert found["tokens_per_pass"] == found["new_tokens"] / found["passes"]
    assert 0 <= found["accepted_share"] <= 1
    shown = run(*words, *drafts)
    assert shown.stdout == found["text"] + "\n"
    assert f"{found['tokens_per_pass']:.2f} tokens a pass, {found['accepted_share']:.0%} of the drafts accepted" in (
        shown.stderr
    )
    if decoder == "draft_model":  # itself: all but the first token of each pass is drafted, and right
        assert found["accepted_share"] == 1
        assert found["tokens_per_pass"] == 3  # 1 + 4 + 4 + 3 in four passes


@pytest.mark.parametrize("words", [["widths=2,1,1"], ["acceptance=0.6,0.3", "nodes=6"]])
def test_fixed_trees_of_a_draft_model(words: list[str], tiny_dir: TinyDir, llama: Checkpoint) -> None:
    settings = [word for setting in (f"model={tiny_dir('llama')}", *words) for word in ("--set", setting)]
    found = document(
        "generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "12", "--decoder", "draft_model", *settings
    )
    assert found["token_ids"] == stock(llama, 12)
    assert found["tokens_per_pass"] == 3  # its first choice is always right: 1 + 4 + 4 + 3 or 1 + 5 + 5 + 1


def test_what_is_attached_needs_nothing_else(fitted: Path, llama: Checkpoint) -> None:
    words = ("generate", fitted, PROMPT, "--max-new-tokens", "20", "--decoder", "aded")
    found = document(*words)
    assert found["token_ids"] == stock(llama, 20)
    assert found["tokens_per_pass"] > 2
    assert "started empty" not in run(*words).stderr
    assert document(*words, "--set", "nodes=1")["tokens_per_pass"] < found["tokens_per_pass"]


@pytest.fixture(scope="module")
def tuned(tiny_dir: TinyDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained for lexical units, though for a few steps only."""
    checkpoint = load(tiny_dir("llama"))
    train(checkpoint, [PROMPT] * 4, objective=LUD(length=16, alpha=0.0), steps=2, batch_size=2)
    return checkpoint.save(tmp_path_factory.mktemp("tuned") / "llama")


def test_what_is_not_lossless_says_so_with_all_three_numbers(tuned: Path) -> None:
    words = ("generate", tuned, PROMPT, "--max-new-tokens", "20", "--decoder", "lud")
    found = document(*words, "--set", "beta=0")
    assert found["tokens_per_pass"] > 2
    assert set(found["lossy"]) == {"threshold", "agreement", "speed_up"}
    assert found["lossy"]["threshold"] == 0
    assert 0 < found["lossy"]["agreement"] < 1
    assert found["lossy"]["speed_up"] > 0
    shown = run(*words, "--set", "beta=0")
    assert shown.stdout == found["text"] + "\n"
    assert "not lossless: at threshold 0 " in shown.stderr
    assert f"{found['lossy']['agreement']:.1%} agreement with the unaided model, " in shown.stderr
    assert "times its speed" in shown.stderr
    own = stock(load(tuned), 20)
    for settings in (["verify=true"], ["verify=true", "beta=0"], ["beta=1.01"]):
        same = document(*words, *(word for setting in settings for word in ("--set", setting)))
        assert same["token_ids"] == own
        assert (same["lossy"] is None) == (settings[0] == "verify=true")
    assert "lossless" not in run(*words, "--set", "verify=true").stderr
    assert run(*words, "--set", "beta=0", "--show-drafts").stdout == found["text"] + "\n"


def test_a_model_that_was_not_tuned_is_refused(tiny_dir: TinyDir) -> None:
    words = ["generate", str(tiny_dir("llama")), PROMPT, "--max-new-tokens", "2", "--decoder", "lud"]
    found = CliRunner().invoke(app, words)
    assert (found.exit_code, found.stdout) == (2, "")
    assert "has no PAD token that was trained for lexical units" in found.stderr
    assert document("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "2")["lossy"] is None


def test_a_table_that_starts_empty_is_said(tiny_dir: TinyDir) -> None:
    shown = run("generate", tiny_dir("llama"), PROMPT, "--max-new-tokens", "2", "--decoder", "aded")
    assert "aded had no corpus and started empty; --set corpus=FILE gives it one" in shown.stderr


def test_a_drafting_decoder_samples_if_asked(fitted: Path) -> None:
    words = ("generate", fitted, PROMPT, "--max-new-tokens", "12", "--decoder", "aded")
    drawn = [document(*words, "--temperature", "2", "--seed", seed)["token_ids"] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert document(*words, "--top-k", "1")["token_ids"] == document(*words)["token_ids"]


def test_drafts_are_coloured(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("generate", fitted, PROMPT, "--max-new-tokens", "20", "--decoder", "aded", "--show-drafts")
    text = document(*words[:-1])["text"]
    assert run(*words).stdout == text + "\n"  # no terminal, no colours
    screen = io.StringIO()
    monkeypatch.setattr("intaglio.cli.console.out", Console(file=screen, force_terminal=True, color_system="standard"))
    run(*words)
    pieces = re.split(r"(\x1b\[1;32m.*?\x1b\[0m)", screen.getvalue(), flags=re.DOTALL)
    green = "".join(pieces[1::2])
    assert len(pieces) > 2
    assert re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()) == text
    assert 0 < len(re.sub(r"\x1b\[[0-9;]*m", "", green)) < len(text)


def test_half_characters_wait_for_their_other_half() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    seen: list[tuple[str, bool]] = []
    painter = DraftPainter(Bytes(), lambda piece, drafted: seen.append((piece, drafted)))
    step = {"row": 0, "tree": None, "path": (), "hidden": None, "logits": torch.zeros(1, 1)}
    painter(Step(tokens=[*"a\u00e9".encode()], drafted=1, done=False, **step))  # type: ignore[arg-type]
    painter(Step(tokens=[*b"\nb", 0xC3], drafted=3, done=True, **step))  # type: ignore[arg-type]
    assert seen == [("a", True), ("\u00e9", False), ("\n", True), ("b", True), ("\ufffd", True)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--set", "nodes"], "--set 'nodes' is not accepted; write key=value, such as nodes=7"),
        (["--set", "nodes=1", "--set", "nodes=2"], "--set nodes is given twice; give it once"),
        (["--set", "node=1"], "--set, node: there is no such field here; did you mean nodes?"),
        (["--set", "tokenizer=x"], "--set, tokenizer: there is no such field here; accepted: adaptive, boost"),
        (["--set", "nodes=0"], "--set, nodes: '0' is not accepted, it should be greater than or equal to 1"),
        (["--set", "nodes=many"], "--set, nodes: 'many' is not accepted, it should be a valid integer"),
        (["--set", "search=beam"], "--set, search: 'beam' is not accepted, it should be 'mcts', 'greedy', 'full' or"),
        (["--set", "corpus="], "--set, corpus: the corpus is empty; accepted: texts"),
        (["--set", "corpus=nowhere.txt"], "the texts 'nowhere.txt' are no file, no folder and no bundled name"),
        (["--set", "corpus=no.safetensors"], "there is no tri-gram table no.safetensors"),
        (["--json", "--show-drafts"], "--show-drafts colours text, which --json does not print; give one of them"),
        (["--decoder", "greedy", "--set", "nodes=1"], "the decoder greedy has no settings (--set nodes); aded"),
        (["--decoder", "sample", "--show-drafts"], "the decoder sample drafts nothing for --show-drafts to show"),
        (
            ["--decoder", "adad"],
            "there is no decoder named 'adad'; accepted: greedy, sample, aded, apply_pretrained, awrs",
        ),
        (["--decoder", "ngram"], "the decoder ngram needs a corpus; give it with --set corpus=..."),
        (["--decoder", "ngram", "--set", "order=1", "--set", "corpus={corpus}"], "order is 1; it must be at least 2"),
        (["--decoder", "prompt_lookup", "--set", "nodes=0"], "nodes is 0; it must be at least 1"),
        (["--decoder", "prompt_lookup", "--set", "corpus=x"], "there is no such field here; accepted: candidates"),
        (
            ["--decoder", "draft_model", "--set", "model={tiny}", "--set", "length=0"],
            "length is 0; it must be at least 1",
        ),
        (
            ["--decoder", "draft_model", "--set", "model={other}"],
            "the draft model knows 99 token ids and the target 160",
        ),
        (
            ["--decoder", "draft_model", "--set", "model={tiny}", "--set", "widths=2,x"],
            "widths is '2,x'; numbers separated by commas",
        ),
        (["--decoder", "draft_model", "--set", "model={tiny}", "--set", "widths=0"], "a width is 0; it must be"),
        (["--decoder", "draft_model", "--set", "model={tiny}", "--set", "nodes=3"], "nodes belongs to acceptance"),
        (["--decoder", "draft_model", "--set", "model={tiny}", "--set", "acceptance=2"], "lie between 0 and 1"),
        (
            ["--decoder", "draft_model", "--set", "model={tiny}", "--set", "widths=2", "--set", "length=2"],
            "length, widths and acceptance each define the tree; give only one",
        ),
        (["--decoder", "dyspec"], "the decoder dyspec needs a draft; give it with --set draft=..."),
        (["--decoder", "dyspec", "--set", "draft={other}"], "the draft model knows 99 token ids and the target 160"),
        (
            ["--decoder", "dyspec", "--set", "draft={tiny}", "--set", "budget=4000"],
            "the budget is 4000 nodes; a prompt of",
        ),
        (
            ["--decoder", "dyspec", "--set", "draft={tiny}", "--set", "algorithm=threshold", "--set", "threshold=2"],
            "--set, threshold: '2' is not accepted, it should be less than or equal to 1",
        ),
        (["--set", "corpus={table}"], "the table was counted over 10 token ids; the target has 160"),
    ],
)
def test_drafting_that_is_asked_for_wrongly(
    words: list[str], says: str, tiny_dir: TinyDir, corpus_file: Path, tmp_path: Path
) -> None:
    Table.build([[1, 2, 3]], 10).save(tmp_path / "t.safetensors")
    tiny_model("llama", layers=1, vocab_size=99).save_pretrained(tmp_path / "other")
    places = {"{corpus}": corpus_file, "{tiny}": tiny_dir("llama"), "{other}": tmp_path / "other",
              "{table}": tmp_path / "t.safetensors"}  # fmt: skip
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    given = ["generate", str(tiny_dir("llama")), PROMPT, "--decoder", "aded", "--max-new-tokens", "2", *words]
    found = CliRunner().invoke(app, given)
    assert (found.exit_code, found.stdout) == (2, "")
    assert says in found.stderr
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.stderr.splitlines()[-1:] == errors


def test_an_encoder_does_not_draft(tiny_dir: TinyDir) -> None:
    found = CliRunner().invoke(app, ["generate", str(tiny_dir("bert")), PROMPT, "--decoder", "aded"])
    assert found.exit_code == 2
    assert "is an encoder; it does not generate" in found.stderr


# --- the shell -------------------------------------------------------------------------------------------------------


def shell(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "intaglio.cli.app", *words], capture_output=True, text=True, **options)


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    done = shell("carve", "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert json.loads(shell("list", "--json").stdout)
    as_module = subprocess.run([sys.executable, "-m", "intaglio", "--version"], capture_output=True, text=True)
    assert as_module.stdout.strip() == version("intaglio")


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        words = [sys.executable, "-m", "intaglio.cli.app", "list", "--json"]
        done = subprocess.run(words, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        progress(1, 2, "wanda: block 1/2")
    assert capsys.readouterr() == ("", "")


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr("intaglio.cli.console.err", Console(file=screen, force_terminal=True, width=120))
    with progress_bar() as progress:
        progress(1, 4, "wanda: block 1/2")
        progress(2, 4, "wanda: block 2/2")
        progress(1, 3, "measuring")
    assert "measuring" in screen.getvalue()
    assert "1/3" in screen.getvalue()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nosuch",), "error: no such command 'nosuch'; see intaglio --help"),
        (("show",), "error: missing argument 'slug'; see intaglio show --help"),
        (("list", "--rom", "x"), "error: no such option: --rom"),
        (("generate", "m", "p", "--top-k", "0"), "error: invalid value for '--top-k': Input should be greater"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert found.stderr.startswith(sentence)
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""


def test_without_a_verb_the_verbs_are_listed() -> None:
    found = CliRunner().invoke(app, [])
    assert found.exit_code == 2
    assert all(verb in found.stderr for verb in ("carve", "prove", "demo"))
