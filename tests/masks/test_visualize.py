"""`intaglio inspect MODEL --masks`: the groups, the picture, the table, plain data, and what is refused."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from intaglio.checkpoint import Checkpoint
from intaglio.cli.app import app
from intaglio.masks import Bidirectional, Causal, ExplicitMask, set_visibility, visible
from intaglio.masks.method import Visibility
from intaglio.masks.visualize import MOST_CELLS, Group, drawing, groups, svg
from tests.conftest import TinyDir
from tests.families import FAMILIES, HEADS, WINDOW, tiny_model, tiny_tokenizer

NAMES = {
    "llama": ["causal (stock)"],
    "mistral_window": [f"causal, window {WINDOW} (stock)"],
    "gemma3": [f"causal, window {WINDOW} (stock)", "causal (stock)"],
    "bert": ["both ways (stock)"],
    "modernbert": ["both ways (stock)", f"both ways, window {WINDOW // 2} (stock)"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_are_read(family: str) -> None:
    model = tiny_model(family)
    found = groups(model, 12)
    assert sorted(layer for group in found for layer in group.layers) == [0, 1, 2, 3]
    seen = visible(model, 12)
    for group in found:
        assert group.is_noncausal == FAMILIES[family].encoder
        for layer in group.layers:
            assert bool((group.seen_HQK == seen[layer]).all())
    if family in NAMES and family != "modernbert":
        assert [group.name for group in found] == NAMES[family]
    if family == "modernbert":
        assert len(found) == 2
        assert found[1].name.startswith("both ways, window")


def test_groups_say_where_and_what() -> None:
    checkpoint = Checkpoint(tiny_model("llama", layers=8), None, "tiny")
    Visibility(layers=[0, 1, 2, 5], rule="bidirectional").apply(checkpoint)
    Visibility(layers=[4], rule={"sliding": {"window": 3}}).apply(checkpoint)
    found = groups(checkpoint.model, 10)
    assert [(group.where, group.name) for group in found] == [
        ("0–2, 5", "bidirectional"),
        ("3, 6–7", "causal (stock)"),
        ("4", "sliding (window 3)"),
    ]
    assert [group.share for group in found] == pytest.approx([1.0, 0.55, 0.27])


def drawn(picture: str) -> list[tuple[int, int, int, float]]:
    """Column, row, width and opacity of every run of cells."""
    return [
        (*map(int, run), float(opacity))
        for opacity, path in re.findall(r'<path fill-opacity="([\d.]+)" d="([^"]+)"/>', picture)
        for run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path)
    ]


def test_the_picture_shows_each_group_once_and_as_dark_as_heads_agree() -> None:
    model = tiny_model("llama")
    table = [[[1, 0], [1, 1]]] * (HEADS - 1) + [[[1, 1], [0, 1]]]
    set_visibility(model, {0: ExplicitMask(table), 1: Bidirectional(), 2: Bidirectional()})  # type: ignore[arg-type]
    found = groups(model, 2)
    picture = svg("a <model> & more\x00", found)
    ET.fromstring(picture)
    assert "a &lt;model&gt; &amp; more" in picture
    cells = drawn(picture)
    assert sorted({opacity for *_, opacity in cells}) == [0.25, 0.75, 1.0]
    # Two rows of two cells by heads, two full rows, two rows of a triangle.
    assert len(cells) == 4 + 2 + 2
    assert picture.count("<title>layer ") == 4
    assert "prefers-color-scheme: dark" in picture
    assert svg("m", found) == svg("m", found)


def test_a_long_mask_is_drawn_in_as_many_cells_as_can_be_seen() -> None:
    seen_QK = torch.ones(4 * MOST_CELLS, 4 * MOST_CELLS).tril().triu(-1).bool()
    picture = svg("m", [Group((0,), Causal(), None, seen_QK[None])])
    ET.fromstring(picture)
    cells = drawn(picture)
    assert {row for _, row, *_ in cells} == set(range(MOST_CELLS))
    # A cell on the diagonal covers 4 x 4 pairs, of which 4 + 3 are seen.
    assert (0, 0, 1, 0.44) in cells
    assert len(picture) < 20_000


def test_the_drawing_for_terminals() -> None:
    (group,) = groups(tiny_model("llama"), 6)
    assert str(drawing(group)) == "█▄····\n███▄··\n█████▄"
    assert str(drawing(group, most=4)) == "█▄··\n███▄"
    assert isinstance(group, Group)


def run(*words: str | Path) -> Any:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 0, found.stderr
    return found


def test_inspect_writes_a_picture_and_prints_a_table_or_json(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = tiny_dir("gemma3")
    out = run("inspect", model, "--masks", "-o", tmp_path / "m.svg").stdout
    assert "causal, window 8 (stock)" in " ".join(out.split())
    assert f"picture: {tmp_path / 'm.svg'}" in out
    assert (tmp_path / "m.svg").read_text(encoding="utf-8").startswith("<svg")
    document = json.loads(run("inspect", model, "--masks", "--length", "9", "--json").stdout)
    assert (document["kind"], document["length"]) == ("standalone", 9)
    (window,) = document["groups"]
    assert window["layers"] == [0, 1]
    assert window["visible"][0][8] == "011111111"
    assert window["rule"] is None
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    Visibility(layers="2:", rule="bidirectional").apply(checkpoint).save(tmp_path / "live")
    document = json.loads(run("inspect", tmp_path / "live", "--masks", "--json").stdout)
    assert document["kind"] == "runtime"
    assert [group["rule"] for group in document["groups"]] == [None, {"kind": "bidirectional"}]
    assert [group["is_noncausal"] for group in document["groups"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [],
            "error: an option is missing: --masks shows the attention masks, --experts the use of moe_x's experts, "
            "--features the features of a dictionary, --terms the words of a text, --diagnostics the geometry and "
            "information of next-token steps, --sparse-attention the study of long contexts, --spectrum the singular "
            "values of convolutions and linear layers",
        ),
        (["--masks", "-o", "m.png"], "error: the picture m.png must be an .svg file"),
        (["--masks", "--length", "999"], "error: length is 999; 1 to 128 tokens are accepted for this model"),
    ],
)
def test_inspect_refuses_in_one_sentence(tiny_dir: TinyDir, words: list[str], sentence: str) -> None:
    found = CliRunner().invoke(app, ["inspect", str(tiny_dir("llama")), *words])
    assert found.exit_code == 2
    assert found.stderr.strip() == sentence


SHORT = ["--max-new-tokens", "3"]


def test_generate_refuses_what_sees_to_the_right(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
    Visibility(rule="bidirectional").apply(checkpoint).save(tmp_path / "live")
    for decoder in ("greedy", "sample", "prompt_lookup"):
        found = CliRunner().invoke(app, ["generate", str(tmp_path / "live"), "the fox", "--decoder", decoder, *SHORT])
        assert found.exit_code == 2
        assert found.stderr.startswith("error: this model cannot generate: layer 0 sees later tokens")
        assert found.stderr.count("\n") == 1
        assert found.stdout == ""
