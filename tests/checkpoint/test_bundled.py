"""Heads that come with the package: found by the model's fingerprint, and by nothing else."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint, load
from intaglio.checkpoint import bundled as package
from intaglio.checkpoint.attachments import Attachment
from intaglio.checkpoint.bundled import MAX_BYTES, ROOT, SHARD_BYTES, bundled_heads, write_bundled
from intaglio.checkpoint.fingerprint import fingerprint
from intaglio.cli.app import app
from intaglio.cli.generate import generate
from intaglio.errors import IntaglioError
from intaglio.methods.decoding.hidden_transfer import HiddenTransfer
from intaglio.methods.weights.magnitude import Magnitude
from tests.families import tiny_checkpoint_dir

ACCEPTANCE = {"prompts": 8, "new_tokens": 64, "nodes": 9, "tokens_a_pass": 1.75, "kinds": {"chat": 1.5, "code": 2.0}}
REPOSITORY = Path(__file__).parents[2]


def heads_for(checkpoint: Checkpoint, **fields: Any) -> Attachment:
    method = HiddenTransfer(**fields)
    tensors = {name: torch.randn(value.shape) / 100 for name, value in method.make(checkpoint.model, 0)
               .state_dict().items()}  # fmt: skip
    prints = {"model": fingerprint(checkpoint.model), "float16": fingerprint(checkpoint.model, torch.float16)}
    about = {**prints, "chances": [[0.5, 0.2], [0.3, 0.1], [0.2, 0.1]]}
    return Attachment("hidden_transfer", tensors, method.model_dump(), 0, about, "base")


def ship_for(checkpoint: Checkpoint, root: Path, **fields: Any) -> package.BundledHeads:
    return write_bundled(heads_for(checkpoint, **fields), "tiny", ACCEPTANCE, root)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint_dir("llama", tmp_path / "model", layers=3)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(package, "ROOT", tmp_path / "shipped")
    return tmp_path / "shipped"


def test_they_are_used_out_of_the_box(model: Path, root: Path) -> None:
    one = ship_for(load(model), root)
    assert bundled_heads("hidden_transfer") == [one]
    assert bundled_heads("chimera") == []
    found = generate(load(model), "the quick", decoder="hidden_transfer", max_new_tokens=12)
    assert found["token_ids"] == generate(load(model), "the quick", max_new_tokens=12)["token_ids"]
    assert found["accepted_share"] is not None
    decoder = load(model).decoder("hidden_transfer", nodes=5)
    assert len(decoder.static_tree()) == 5
    assert decoder._about["chances"] == one.about["chances"]
    words = ["--decoder", "hidden_transfer", "--max-new-tokens", "8", "--json"]
    run = CliRunner().invoke(app, ["generate", str(model), "the quick", *words])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_they_belong_to_a_model_in_every_precision(dtype: str, model: Path, root: Path) -> None:
    ship_for(load(model), root)
    checkpoint = load(model, dtype=dtype)
    ids = torch.tensor([[9, 30, 31, 32]])
    checkpoint.model.generate(ids, max_new_tokens=4, custom_generate=checkpoint.decoder("hidden_transfer"))  # type: ignore[operator]


def test_float16_rounds_otherwise(model: Path) -> None:
    checkpoint = load(model)
    with torch.no_grad():
        checkpoint.model.get_input_embeddings().weight[0, 0] = 1.00390601  # type: ignore[operator]
    half = fingerprint(checkpoint.model, torch.float16)
    assert half != fingerprint(checkpoint.model)
    assert half == fingerprint(checkpoint.model.half())


def test_edited_weights_do_not_get_them(model: Path, root: Path, tmp_path: Path) -> None:
    ship_for(load(model), root)
    carved = load(model)
    Magnitude(sparsity=0.5).apply(carved)
    says = (
        r"nothing of hidden_transfer is attached to .*; a recipe with the step fit: \{hidden_transfer: \{\}\} does "
        r"that; the bundled heads, for unchanged tiny, belong to other weights"
    )
    with pytest.raises(IntaglioError, match=says) as caught:
        carved.decoder("hidden_transfer")
    assert "\n" not in str(caught.value)
    carved.save(tmp_path / "carved")
    with pytest.raises(IntaglioError, match="belong to other weights"):
        load(tmp_path / "carved").decoder("hidden_transfer")
    # Where a carving left every number as it was, the model may still compute something else.
    same = load(model)
    same.record_step("layerwise_unmasking", {})
    with pytest.raises(IntaglioError, match="belong to other weights"):
        same.decoder("hidden_transfer")
    with pytest.raises(IntaglioError, match=r"fit: \{chimera: \{\}\} does that$"):
        same.decoder("chimera")


def test_what_the_user_attached_wins(model: Path, root: Path) -> None:
    checkpoint = load(model)
    ship_for(checkpoint, root)
    own = heads_for(checkpoint, ahead=2)
    checkpoint.record_step("hidden_transfer", own.parameters, verb="fit")
    checkpoint.attach("hidden_transfer", own.tensors, own.parameters, own.about)
    assert checkpoint.decoder("hidden_transfer").ahead == 2
    assert load(model).decoder("hidden_transfer").ahead == 3


def test_they_are_shown(model: Path, root: Path) -> None:
    one = ship_for(load(model), root)
    found = json.loads(CliRunner().invoke(app, ["show", "hidden_transfer", "--json"]).stdout)
    assert found["shipped"] == [{"model": "tiny", "bytes": one.bytes, "acceptance": ACCEPTANCE}]
    said = " ".join(CliRunner().invoke(app, ["show", "hidden_transfer"]).stdout.split())
    assert "heads for tiny come with the package (0.0 MB): 1.75 tokens a pass on 8 held-out prompts" in said
    assert "Shipped" not in CliRunner().invoke(app, ["show", "chimera"]).stdout


def test_they_are_written_small_and_beside_others(model: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load(model)
    (root / "tiny").mkdir(parents=True)
    (root / "tiny" / "chimera.json").write_text("another's")
    monkeypatch.setattr(package, "SHARD_BYTES", 6143)
    with pytest.raises(IntaglioError, match="the tensor change_kDD has 6144 bytes; a file may hold 6143 at the most"):
        ship_for(checkpoint, root)
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["chimera.json"]
    monkeypatch.setattr(package, "SHARD_BYTES", SHARD_BYTES)
    one = ship_for(checkpoint, root)
    assert one.bytes == 3 * 32 * 32 * 2
    again = ship_for(checkpoint, root, ahead=2)
    names = sorted(path.name for path in (root / "tiny").iterdir())
    assert names == ["chimera.json", "hidden_transfer.json", "hidden_transfer.safetensors"]
    assert again.attachment().tensors["change_kDD"].dtype == torch.bfloat16
    monkeypatch.setattr(package, "MAX_BYTES", 100)
    with pytest.raises(IntaglioError, match=r"have 0\.0 MB in bfloat16; at most 0 MB are accepted"):
        ship_for(checkpoint, root)


def test_damaged_ones_are_one_sentence(model: Path, root: Path) -> None:
    checkpoint = load(model)
    ship_for(checkpoint, root)
    heads, description = (root / "tiny" / f"hidden_transfer.{end}" for end in ("safetensors", "json"))
    content, summary = heads.read_bytes(), description.read_text()
    cases: list[tuple[str, bytes | None, str, str]] = [
        ("cut", content[: len(content) // 2], summary, "is damaged or truncated"),
        ("gone", None, summary, "is damaged or truncated: No such file"),
        ("other", content, summary.replace('"ahead": 3', '"ahead": 4'), "are not those that hidden_transfer.json desc"),
        ("half", content, summary[:40], "does not describe heads that come with the package"),
        ("empty", content, "{}", "does not describe heads that come with the package"),
    ]
    for _, data, text, says in cases:
        heads.unlink(missing_ok=True)
        if data is not None:
            heads.write_bytes(data)
        description.write_text(text)
        with pytest.raises(IntaglioError, match=says) as caught:
            load(model).decoder("hidden_transfer")
        assert "\n" not in str(caught.value)


def test_a_wheel_holds_them() -> None:
    pathspec = pytest.importorskip("pathspec")
    targets = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    for target in ("wheel", "sdist"):
        kept = pathspec.GitIgnoreSpec.from_lines(targets[target]["artifacts"])
        for name in ("chimera.json", "chimera-00001-of-00002.safetensors", "chimera.safetensors.index.json"):
            assert kept.match_file(f"src/intaglio/checkpoint/pretrained/smollm2/{name}")
    if (REPOSITORY / ".git").exists():
        for place, ignored in (
            ("src/intaglio/checkpoint/pretrained/smollm2/", False),
            ("src/intaglio/", True),
            ("", True),
        ):
            done = subprocess.run(["git", "check-ignore", "-q", "--no-index", f"{place}a.safetensors"], cwd=REPOSITORY)
            assert (done.returncode == 0) is ignored


def test_what_is_shipped_is_whole() -> None:
    for description in ROOT.glob("*/*.json"):
        if description.name.endswith(".index.json"):
            continue
        (one,) = [found for found in bundled_heads(description.stem) if found.model == description.parent.name]
        assert one.matches(one.about["model"])
        assert one.matches(one.about["float16"])
        assert not one.matches("")
        assert one.attachment().bytes == one.bytes <= MAX_BYTES
        assert all(path.stat().st_size < 16_000_000 for path in description.parent.iterdir())
        assert one.acceptance["tokens_a_pass"] > 1
