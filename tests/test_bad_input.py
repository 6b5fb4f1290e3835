"""Bad input, tried for real: one clear sentence, a non-zero exit, nothing half-written.

Each damage is done to a real (tiny) checkpoint or text, and tried through the library and through the command line.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from intaglio import atomic_io
from intaglio.checkpoint import RECORD, load, weights_digest
from intaglio.cli.app import app
from intaglio.cli.generate import generate
from intaglio.data.segments import Segments
from intaglio.errors import IntaglioError
from intaglio.methods.weights.magnitude import Magnitude
from intaglio.methods.weights.wanda import Wanda
from intaglio.recipe.plan import plan
from intaglio.recipe.run import carve, compare
from intaglio.recipe.schema import Recipe
from tests.conftest import TinyDir
from tests.families import tiny_model, tiny_tokenizer

Damage = Callable[[Path], None]


def refusal(call: Callable[[], Any], *culprits: str) -> str:
    """The one line that the library says, which must hold every culprit."""
    with pytest.raises(IntaglioError) as found:
        call()
    sentence = str(found.value)
    assert sentence.isprintable()
    assert len(sentence) < 600
    for culprit in culprits:
        assert culprit in sentence
    return sentence


def cli_refusal(place: Path, *words: str | Path, stdin: str | bytes | None = None) -> str:
    """What the command line says: one line on stderr, nothing on stdout, exit 2, and nothing new in `place`."""
    before = sorted(place.rglob("*"))
    found = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert found.exit_code == 2, found.stderr
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before
    return found.stderr.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def model(tiny_dir: TinyDir, tmp_path: Path) -> Path:
    """A tiny Llama that may be damaged."""
    return shutil.copytree(tiny_dir("llama"), tmp_path / "model")


Write = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, corpus_file: Path) -> Write:
    """`recipe(steps, **header)` writes a recipe file over the shared corpus, small enough to run in a moment."""

    def write(*steps: dict[str, Any], **header: Any) -> Path:
        sizes = {"texts": str(corpus_file), "samples": 2, "length": 32}
        value = {"calibration": sizes, "measure": sizes | {"speed": False}} | header | {"steps": list(steps)}
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps(value))  # which is YAML too
        return path

    return write


WANDA = {"wanda": {"sparsity": 0.5}}
MAGNITUDE = {"magnitude": {"sparsity": 0.5}}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")


def index_names_a_missing_shard(model: Path) -> None:
    weights = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def poison(value: float) -> Damage:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return lambda model: edit_weights(model, edit)


def smaller_tokenizer(model: Path) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(40)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)


def wider_tokenizer(model: Path) -> None:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)


DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated": (truncate, ("model.safetensors is damaged or truncated",)),
    "no safetensors at all": (
        lambda model: (model / "model.safetensors").write_bytes(os.urandom(64)),
        ("model.safetensors is damaged or truncated",),
    ),
    "empty weights": (
        lambda model: (model / "model.safetensors").write_bytes(b""),
        ("model.safetensors is damaged or truncated",),
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), ("holds no weights: no *.safetensors file",)),
    "a pickle": (only_pickles, ("holds its weights as a pickle (pytorch_model.bin)", "convert it to safetensors")),
    "a missing shard": (
        index_names_a_missing_shard,
        ("is incomplete: model-00002-of-00002.safetensors is missing",),
    ),
    "a damaged index": (
        lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        ("model.safetensors.index.json is not a valid index of shards",),
    ),
    "an index of numbers": (
        lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "x"}}'),
        ("is incomplete: 1 is missing",),
    ),
    "NaN": (poison(float("nan")), ("hold NaN or infinite values: model.layers.1.mlp.up_proj.weight",)),
    "Inf": (poison(float("inf")), ("hold NaN or infinite values: model.layers.1.mlp.up_proj.weight",)),
    "a missing tensor": (
        lambda model: edit_weights(model, lambda t: t.pop("model.layers.0.self_attn.q_proj.weight")),
        ("are incomplete: model.layers.0.self_attn.q_proj.weight is not in its files",),
    ),
    "another shape": (
        lambda model: edit_json(model / "config.json", intermediate_size=64),
        ("do not fit its config.json: model.layers.0.mlp.down_proj.weight has another shape",),
    ),
    "more layers": (
        lambda model: edit_json(model / "config.json", num_hidden_layers=3),
        ("are incomplete: model.layers.2.", " and 8 more are not in its files"),
    ),
    "fewer layers": (
        lambda model: edit_json(model / "config.json", num_hidden_layers=1),
        ("do not fit its config.json: it has no place for model.layers.1.",),
    ),
    "no config": (lambda model: (model / "config.json").unlink(), ("is not a checkpoint: it has no config.json",)),
    "half a config": (lambda model: (model / "config.json").write_text('{"model'), ("cannot be read", "config.json")),
    "a config that is a list": (lambda model: (model / "config.json").write_text("[]"), ("cannot be read",)),
    "a config that is a number": (lambda model: (model / "config.json").write_text("3"), ("cannot be read",)),
    "a size that is a word": (
        lambda model: edit_json(model / "config.json", hidden_size="wide"),
        ("cannot be read", "hidden_size", "'wide'"),
    ),
    "no heads": (lambda model: edit_json(model / "config.json", num_attention_heads=0), ("cannot be read",)),
    "an unknown activation": (lambda model: edit_json(model / "config.json", hidden_act="x"), ("KeyError: 'x'",)),
    "an unknown dtype": (lambda model: edit_json(model / "config.json", dtype="x"), ("cannot be read", "'x'")),
    "an unknown family": (lambda model: edit_json(model / "config.json", model_type="llamo"), ("llamo",)),
    "a tokenizer of another model": (
        wider_tokenizer,
        ("does not match its model: its ids go up to 160, the model has 160 embeddings",),
    ),
    "a tokenizer of a smaller model": (
        smaller_tokenizer,
        ("the tokenizer of", "does not match its model: it knows 40 tokens, the model has 160 embeddings"),
    ),
    "half a tokenizer": (
        lambda model: (model / "tokenizer.json").write_text('{"version": "1.0", "model"'),
        ("the tokenizer of", "cannot be loaded"),
    ),
    "a tokenizer that is a list": (lambda model: (model / "tokenizer.json").write_text("[]"), ("the tokenizer of",)),
    "half a tokenizer config": (lambda model: (model / "tokenizer_config.json").write_text("{"), ("the tokenizer of",)),
    "half a record": (
        lambda model: (model / RECORD).write_text('{"format": 1, "steps": ['),
        ("intaglio.json is not a record of Intaglio: Invalid JSON",),
    ),
    "a record of another kind": (
        lambda model: (model / RECORD).write_text('{"format": 1, "steps": [{"slug": 3}]}'),
        ("intaglio.json is not a record of Intaglio: steps.0.slug",),
    ),
    "a record of the future": (
        lambda model: (model / RECORD).write_text('{"format": 2}'),
        ("intaglio.json is not a record of Intaglio: format",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(
    damage: str, model: Path, recipe: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, culprits = DAMAGES[damage]
    make(model)
    sentence = refusal(lambda: load(model), str(model), *culprits)
    out = tmp_path / "out"
    assert cli_refusal(tmp_path, "carve", model, "-r", recipe(MAGNITUDE), "-o", out) == sentence
    assert cli_refusal(tmp_path, "generate", model, "the fox") == sentence
    assert capfd.readouterr() == ("", "")  # and the libraries below say nothing on their own


def test_a_pickle_is_never_opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    only_pickles(model)
    refusal(lambda: load(model), "pickle")
    assert not (model / "marker").exists()


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig): model_type = "evil"
class M(LlamaForCausalLM): config_class = C
class T(PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): return None
"""


@pytest.mark.parametrize("family", ["evil", "llama"])
def test_code_in_a_checkpoint_is_never_run(model: Path, family: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (model / "custom_generate").mkdir()
    for file in ("evil.py", "custom_generate/generate.py"):
        (model / file).write_text(EVIL.format(marker=str(marker)))
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    edit_json(model / "config.json", model_type=family, auto_map=code)
    edit_json(model / "tokenizer_config.json", auto_map=code)
    if family == "evil":
        says = "it needs its own code (auto_map in its config.json), which is never run"
        refusal(lambda: load(model), f"the model '{model}' cannot be read: {says}")
    else:  # a family that the stock library has: its own code is used
        assert generate(load(model), "the fox", max_new_tokens=2)["new_tokens"] == 2
    assert not marker.exists()


# What is refused, by what: `load` where it is no text model at all, else whatever takes it apart.
UNSUPPORTED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "t5": (AutoModel, {"vocab_size": 160, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "t5"),
    "audio-spectrogram-transformer": (
        AutoModel,
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_length": 32, "num_mel_bins": 16},
        "audio-spectrogram-transformer",
    ),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_an_unsupported_family(family: str, recipe: Write, tmp_path: Path, corpus_file: Path) -> None:
    auto, sizes, culprit = UNSUPPORTED[family]
    place = tmp_path / "model"
    auto.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(place)
    tiny_tokenizer("llama").save_pretrained(place)
    path = recipe(MAGNITUDE)
    commands = [
        ("carve", place, "-r", path, "-o", tmp_path / "out"),
        ("carve", place, "-r", path, "--dry-run"),
        ("compare", place, place, "--texts", corpus_file, "--samples", "2", "--length", "16"),
    ]
    if auto is AutoModel:  # generation needs no linear layers
        commands.append(("generate", place, "the fox"))
    for words in commands:
        assert repr(culprit) in cli_refusal(tmp_path, *words)
    refusal(lambda: Magnitude(sparsity=0.5).apply(load(place)), repr(culprit))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "the model's name is empty; accepted: a bundled name, a directory, a hub id (user/name)"),
        ("./none", "the model './none' does not exist: no such directory"),
        ("/none/at/all", "the model '/none/at/all' does not exist: no such directory"),
        (
            "smolm",
            "the model 'smolm' is no directory and no bundled name (smollm2, minilm, splade-tiny, efficientnet-lite0);"
            " a hub id is user/name",
        ),
        ("user/none", "the model 'user/none' is no directory here and cannot be had from the hub"),
        ("user/none@v1", "the model 'user/none@v1' is no directory here and cannot be had from the hub"),
        ("user/none@", "the model 'user/none@' names no revision after its @; accepted: user/name@revision"),
        ("smollm2@v1", "the model 'smollm2@v1' is a bundled name with a revision; only a hub id has one"),
        ("not a name/x", "the model 'not a name/x' is no directory here and cannot be had from the hub"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("a\0b", "the model 'a\\x00b' is no directory and no bundled name"),
    ],
)
def test_a_missing_model(name: str, says: str, recipe: Write, tmp_path: Path) -> None:
    refusal(lambda: load(name), says)
    assert says in cli_refusal(tmp_path, "carve", name, "-r", recipe(MAGNITUDE), "-o", tmp_path / "out")
    assert says in cli_refusal(tmp_path, "carve", name, "-r", recipe(MAGNITUDE), "--dry-run")


def test_a_file_is_no_model(model: Path) -> None:
    refusal(lambda: load(model / "model.safetensors"), "is a file; give the directory that holds it")


def test_no_model_is_named(recipe: Write, tmp_path: Path) -> None:
    refusal(lambda: carve(Recipe.read(recipe(MAGNITUDE)), tmp_path / "out"), "no model is given")
    assert "no model is given" in cli_refusal(tmp_path, "carve", "-r", recipe(MAGNITUDE), "-o", tmp_path / "out")


# --- recipes (test_recipe.py has the rest) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"wanda": {"sparsity": 1.5}}, "steps[0].wanda.sparsity: 1.5 is not accepted, it should be less than 1"),
        ({"wanda": {"pattern": "3:2"}}, "steps[0].wanda.pattern: '3:2' keeps 3 of 2; accepted: N:M"),
        ({"wand": {"sparsity": 0.5}}, "steps[0]: there is no method named 'wand'; did you mean wanda?"),
        ({"wanda": {"pattern": "2:3"}}, "the pattern 2:3 does not fit layers.0.self_attn.q_proj: its 32 inputs"),
        ({"magnitude": {"pattern": "2:3"}}, "the pattern 2:3 does not fit"),
        ({"sparsegpt": {"pattern": "2:3"}}, "the pattern 2:3 does not fit"),
        ({"dsnot": {"pattern": "2:3"}}, "the pattern 2:3 does not fit"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_an_amount_that_cannot_be(
    step: dict[str, Any], says: str, dry: bool, tiny_dir: TinyDir, recipe: Write, tmp_path: Path
) -> None:
    words = ["carve", tiny_dir("llama"), "-r", recipe(step), *(["--dry-run"] if dry else ["-o", tmp_path / "out"])]
    assert says in cli_refusal(tmp_path, *words)


@pytest.mark.parametrize(
    "content", [b"\x00\x01\x02GGUF", b"\xff\xfe", b"steps: !!python/object/apply:os.getpid []", b""]
)
def test_a_recipe_that_is_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert str(path) in cli_refusal(tmp_path, "carve", "smollm2", "-r", path, "-o", tmp_path / "out")


def test_words_that_are_missing_or_wrong(model: Path, recipe: Write, tmp_path: Path) -> None:
    path, out = recipe(MAGNITUDE), tmp_path / "out"
    assert "a recipe is missing" in cli_refusal(tmp_path, "carve", model, "-o", out)
    assert "an output directory is missing" in cli_refusal(tmp_path, "carve", model, "-r", path)
    assert "cannot read" in cli_refusal(tmp_path, "carve", model, "-r", tmp_path / "none.yaml", "-o", out)
    assert "Is a directory" in cli_refusal(tmp_path, "carve", model, "-r", tmp_path, "-o", out)
    words = ("carve", model, "-r", path, "-o", out)
    assert "the device 'gpu' is unknown" in cli_refusal(tmp_path, *words, "--device", "gpu")
    assert "the device 'gpu' is unknown" in cli_refusal(tmp_path, *words, "--device", "gpu", "--dry-run")
    assert "the dtype 'half' is unknown" in cli_refusal(tmp_path, *words, "--dtype", "half")
    assert "seed: -1 is not accepted" in cli_refusal(tmp_path, *words, "--seed", "-1")
    assert "there is no method named 'wand'" in cli_refusal(tmp_path, "show", "wand")
    assert "there is no area named 'weigths'; did you mean weights?" in cli_refusal(
        tmp_path, "list", "--area", "weigths"
    )
    assert "no bundled asset is called 'smolm'" in cli_refusal(tmp_path, "assets", "smolm")


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", b"", "t.txt' hold no document"),
        ("t.txt", b" \n\n\t\n", "t.txt' hold no document"),
        ("t.jsonl", b"", "t.jsonl' hold no document"),
        ("t.txt", b"a\0b", "t.txt are binary"),
        ("t.txt", b"\xff\xfe", "t.txt are not UTF-8"),
        ("t.jsonl", b'{"txt": "a"}\n', "has no field 'text'; it has: txt"),
        ("t.jsonl", b"{\n", "line 1 of"),
        ("t.txt", b"one document", "have too few documents (1) to be split"),
    ],
)
def test_a_corpus_that_is_none(
    name: str, content: bytes, says: str, tiny_dir: TinyDir, recipe: Write, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    texts = {"texts": str(path), "samples": 2, "length": 16}
    made = recipe(WANDA, calibration=texts, measure=texts)
    assert says in cli_refusal(tmp_path, "carve", tiny_dir("llama"), "-r", made, "-o", tmp_path / "out")
    assert says in cli_refusal(tmp_path, "carve", tiny_dir("llama"), "-r", made, "--dry-run")


def test_texts_that_are_not_there(tiny_dir: TinyDir, recipe: Write, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    made = recipe(WANDA, calibration={"texts": "none.txt"})
    assert "'none.txt' are no file, no folder and no bundled name: accepted: stdlib, wikipedia" in cli_refusal(
        tmp_path, "carve", tiny_dir("llama"), "-r", made, *out
    )
    made = recipe(WANDA, calibration={"texts": "wikipedia"})
    assert "run `intaglio assets` first" in cli_refusal(tmp_path, "carve", tiny_dir("llama"), "-r", made, *out)


def test_texts_that_are_too_short(tiny_dir: TinyDir, recipe: Write, corpus_file: Path, tmp_path: Path) -> None:
    made = recipe(WANDA, calibration={"texts": str(corpus_file), "samples": 100_000, "length": 32})
    said = cli_refusal(tmp_path, "carve", tiny_dir("llama"), "-r", made, "-o", tmp_path / "out")
    assert "segments of 32 tokens, 100000 are needed; give more text" in said
    count = int(said.partition(" give ")[2].split()[0])
    assert 100 < count < 100_000


def test_a_model_without_tokenizer_has_no_texts(recipe: Write, tmp_path: Path) -> None:
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "model")
    said = cli_refusal(tmp_path, "carve", tmp_path / "model", "-r", recipe(MAGNITUDE), "-o", tmp_path / "out")
    assert said.endswith("has no tokenizer, so no text can be measured")
    refusal(
        lambda: Wanda(sparsity=0.5).apply(load(tmp_path / "model"), ["a text"]), "only be calibrated with token ids"
    )


def test_calibration_data_that_is_none(tiny_dir: TinyDir) -> None:
    def apply(data: Any) -> Any:
        return Wanda(sparsity=0.5).apply(load(tiny_dir("llama")), data)

    refusal(lambda: apply(None), "calibration data is missing")
    refusal(lambda: apply(torch.full((1, 8), 160)), "token id 160 is outside the model's vocabulary of 160")
    refusal(lambda: apply(torch.zeros(1, 129, dtype=torch.long)), "more than the model's context of 128")
    refusal(lambda: apply(torch.zeros(1, 8)), "token ids must be integers")
    refusal(lambda: apply(torch.zeros(0, 8, dtype=torch.long)), "segments need int64 token ids of shape")
    refusal(lambda: apply([]), "hold no document")
    refusal(lambda: apply([1, 2]), "texts[0] is int; every text must be a string")
    refusal(lambda: apply(3), "texts is int; accepted: a name, a path, a list of strings, a Corpus")


def test_activations_that_overflow(model: Path, recipe: Write, tmp_path: Path) -> None:
    edit_weights(model, lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(1e38))
    said = cli_refusal(tmp_path, "carve", model, "-r", recipe(WANDA), "-o", tmp_path / "out")
    assert "the activations after block 0 are not finite: the weights or the calibration data overflow" in said


# --- the disk --------------------------------------------------------------------------------------------------------


def test_an_output_that_is_taken(model: Path, recipe: Write, tmp_path: Path) -> None:
    words = ("carve", model, "-r", recipe(MAGNITUDE), "-o")
    (tmp_path / "file").write_text("mine")
    assert "exists and is not a directory" in cli_refusal(tmp_path, *words, tmp_path / "file")
    assert "file is not a directory" in cli_refusal(tmp_path, *words, tmp_path / "file" / "out")
    assert "model exists and is not empty" in cli_refusal(tmp_path, *words, model)
    assert "model exists and is not empty" in cli_refusal(tmp_path, *words, model, "--dry-run")
    # --overwrite replaces an earlier result, and nothing else that a user has.
    assert "is not the result of a carve" in cli_refusal(tmp_path, *words, model, "--overwrite")
    assert (tmp_path / "file").read_text() == "mine"


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The system refuses to make a file longer than this: a disk error that no mock stands for."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_has_no_room_for_the_weights(model: Path, recipe: Write, tmp_path: Path) -> None:
    path, out = recipe(MAGNITUDE), tmp_path / "out"
    checkpoint = load(model)
    with file_size_limit(20_000):
        said = cli_refusal(tmp_path, "carve", model, "-r", path, "-o", out)
        refusal(lambda: checkpoint.save(out), f"cannot write {out}", "File too large")
    assert "cannot write" in said
    assert "File too large" in said
    assert "nothing half-written was left" in said


@contextmanager
def failing(name: str, at: int, number: int) -> Iterator[list[int]]:
    """Let the `at`-th call of a function of `os` in the writer fail with this errno; counts the calls."""
    original, calls = getattr(os, name), [0]

    def call(*words: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(number, os.strerror(number), str(words[0]))
        return original(*words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_io.os, name, call)
        yield calls


@pytest.mark.parametrize("name", ["fsync", "rename", "replace"])
@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")]
)
def test_a_disk_that_refuses_at_any_call_of_a_carve(
    name: str, number: int, says: str, model: Path, recipe: Write, tmp_path: Path
) -> None:
    path = recipe(MAGNITUDE, {"magnitude": {"pattern": "2:4"}})
    words = ["carve", str(model), "-r", str(path), "-o"]
    with failing(name, 0, number) as calls:  # unbroken, to count
        assert CliRunner().invoke(app, [*words, str(tmp_path / "whole")]).exit_code == 0
    assert calls[0] >= 2
    digest = weights_digest(tmp_path / "whole")
    for at in sorted({1, calls[0] // 2, calls[0]}):
        place = tmp_path / f"at-{at}"
        out = place / "out"
        place.mkdir()
        with failing(name, at, number):
            found = CliRunner().invoke(app, [*words, str(out)])
        assert found.exit_code == 2, found.stderr
        assert (found.stdout, found.stderr.count("\n")) == ("", 1)
        assert says in found.stderr
        # OUT is absent, or the very last call failed and it is whole; what waits beside it is for --resume.
        assert set(os.listdir(place)) <= ({".out.carving"} if not out.exists() else {"out", ".out.carving"})
        if not out.exists():
            again = CliRunner().invoke(app, [*words, str(out), "--resume"])
            assert again.exit_code == 0, again.stderr
            assert os.listdir(place) == ["out"]
        assert weights_digest(out) == digest
        assert (out / "report.json").exists()


def test_a_scratch_directory_that_cannot_be_made(model: Path, recipe: Write, tmp_path: Path) -> None:
    path = recipe(MAGNITUDE)
    (tmp_path / ".out.carving").write_text("in the way")
    assert "cannot write" in cli_refusal(tmp_path, "carve", model, "-r", path, "-o", tmp_path / "out")


def test_a_page_that_cannot_be_written(tiny_dir: TinyDir, corpus_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    words = ("--texts", corpus_file, "--samples", "2", "--length", "16", "-o", tmp_path / "file" / "page.html")
    assert "file is not a directory" in cli_refusal(tmp_path, "compare", tiny_dir("llama"), tiny_dir("llama"), *words)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["the fox " * 100], "tokens are more than the model's context of 128"),
        (["the fox", "--max-new-tokens", "128"], "in the context of 128; max_new_tokens is 128"),
        ([""], "the prompt is empty"),
        (["the fox", "--decoder", "beam"], "there is no decoder named 'beam'; accepted: greedy, sample"),
        (["the fox", "--decoder", "sample", "--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["the fox", "--decoder", "sample", "--temperature", "-1"], "temperature is -1.0; it must be above 0"),
        (["the fox", "--decoder", "sample", "--temperature", "nan"], "temperature is nan; it must be above 0"),
        (["the fox", "--decoder", "sample", "--temperature", "inf"], "temperature is inf; it must be"),
        (["the fox", "--decoder", "sample", "--top-p", "2"], "top_p is 2.0; it must be above 0 and at most 1"),
        (["the fox", "--decoder", "sample", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["the fox", "--temperature", "2"], "temperature has no effect on the decoder greedy"),
        (["half a \ud800 character"], "half a character"),
    ],
)
def test_a_prompt_that_cannot_be(options: list[str], says: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    assert says in cli_refusal(tmp_path, "generate", tiny_dir("llama"), *options)


def test_a_prompt_beyond_what_the_tokenizer_expects_is_one_sentence(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", model_max_length=128)
    command = [sys.executable, "-m", "intaglio", "generate", str(model), "the fox " * 100]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)


def test_a_warning_is_one_line(tiny_dir: TinyDir, recipe: Write, tmp_path: Path) -> None:
    made = recipe({"dsnot": {"sparsity": 0.5, "max_cycles": 9, "same_sign": False}})
    found = CliRunner().invoke(app, ["carve", str(tiny_dir("llama")), "-r", str(made), "-o", str(tmp_path / "out")])
    assert found.exit_code == 0
    assert found.stderr.startswith("warning: dsnot: 9 cycles are over 5 % of the")
    assert found.stderr.count("\n") == 1


def test_a_prompt_that_is_no_text(tiny_dir: TinyDir, tmp_path: Path) -> None:
    said = cli_refusal(tmp_path, "generate", tiny_dir("llama"), "-", stdin=b"a\xffb")
    assert said == "the prompt on stdin is not text: byte 1 is not UTF-8"


def test_top_k_of_nothing(tiny_dir: TinyDir) -> None:
    refusal(
        lambda: generate(load(tiny_dir("llama")), "a", decoder="sample", top_k=0), "top_k is 0; it must be at least 1"
    )


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_an_encoder_does_not_generate(family: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    assert "is an encoder; it does not generate" in cli_refusal(tmp_path, "generate", tiny_dir(family), "the fox")


def test_a_chat_without_a_template(model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "the fox", "--chat")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    assert "the chat template of" in cli_refusal(tmp_path, *words)
    (model / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    assert "cannot be used: no users here" in cli_refusal(tmp_path, *words)
    (model / "chat_template.jinja").unlink()
    assert "has no chat template; leave --chat out" in cli_refusal(tmp_path, *words)


def test_a_model_without_tokenizer_reads_no_prompt(tmp_path: Path) -> None:
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "model")
    assert "has no tokenizer, so it cannot read a prompt" in cli_refusal(tmp_path, "generate", tmp_path / "model", "a")


# --- beside the boundaries -------------------------------------------------------------------------------------------


def test_checkpoints_that_cannot_be_compared(tiny_dir: TinyDir, tmp_path: Path, corpus_file: Path) -> None:
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "model")
    refusal(lambda: compare(str(tmp_path / "model"), str(tiny_dir("llama"))), "bundled texts 'wikipedia' is not in")
    words = ("--texts", corpus_file, "--samples", "2", "--length", "16")
    for pair in ((tmp_path / "model", tiny_dir("llama")), (tiny_dir("llama"), tmp_path / "model")):
        said = cli_refusal(tmp_path, "compare", *pair, *words)
        assert said == f"{tmp_path / 'model'} has no tokenizer, so no text can be measured"


def test_segments_that_are_none() -> None:
    refusal(lambda: Segments(torch.zeros(2, 3)), "segments need int64 token ids")


def test_a_dry_run_needs_a_model(recipe: Write) -> None:
    refusal(lambda: plan(Recipe.read(recipe(MAGNITUDE))), "no model is given")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 2, "error: this machine has too little memory for that"),
        (OSError(errno.EIO, "Input/output error", "a\nb"), 2, "error: Input/output error: a\\nb"),
        (KeyboardInterrupt(), 130, "interrupted; carve resumes with --resume"),
        (RuntimeError("first\nsecond"), 70, "error: a defect of intaglio, please report it: RuntimeError: first ("),
    ],
)
def test_whatever_else_goes_wrong_is_one_line_too(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(slug: str) -> Any:
        raise error

    monkeypatch.setattr("intaglio.methods.registry.get_method", fail)
    found = CliRunner().invoke(app, ["show", "wanda"])
    assert found.exit_code == code
    assert found.stderr.startswith(says)
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""


def test_a_defect_shows_where_it_came_from_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(slug: str) -> Any:
        raise RuntimeError("inside")

    monkeypatch.setattr("intaglio.methods.registry.get_method", fail)
    monkeypatch.setenv("INTAGLIO_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(app, ["show", "wanda"]).exception, RuntimeError)
