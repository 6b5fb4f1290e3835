"""Checkpoints: what is saved is what is loaded, by us and by the stock library, and nothing is saved half."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.utils import cached_file

import intaglio
from intaglio.checkpoint import (
    LIVE_WEIGHTS,
    RECORD,
    Checkpoint,
    Record,
    load,
    load_config,
    load_tokenizer,
    model_class,
    parse_device,
    parse_dtype,
    weights_digest,
)
from intaglio.checkpoint.resolve import split_revision, stat_fingerprint
from intaglio.environment import PACKAGES, versions
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.aded import ADED
from tests.conftest import TinyDir
from tests.families import EOS, FAMILIES, MAX_POSITIONS, VOCAB, tiny_model, tiny_tokenizer

IDS_BL = torch.arange(5, 45)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS_BL).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_is_loaded(family: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    first = load(tiny_dir(family))
    assert not first.model.training
    assert type(first.model) is type(tiny_model(family, layers=2))
    first.record_step("wanda", {"sparsity": 0.5}, seed=3, calibration={"digest": "x"}, chosen={"swaps": 1})
    assert first.save(tmp_path / "out") == tmp_path / "out"
    again = load(str(tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(first.model))
    assert weights_digest(tmp_path / "out") == weights_digest(tiny_dir(family))
    assert again.tokenizer("the fox")["input_ids"] == first.tokenizer("the fox")["input_ids"]
    assert again.record == first.record
    assert again.kind == "standalone"


def test_the_stock_library_loads_what_is_saved(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = load(tiny_dir("llama"))
    checkpoint.model.generation_config = GenerationConfig(eos_token_id=EOS, max_new_tokens=7)
    checkpoint.save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(checkpoint.model))
    assert model.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == checkpoint.tokenizer.chat_template
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", RECORD} <= files
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_record(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = load(tiny_dir("qwen3"), dtype="bfloat16")
    assert checkpoint.record == Record(source=str(tiny_dir("qwen3")))
    checkpoint.record_step("magnitude", {"sparsity": 0.5})
    checkpoint.record_step("dsnot", {"pattern": "2:4"}, seed=7, calibration={"samples": 4})
    checkpoint.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert [(step["slug"], step["parameters"], step["seed"]) for step in record["steps"]] == [
        ("magnitude", {"sparsity": 0.5}, 0),
        ("dsnot", {"pattern": "2:4"}, 7),
    ]
    assert record["versions"] == versions()
    assert set(record["versions"]) == {"python", *PACKAGES}
    assert "unknown" not in record["versions"].values()
    assert (record["threads"], record["dtype"], record["live"], record["format"]) == (1, "bfloat16", [], 1)
    # A second carving keeps what came before, and where it all came from.
    again = load(tmp_path / "out")
    assert again.record.source == str(tiny_dir("qwen3"))
    again.record_step("wanda", {})
    assert [step.slug for step in again.record.steps] == ["magnitude", "dsnot", "wanda"]


def test_live_parts_make_a_checkpoint_live(tiny_dir: TinyDir) -> None:
    checkpoint = load(tiny_dir("llama"))
    checkpoint.record.live.append({"slug": "x"})
    assert checkpoint.kind == "runtime"


def test_dtypes(tiny_dir: TinyDir) -> None:
    assert load(tiny_dir("llama")).model.dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        assert load(tiny_dir("llama"), dtype=dtype).model.dtype == torch.bfloat16
    assert parse_dtype(None) == parse_dtype("auto") == "auto"
    assert parse_dtype("float16") == torch.float16
    with pytest.raises(IntaglioError, match=r"the dtype 'float8' is unknown; did you mean float"):
        parse_dtype("float8")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device(None) == parse_device("cpu") == torch.device("cpu")
    with pytest.raises(IntaglioError, match="the device 'gpu' is unknown; accepted: cpu, cuda, cuda:N, mps"):
        parse_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IntaglioError, match="the device cuda is not available on this machine"):
        parse_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(IntaglioError, match="the device cuda:2 is not available"):
        parse_device("cuda:2")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "bert"])
def test_sizes(family: str, tiny_dir: TinyDir) -> None:
    checkpoint = load(tiny_dir(family))
    assert checkpoint.context == MAX_POSITIONS
    assert checkpoint.device == torch.device("cpu")
    assert checkpoint.config.hidden_size == 32
    tied = VOCAB * 32 * 4 if FAMILIES[family].tied else 0
    every = sum(t.numel() * 4 for t in checkpoint.model.state_dict().values() if t.is_floating_point())
    assert checkpoint.bytes <= every - tied


def attached(tiny_dir: TinyDir, path: Path) -> Checkpoint:
    """A checkpoint with a table, saved and loaded."""
    checkpoint = ADED(nodes=7, draft_cost=0.0).fit(
        load(tiny_dir("llama")), ["the quick brown fox jumps over the lazy dog"] * 2
    )
    checkpoint.save(path)
    return load(path)


def test_an_attachment_stays_with_its_checkpoint(tiny_dir: TinyDir, tmp_path: Path) -> None:
    first = attached(tiny_dir, tmp_path / "a")
    found = first.attachments["aded"]
    assert found.base == weights_digest(tmp_path / "a") == weights_digest(tiny_dir("llama"))
    assert found.step == 0
    first.save(tmp_path / "b")
    again = load(tmp_path / "b").attachments["aded"]
    assert (again.parameters, again.about, again.base) == (found.parameters, found.about, found.base)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in found.tensors.items())
    both = [tmp_path / name / "attachments" / "aded.safetensors" for name in "ab"]
    assert both[0].read_bytes() == both[1].read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")  # the stock library does not mind


def test_a_decoder_comes_with_what_was_fitted(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = attached(tiny_dir, tmp_path / "a")
    decoder = checkpoint.decoder("aded", length=3)
    assert (decoder.nodes, decoder.length) == (7, 3)
    ids = checkpoint.tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
    options: dict[str, Any] = {**ids, "do_sample": False, "max_new_tokens": 9}
    expected = checkpoint.model.generate(**options)
    assert torch.equal(checkpoint.model.generate(**options, custom_generate=decoder), expected)
    assert decoder.table(checkpoint.model).keys_R.tolist() == checkpoint.attachments["aded"].tensors["keys"].tolist()
    # Fitted here and not saved yet.
    fresh = ADED().fit(load(tiny_dir("llama")), ["the quick brown fox"])
    assert len(fresh.decoder("aded").table(fresh.model)) > 0


def test_an_attachment_of_other_weights_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    attached(tiny_dir, tmp_path / "a")
    tiny_model("llama", layers=2, seed=1).save_pretrained(tmp_path / "a")
    with pytest.raises(IntaglioError, match=r"aded of .* belongs to other weights than those beside it; fit it again"):
        load(tmp_path / "a").decoder("aded")
    # Neither saving it again nor another dtype makes it fit.
    for dtype in (None, "bfloat16"):
        load(tmp_path / "a", dtype=dtype).save(tmp_path / f"b-{dtype}")
        with pytest.raises(IntaglioError, match="belongs to other weights"):
            load(tmp_path / f"b-{dtype}").decoder("aded")


def test_an_attachment_of_another_vocabulary_is_refused_for_that(tiny_dir: TinyDir, tmp_path: Path) -> None:
    attached(tiny_dir, tmp_path / "a")
    changed = load(tmp_path / "a")
    rows = changed.vocabulary
    changed.model.resize_token_embeddings(rows + 3, mean_resizing=False)
    changed.save(tmp_path / "b")
    with pytest.raises(
        IntaglioError, match=f"a vocabulary of {rows} tokens, and the weights beside it have {rows + 3}"
    ):
        load(tmp_path / "b").decoder("aded")


def test_an_attachment_that_a_carving_left_behind_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    checkpoint = attached(tiny_dir, tmp_path / "a")
    checkpoint.record_step("magnitude", {})
    with pytest.raises(IntaglioError, match="aded was fitted before magnitude changed the weights; fit it again"):
        checkpoint.decoder("aded")


def test_decoders_that_are_not_there(tiny_dir: TinyDir) -> None:
    checkpoint = load(tiny_dir("llama"))
    with pytest.raises(IntaglioError, match=r"nothing of aded is attached to .*; a recipe with the step fit: \{aded:"):
        checkpoint.decoder("aded")
    with pytest.raises(IntaglioError, match="wanda is no decoder that is fitted to a checkpoint; accepted: aded"):
        checkpoint.decoder("wanda")
    with pytest.raises(IntaglioError, match=r"there is no method named 'adad'; did you mean aded"):
        checkpoint.decoder("adad")


def test_damaged_attachments(tiny_dir: TinyDir, tmp_path: Path) -> None:
    attached(tiny_dir, tmp_path / "a")
    path = tmp_path / "a" / "attachments" / "aded.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(IntaglioError, match="is damaged or truncated"):
        load(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "model.safetensors", path)
    with pytest.raises(IntaglioError, match="is not an attachment of Intaglio; a fit step of a recipe makes one"):
        load(tmp_path / "a")
    path.rename(path.with_name("other.safetensors"))
    path.with_name("other.safetensors").write_bytes(content)
    with pytest.raises(IntaglioError, match=r"is the attachment of aded; its name must be aded\.safetensors"):
        load(tmp_path / "a")


def test_ids_are_checked(tiny_dir: TinyDir) -> None:
    checkpoint = load(tiny_dir("llama"))
    checkpoint.check_ids(torch.tensor([[0, VOCAB - 1]]))
    with pytest.raises(IntaglioError, match="token id 160 is outside the model's vocabulary of 160"):
        checkpoint.check_ids(torch.tensor([[0, VOCAB]]))
    with pytest.raises(IntaglioError, match="token id -1 is outside"):
        checkpoint.check_ids(torch.tensor([[0, -1]]))
    with pytest.raises(IntaglioError, match="129 tokens are more than the model's context of 128"):
        checkpoint.check_ids(torch.zeros(1, 129, dtype=torch.long))


def test_a_model_without_tokenizer_is_loaded(tmp_path: Path) -> None:
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "m")
    checkpoint = load(tmp_path / "m")
    assert checkpoint.tokenizer is None
    checkpoint.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_the_files_of_a_saved_checkpoint_follow_the_umask(tiny_dir: TinyDir, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        load(tiny_dir("llama")).save(tmp_path / "out")
    finally:
        os.umask(old)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o644"}, modes


def test_a_model_of_sentence_transformers_stays_one(tiny_dir: TinyDir, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_dir("bert"), tmp_path / "in")
    beside = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../secret"}]),
        "sentence_bert_config.json": '{"max_seq_length": 128}',
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "../secret/config.json": "{}",
        "1_Pooling/pytorch_model.bin": "a pickle",
    }
    for name, text in beside.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    checkpoint = load(place)
    shutil.rmtree(place)
    checkpoint.save(tmp_path / "out")
    kept = {name for name in beside if (tmp_path / "out" / name).exists()} - {"../secret/config.json"}
    assert kept == {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert set(checkpoint.companions) == kept
    (tmp_path / "out" / "modules.json").write_text("{")
    with pytest.raises(IntaglioError, match="is not a list of modules"):
        load(tmp_path / "out")


def test_a_taken_directory_is_not_written(tiny_dir: TinyDir, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(IntaglioError, match="exists and is not empty"):
        load(tiny_dir("llama")).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(IntaglioError, match="exists and is not a directory"):
        load(tiny_dir("llama")).save(tmp_path / "mine", overwrite=True)


def test_shards_are_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(tmp_path / "m").model), logits(model))
    assert len(weights_digest(tmp_path / "m")) == 64


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_a_bundled_name_that_was_not_fetched(name: str) -> None:
    with pytest.raises(IntaglioError, match=rf"the bundled model '{name}' is not in .*; run `intaglio assets` first"):
        load(name)


def test_a_directory_wins_over_a_bundled_name(
    tiny_dir: TinyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_dir("llama"), tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert load("smollm2").config.hidden_size == 32


@pytest.mark.parametrize(
    ("x", "revision", "found"),
    [
        ("user/name", None, ("user/name", None)),
        ("user/name", "v1", ("user/name", "v1")),
        ("user/name@v1", None, ("user/name", "v1")),
        ("user/name@v1", "v1", ("user/name", "v1")),
        (Path("user/name@v1"), None, ("user/name", "v1")),
        ("user/name@refs/pr/3", None, ("user/name", "refs/pr/3")),
        ("name@v1@2", None, ("name", "v1@2")),
        ("./user@home", None, ("./user@home", None)),
        ("/runs/user@home", None, ("/runs/user@home", None)),
        ("runs/1/user@home", None, ("runs/1/user@home", None)),
    ],
)
def test_a_name_and_its_revision(x: Any, revision: str | None, found: tuple[str, str | None]) -> None:
    assert split_revision(x, revision) == found


def test_revisions_that_are_refused() -> None:
    for name, revision, says in (
        ("user/name@v1", "v2", "the model 'user/name@v1' is given with another revision, 'v2'; give only one"),
        ("user/name@", None, "the model 'user/name@' names no revision after its @; accepted: user/name@revision"),
        ("smollm2@v1", None, "the model 'smollm2@v1' is a bundled name with a revision; only a hub id has one"),
        ("@v1", None, "the model's name is empty"),
        ("smollm2", "v1", "the model 'smollm2' is a bundled name, which has no revision 'v1'; only a hub id has"),
    ):
        for read in (load, load_config):
            with pytest.raises(IntaglioError, match=says):
                read(name, revision=revision)


def test_a_directory_with_an_at_sign(tiny_dir: TinyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_dir("llama"), tmp_path / "user" / "name@v1")
    monkeypatch.chdir(tmp_path)
    assert load("user/name@v1").record.source == "user/name@v1"
    assert stat_fingerprint("user/name@v1") == stat_fingerprint(tmp_path / "user" / "name@v1") != ""
    with pytest.raises(IntaglioError, match="the model 'user@v1' is a directory with a revision; only a hub id has"):
        load("user@v1")
    with pytest.raises(IntaglioError, match="user/name@v1' is a directory, which has no revision 'v1'; only a hub id"):
        load("user/name@v1", revision="v1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of `user/name`, `v1` and `refs/pr/3`; there is no main branch."""
    place = tmp_path / "hub" / "models--user--name"
    for commit, revision in (("1" * 40, "v1"), ("3" * 40, "refs/pr/3")):
        (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        tiny_model("llama", layers=2, seed=int(commit[0])).save_pretrained(place / "snapshots" / commit)
        tiny_tokenizer("llama").save_pretrained(place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.parent))
    return place


def test_a_pinned_model_of_the_hub(hub: Path, tmp_path: Path) -> None:
    for pin, commit in (("v1", "1" * 40), ("refs/pr/3", "3" * 40)):
        name = f"user/name@{pin}"
        for checkpoint in (load(name), load("user/name", revision=pin)):
            assert torch.equal(logits(checkpoint.model), logits(load(hub / "snapshots" / commit).model))
            assert (checkpoint.source, checkpoint.record.source) == (name, name)
            assert load_tokenizer(checkpoint.model.name_or_path).get_vocab() == checkpoint.tokenizer.get_vocab()
        assert load_config(name)[0] == "user/name"
        assert stat_fingerprint(name) == ""
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").record.source == name
    assert "user/name@" not in (tmp_path / "out" / "config.json").read_text()
    for name in ("user/name@v2", "user/name"):
        with pytest.raises(
            IntaglioError, match=f"the model '{name}' is no directory here and cannot be had from the hub"
        ):
            load(name)


def test_every_file_of_a_pinned_model_is_asked_for_by_its_revision(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str | None]] = {}

    def noting(name: str, ask: Any) -> Any:
        def noted(*words: Any, **options: Any) -> Any:
            asked.setdefault(name, set()).add(options.get("revision"))
            return ask(*words, **options)

        return noted

    for owner in (AutoConfig, AutoTokenizer, LlamaForCausalLM):
        monkeypatch.setattr(owner, "from_pretrained", noting(owner.__name__, owner.from_pretrained))
    for module in ("resolve", "loading", "record"):
        place = f"intaglio.checkpoint.{module}.cached_file"
        monkeypatch.setattr(place, noting(module, cached_file))
    config = hub / "snapshots" / ("1" * 40) / "config.json"
    load("user/name@v1")
    assert asked == {name: {"v1"} for name in ("AutoConfig", "AutoTokenizer", "LlamaForCausalLM", "resolve")}
    # A live one has more files.
    config.write_text(config.read_text().replace('"model_type": "', '"model_type": "intaglio_'))
    config.with_name("model.safetensors").rename(config.with_name(LIVE_WEIGHTS))
    with pytest.raises(IntaglioError, match="names no live part"):
        load("user/name@v1")
    assert asked["loading"] == asked["record"] == {"v1"}


def test_classes(tiny_dir: TinyDir) -> None:
    source, config = load_config(tiny_dir("bert"))
    assert source == str(tiny_dir("bert"))
    assert model_class(config, "x").__name__ == "BertForMaskedLM"
    config.architectures = ["BertModel"]  # as in sentence encoders: no head in the file
    assert model_class(config, "x").__name__ == "BertModel"
    config.architectures = None
    assert model_class(load_config(tiny_dir("llama"))[1], "x").__name__ == "LlamaForCausalLM"


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    tiny_model("bert", layers=2).bert.save_pretrained(tmp_path / "m")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "m")
    checkpoint = load(tmp_path / "m")
    assert type(checkpoint.model).__name__ == "BertModel"
    checkpoint.save(tmp_path / "out")
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "m")


def test_loading_is_silent_and_leaves_the_generator_alone(
    tiny_dir: TinyDir, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load(tiny_dir("llama")).save(tmp_path / "out")
    assert torch.equal(torch.rand(1), expected)
    assert capfd.readouterr() == ("", "")


def test_the_package_offers_it(tiny_dir: TinyDir) -> None:
    assert intaglio.load is load
    assert isinstance(intaglio.load(tiny_dir("llama")), Checkpoint)
