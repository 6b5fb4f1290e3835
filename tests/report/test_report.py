from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from intaglio import report
from intaglio.cli.demo import _best
from intaglio.errors import IntaglioError
from intaglio.report import svg
from intaglio.report.formatting import RARE
from intaglio.report.schema import EVEN, shares_of, value_of
from intaglio.report.training_curves import curves

PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
DIGEST = "sha256:9f2c1e7a4b0d8835"
COMMON: dict[str, Any] = {
    "measure": {"texts": "wikipedia", "samples": 64, "length": 512, "digest": DIGEST},
    "versions": {"intaglio": "0.1.0", "torch": "2.13.0"},
    "threads": 2,
    "device": "cpu",
    "dtype": "float32",
}
NAMES = {"magnitude": "Magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "dsnot": "Wanda + DSnoT"}
PERPLEXITIES = {"50 %": (1284.3, 40.62, 33.08, 38.9), "2:4": (88213.7, 203.4, 78.4, 170.2)}


def zeros(share: float, layers: int = 30) -> dict[str, float]:
    return {f"layers.{n}.{projection}": share for n in range(layers) for projection in PROJECTIONS}


def side(perplexity: float | None = 18.5523, share: float = 0.0, **overrides: Any) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "bits_per_byte": 0.9312,
        "kl_mean": 0.0,
        "top1_agreement": 1.0,
        "cosine": None,
        "zero_fraction": zeros(share),
        "activation_sparsity": None,
        "token_sparsity": None,
        "chunk_sparsity": None,
        "bytes": 538_090_408,
        "prefill_tokens_per_s": 412.3,
        "decode_tokens_per_s": 21.7,
        "peak_memory_bytes": 1_912_000_000,
        "parameters": 134_515_008,
    } | overrides


def carve(
    before: dict[str, Any] | None = None, after: dict[str, Any] | None = None, kind: str = "standalone"
) -> dict[str, Any]:
    calibration = {"digest": "sha256:4410bd21c99e", "samples": 32, "length": 511, "batch_size": 4}
    parameters = {"sparsity": 0.5, "pattern": None, "base": "wanda", "variance_power": 1.0}
    return {
        "format": 1,
        "title": "SmolLM2, half of every block",
        "model": "smollm2",
        "kind": kind,
        "steps": [
            {
                "slug": "dsnot",
                "parameters": parameters,
                "given": {"sparsity": 0.5},
                "seed": 7,
                "calibration": calibration,
                "chosen": {"max_cycles": {"576": 7, "1536": 19}},
                "seconds": 83.4,
            }
        ],
        "before": before or side(),
        "after": after or side(37.2134, 0.5, bits_per_byte=1.2042, kl_mean=0.4121, top1_agreement=0.8731),
        "recipe": "model: smollm2\nsteps:\n  - dsnot: {sparsity: 0.5}\n",
        "seconds": 214.0,
        **COMMON,
    }


def compare(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "format": 1,
        "title": "Two ways",
        "a": {"model": "smollm2"} | (a or side()),
        "b": {"model": "out/wanda"} | (b or side(24.1, 0.25, bytes=402_000_000, top1_agreement=0.91, kl_mean=0.21)),
        **COMMON,
    }


def demo(overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    variants = [
        side(perplexity, 0.5, top1_agreement=0.7, kl_mean=0.5)
        | {"name": f"{NAMES[slug]}, {amount}", "slug": slug, "amount": amount, "seconds": 62.0}
        | {
            "parameters": {"sparsity": 0.5, "pattern": None}
            if amount == "50 %"
            else {"sparsity": None, "pattern": amount}
        }
        | (overrides or {})
        for amount, row in PERPLEXITIES.items()
        for slug, perplexity in zip(NAMES, row, strict=True)
    ]
    return {
        "format": 1,
        "title": "SmolLM2, pruned four ways",
        "model": "smollm2",
        "dense": side(),
        "variants": variants,
        "best": {"50 %": ["sparsegpt"], "2:4": "sparsegpt"},  # a plain slug in older documents
        "notes": ["Calibration and evaluation texts share no segment."],
        "seconds": 311.0,
        **COMMON,
    }


def encoder() -> dict[str, Any]:
    lacks = dict.fromkeys(("perplexity", "bits_per_byte", "kl_mean", "top1_agreement", "decode_tokens_per_s"))
    names = ("attention.self.query", "attention.output.dense", "output.dense")
    layers = {f"layers.{n}.{name}": 0.5 for n in range(6) for name in names}
    before = side(**lacks, zero_fraction=dict.fromkeys(layers, 0.0))
    return carve(before, side(**lacks, cosine=0.9312, zero_fraction=layers), "runtime")


PAGES: list[tuple[Callable[[Any], str], Callable[[], dict[str, Any]]]] = [
    (report.carve_page, carve),
    (report.carve_page, encoder),
    (report.compare_page, compare),
    (report.demo_page, demo),
]
TABLES: list[tuple[Callable[[Any], RenderableType], Callable[[], dict[str, Any]]]] = [
    (report.carve_table, carve),
    (report.carve_table, encoder),
    (report.compare_table, compare),
    (report.demo_table, demo),
    (report.demo_chart, demo),
]


def printed(item: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def one_line(text: str) -> str:
    return " ".join(text.split())


VOID = {"meta", "br", "hr", "img", "input", "link"}
BLOCKS = {"div", "p", "table", "figure", "ul", "ol", "dl", "pre", "section", "details", "h1", "h2", "h3"}
PARENTS = {
    "li": {"ul", "ol"},
    "tr": {"thead", "tbody"},
    "td": {"tr"},
    "th": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "caption": {"table"},
    "dt": {"dl", "div"},
    "dd": {"dl", "div"},
    "summary": {"details"},
    "figcaption": {"figure"},
}


class Page(HTMLParser):
    """Parses strictly: every element closed, in order, and where HTML allows it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        parent = self.open[-1] if self.open else ""
        assert parent in PARENTS.get(tag, {parent}), f"{tag} in {parent}"
        assert not (tag in BLOCKS and {"p", "span", "code", "h1", "h2", "h3"} & set(self.open)), f"{tag} in {self.open}"
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return one_line(" ".join(self.words))


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


@pytest.mark.parametrize(("render", "document"), PAGES)
def test_page_is_whole_self_contained_and_deterministic(render: Callable, document: Callable) -> None:
    original = document()
    page = render(original)
    parsed = Page(page)
    assert original == document()
    assert page == render(json.loads(json.dumps(original)))
    assert page.startswith("<!doctype html>")
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not {name for name, _ in parsed.attributes if name.startswith("on")} | {
        name for name, _ in parsed.attributes if name in ("src", "href", "srcset", "xlink:href")
    }
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in dict(parsed.attributes)["content"] or "default-src 'none'" in page
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)
    assert report.ZEROS in parsed.text
    assert DIGEST in parsed.text
    assert "torch 2.13.0" in parsed.text
    assert "64 segments of 512 tokens" in parsed.text


@pytest.mark.parametrize(("render", "document"), PAGES)
def test_pictures_are_valid_and_accessible(render: Callable, document: Callable) -> None:
    found = drawings(render(document()))
    assert len(found) >= 2
    for picture in found:
        assert picture.get("role") == "img"
        assert picture.findtext("title")
        assert len(picture.findtext("desc") or "") > 20
        wide, high = map(float, (picture.get("viewBox") or "").split()[2:])
        for rectangle in picture.iter("rect"):
            x, y, w, h = (float(rectangle.get(key, "nan")) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= wide
            assert 0 <= y <= y + h <= high


def test_carve_page_tells_the_numbers() -> None:
    text = Page(report.carve_page(carve())).text
    for words in ("18.55", "37.21", "+100.6 % worse", "0.412 nats", "87.3 %", "−12.7 points worse", "50.0 %", "538 MB"):
        assert words in text
    for words in ("412 tok/s", "21.7 tok/s", "1.91 GB", "134.5 million", "3 min 34 s", "Took 1 min 23 s.", "Seed 7."):
        assert words in text
    assert "Calibrated on 32 segments of 511 tokens, 4 at a time" in text
    assert "model: smollm2 steps: - dsnot: {sparsity: 0.5}" in text
    assert report.BAKED in text
    assert report.LIVE not in text


def test_parameters_that_differ_from_the_defaults_come_first_and_all_are_folded() -> None:
    page = report.carve_page(carve())
    shown, folded = page.split("What was done")[1].split("<details>")
    assert re.findall(r"<li><b>(\w+)</b> ([^<]+)</li>", shown) == [("sparsity", "0.5")]
    names = re.findall(r'<dt class="mono">(\w+)</dt>', folded)
    assert names == ["sparsity", "pattern", "base", "variance_power", "max_cycles"]
    document = carve()
    del document["steps"][0]["given"]
    shown = report.carve_page(document).split("What was done")[1].split("<details>")[0]
    assert re.findall(r"<li><b>(\w+)</b>", shown) == ["sparsity", "base", "variance_power"]


def test_what_a_step_measured_is_drawn_and_what_cannot_be_is_said() -> None:
    document = carve()
    items = {"block 0": 0.75, "block 1 <b>": 0.0, "block 2": -0.01, "block 3": float("nan")}
    bars = {
        "title": "Influence of each block",
        "axis": "1 - cosine",
        "items": items,
        "marked": ["block 2"],
        "mark": "gone",
    }
    document["steps"][0]["bars"] = bars
    picture = next(found for found in drawings(report.carve_page(document)) if "Influence" in "".join(found.itertext()))
    words = [element.text for element in picture.iter() if element.text]
    assert {"0.750", "0", "-0.010, gone", "not finite", "block 1 <b>"} <= set(words)
    assert sum(element.tag.endswith("rect") for element in picture.iter()) == 1
    for odd in (None, [], {"items": {}}, {"items": [1]}):
        document["steps"][0]["bars"] = odd
        assert "Influence" not in report.carve_page(document)


def test_fewer_bytes_are_said() -> None:
    said = report.summary(carve(after=side(share=0.0, bytes=269_000_000)))
    assert "; the weights take 50.0 % fewer bytes; no zeros were added to the blocks." in said
    assert "fewer bytes" not in report.summary(carve())


def test_live_checkpoints_say_what_is_needed() -> None:
    document = carve(kind="runtime")
    assert report.LIVE in Page(report.carve_page(document)).text
    assert report.LIVE in one_line(printed(report.carve_table(document)))
    assert "intaglio.load" in report.summary(document)


def test_encoder_rows_give_the_reason() -> None:
    text = Page(report.carve_page(encoder())).text
    table = one_line(printed(report.carve_table(encoder()), 120))
    for words in (
        "no decode: does not predict",
        "no perplexity: does not predict",
        "no KL divergence: does not",
        "0.931",
    ):
        assert words in text
        assert words in table
    assert report.summary(encoder()).startswith("Embeddings have a mean cosine of 0.931 to the original's; 50.0 %")
    assert "Cosine" not in printed(report.carve_table(carve()))


@pytest.mark.parametrize("make", [carve, encoder, compare])
def test_two_sided_tables_have_every_measure(make: Callable) -> None:
    document = make()
    table = report.compare_table(document) if "a" in document else report.carve_table(document)
    text = printed(table)
    for measure in report.MEASURES:
        seldom = measure.key in RARE - ({"cosine"} if make is encoder else set())
        assert (measure.name in text) != seldom
    assert {measure.key for measure in report.MEASURES} == set(side())
    assert report.ZEROS in one_line(text)


def test_carve_table_lines() -> None:
    lines = [one_line(line) for line in printed(report.carve_table(carve())).splitlines()]
    assert "Perplexity 18.55 37.21 +100.6 % worse" in lines
    assert "KL divergence 0 nats 0.412 nats +0.412 nats worse" in lines
    assert "Same choice 100.0 % 87.3 % -12.7 points worse" in lines
    assert "Zeros 0.0 % 50.0 % +50.0 points" in lines
    assert "Size on disk 538 MB 538 MB unchanged" in lines
    assert "Prefill 412 tok/s 412 tok/s unchanged" in lines


def test_compare_table_and_page_name_both() -> None:
    text = printed(report.compare_table(compare()))
    assert "A: smollm2" in text
    assert "B: out/wanda" in text
    assert "538 MB 402 MB -25.3 % better" in one_line(text)
    page = Page(report.compare_page(compare())).text
    assert "A smollm2 B out/wanda" in page
    assert "likeness is measured against A" in page
    assert "against the original" in Page(report.compare_page(compare(side(kl_mean=0.3)))).text


def test_demo_table_fits_80_columns_and_marks_the_best() -> None:
    text = printed(report.demo_table(demo()))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    rows = [one_line(line) for line in text.splitlines()]
    assert rows.index("dense 18.55 100.0 % 0 0.0 % 21.7 -") < rows.index(
        "Magnitude, 50 % 1,284 70.0 % 0.500 50.0 % 21.7 62"
    )
    assert [row.split(" *")[0] for row in rows if " * " in row] == ["SparseGPT, 50 %", "SparseGPT, 2:4"]
    assert sum(row.startswith(tuple(NAMES.values())) for row in rows) == 8
    assert "Size on disk of each: 538 MB." in one_line(text)
    assert report.ZEROS in one_line(text)
    smaller = demo()
    smaller["variants"][0]["bytes"] = 269_000_000
    text = one_line(printed(report.demo_table(smaller), 100))
    assert "Size on disk of each: 538 MB; of Magnitude, 50 %: 269 MB." in text
    smaller["variants"][1]["bytes"] = 400_000_000
    text = printed(report.demo_table(smaller), 100)
    assert "269 MB" in text
    assert "Size on disk of each" not in one_line(text)


def left_out() -> dict[str, Any]:
    """A side whose projections leave out inputs, and have no zeros to count."""
    return side(31.5, zero_fraction={}, activation_sparsity=0.5071, bytes=546_000_000, top1_agreement=0.8, kl_mean=0.3)


def test_what_leaves_out_inputs_is_told_beside_what_has_zeros() -> None:
    document = demo()
    document["variants"] += [left_out() | {"name": "R-Sparse, 50 % read", "slug": "r_sparse", "amount": "50 % read"}]
    text = printed(report.demo_table(document))
    assert max(map(len, text.splitlines())) <= 80
    assert "R-Sparse, 50 % read 31.50 80.0 % 0.300 50.7 % 21.7 -" in [one_line(line) for line in text.splitlines()]
    assert "of R-Sparse, 50 % read: 546 MB." in one_line(text)
    page = Page(report.demo_page(document)).text
    assert "50.7 %" in page
    assert "none: every input is read" in page


def test_a_step_draws_the_shares_that_it_chose() -> None:
    document = carve(after=left_out(), kind="runtime")
    shares = {"layers.0.self_attn.q_proj": 0.15, "layers.1.self_attn.q_proj": 0.95}
    document["steps"][0]["grid"] = {"title": "Share of the budget for channels", "values": shares}
    page = report.carve_page(document)
    assert "Share of the budget for channels, as the step chose it for each projection." in Page(page).text
    assert report.ZEROS not in Page(page).text
    assert "Where the zeros are" not in page
    assert "Inputs left out 50.7 % of the projections', a token" in Page(page).text
    assert "layer 1, self_attn.q_proj: 95.00 %" in page
    assert "a token skips 50.7 % of the projections' inputs" in report.summary(document)
    assert "Inputs left out" in printed(report.carve_table(document), 100)
    assert "Inputs left out" not in printed(report.carve_table(carve()), 100)


def test_demo_page_shows_every_variant() -> None:
    parsed = Page(report.demo_page(demo()))
    for words in ("1,284", "40.62", "33.08 best", "38.90", "88,214", "78.40 best", "Best at 50 %", "Best at 2:4"):
        assert words in parsed.text
    assert "Calibration and evaluation texts share no segment." in parsed.text
    rows = re.findall(r'<tr(?: class="(\w+)")?><th scope="row(?:group)?"[^>]*>([^<]+)', report.demo_page(demo()))
    short = list(NAMES.values())
    assert [name.strip() for _, name in rows] == ["Dense", "50 %", *short, "2:4", *short]
    assert [name.strip() for kind, name in rows if kind == "best"] == ["SparseGPT", "SparseGPT"]
    assert "no calibration data" not in parsed.text


def test_the_demo_counts_perplexities_within_5_percent_of_the_lowest_as_a_tie() -> None:
    def best(**perplexities: float | None) -> list[str]:
        return _best([{"amount": "2:4", "slug": slug, "perplexity": value} for slug, value in perplexities.items()])[
            "2:4"
        ]

    assert best(dsnot=53.2, sparsegpt=54.1, wanda=70.0) == ["dsnot", "sparsegpt"]  # as measured on one machine
    assert best(dsnot=53.3, sparsegpt=51.5, wanda=70.0) == ["sparsegpt", "dsnot"]  # and on another
    assert best(dsnot=53.2, sparsegpt=56.0, wanda=None) == ["dsnot"]


def test_a_tie_is_shown_as_a_tie() -> None:
    document = demo()
    document["best"] = {"50 %": ["sparsegpt", "dsnot"], "2:4": ["sparsegpt"]}
    page = report.demo_page(document)
    tied = [NAMES["sparsegpt"], NAMES["dsnot"]]
    assert re.findall(r'<tr class="best"><th scope="row"[^>]*>([^<]+?) *<', page) == [*tied, NAMES["sparsegpt"]]
    assert "SparseGPT and Wanda + DSnoT tie, within 5.0 %" in Page(page).text
    assert "at 50 % SparseGPT (33.08) and Wanda + DSnoT" in report.summary(document)
    assert "tie, within 5.0 %; at 2:4 SparseGPT (78.40) is best" in report.summary(document)
    starred = [
        line.partition(",")[0].strip()
        for line in printed(report.demo_table(document), 80).splitlines()
        if " * " in line
    ]
    assert starred == [*tied, NAMES["sparsegpt"]]


def test_chart_lengths_follow_the_logarithm_and_need_no_colour_or_unicode() -> None:
    lines = [line for line in printed(report.demo_chart(demo()), 100).splitlines() if "█" in line]
    assert len(lines) == 9
    lengths = [line.count("█") for line in lines]
    values = [18.5523, *PERPLEXITIES["50 %"], *PERPLEXITIES["2:4"]]
    for length, value in zip(lengths, values, strict=True):
        assert length == round(60 * math.log(value / 10) / math.log(1e5 / 10))
    assert [line.split()[0] for line in lines if line.endswith("best")] == ["SparseGPT,", "SparseGPT,"]
    for item in (report.demo_chart(demo()), report.demo_table(demo()), report.carve_table(carve())):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding="ascii")
        Console(file=file, width=80, _environ={"TERM": "dumb"}).print(item)
        file.flush()
        assert b"\x1b" not in raw.getvalue()
    file = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    Console(file=file, width=100, _environ={"TERM": "dumb"}).print(report.demo_chart(demo()))
    file.flush()
    assert [line.count(b"#") for line in raw.getvalue().splitlines() if b"#" in line] == lengths


def test_summaries() -> None:
    assert report.summary(carve()) == (
        "Perplexity 18.55 -> 37.21; 87.3 % of next-token choices unchanged; 50.0 % of the block weights are zero, "
        "which alone changes neither bytes nor speed."
    )
    assert report.summary(compare()) == (
        "Perplexity 18.55 -> 24.10; 91.0 % of next-token choices the same as A's; zeros (0.0 % of the blocks' linears "
        "in A, 25.0 % in B) alone change neither bytes nor speed."
    )
    assert report.summary(demo()) == (
        "Perplexity 18.55 before; at 50 % SparseGPT (33.08) is best; at 2:4 SparseGPT (78.40) is best; "
        "the zeros alone change neither bytes nor speed."
    )
    uneven = carve(after=side(37.2, zero_fraction={"layers.0.a": 0.25, "layers.1.a": 0.75}))
    assert "50.0 % of the block weights are zero (25.0 % to 75.0 % of a layer)" in report.summary(uneven)
    weighed = carve(after=uneven["after"] | {"zeros": 0.3})
    assert "30.0 % of the block weights are zero (25.0 % to 75.0 % of a layer)" in report.summary(weighed)
    assert value_of(weighed["after"], "zero_fraction") == 0.3
    assert value_of(side(zero_fraction={}) | {"zeros": 0.3}, "zero_fraction") is None


MARKUP = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=a> {{ 7*7 }}"
HOSTILE = MARKUP + " [bold]x[/bold] \x1b[31m\x00\ud800&"
# Dicts whose keys the user, the model or the method chooses.
OPEN = {"parameters", "chosen", "zero_fraction", "versions", "best"}


def poisoned(value: Any, keys: bool = True) -> Any:
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {f"{key}{HOSTILE}" if keys else key: poisoned(item, key in OPEN) for key, item in value.items()}
    return [poisoned(item, False) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("render", "document"), PAGES)
def test_hostile_strings_are_only_text(render: Callable, document: Callable) -> None:
    page = render(poisoned(document(), keys=False))
    parsed = Page(page)
    assert not parsed.tags & {"script", "img", "bold"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert "<script>alert(1)</script>" in parsed.text
    assert "{{ 7*7 }}" in parsed.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)
    page.encode("utf-8")
    assert drawings(page)


@pytest.mark.parametrize(("table", "document"), TABLES)
def test_hostile_strings_do_not_reach_the_terminal(table: Callable, document: Callable) -> None:
    text = printed(table(poisoned(document(), keys=False)), 400)
    assert "[bold]x[/bold]" in text or table is report.demo_chart
    assert "\x1b" not in text
    assert "\x00" not in text
    text.encode("utf-8")


def test_a_carving_that_sets_nothing_to_zero_says_so() -> None:
    same = carve(side(), side())
    assert report.summary(same).endswith("no zeros were added to the blocks.")
    trained = carve(side(share=0.5), side(share=0.4999))  # training moves the few weights that were 0 by chance
    assert report.summary(trained).endswith("no zeros were added to the blocks.")


@pytest.mark.parametrize(
    ("after", "standalone", "said"),
    [
        ({}, True, ("+100.0 %, the same work: noise", "")),
        ({}, False, ("+100.0 %", "better")),
        ({"bytes": 1}, True, ("+100.0 %", "better")),
        ({"parameters": 1}, True, ("+100.0 %", "better")),
    ],
)
def test_speed_changes_only_where_work_does(after: dict[str, Any], standalone: bool, said: tuple[str, str]) -> None:
    found = report.rows(side(), side(decode_tokens_per_s=2 * 21.7, **after), standalone)
    change = next(row.change for row in found if row.measure.key == "decode_tokens_per_s")
    assert (change.text, change.verdict) == said


NUMBER = st.one_of(
    st.none(),
    st.just(0),
    st.just(0.0),
    st.just(1e9),
    st.floats(),
    st.floats(0, 1),
    st.floats(1, 1e6),
    st.integers(0, 10**13),
)
LAYER = st.one_of(
    st.sampled_from(["layers.0.mlp.up_proj", "layers.11.self_attn.qkv_proj[k]", "model.layers.3.x", "lm_head", ""]),
    st.text(),
)
SIDES = st.fixed_dictionaries(
    {key: NUMBER for key in side() if key != "zero_fraction"}
    | {"zero_fraction": st.dictionaries(LAYER, st.one_of(st.floats(0, 1), st.floats(), st.none()), max_size=4)}
)


@settings(max_examples=25, deadline=None)
@given(SIDES, SIDES)
def test_any_numbers_make_a_page_a_table_and_a_sentence(one: dict[str, Any], other: dict[str, Any]) -> None:
    documents = (carve(one, other), compare(one, other), demo(copy.deepcopy(other)) | {"dense": one})
    for document, page in zip(documents, (report.carve_page, report.compare_page, report.demo_page), strict=True):
        rendered = page(document)
        after = other if document is documents[0] else {}
        told, left = shares_of(after), value_of(after, "activation_sparsity")
        assert (report.ZEROS in Page(rendered).text) == (max(told) >= EVEN if told else left is None)
        for picture in drawings(rendered):
            for element in picture.iter():
                assert not {"nan", "inf", "-inf"} & set(element.attrib.values())
    tables = (report.carve_table(documents[0]), report.compare_table(documents[1]), report.demo_table(documents[2]))
    for item in (*tables, report.demo_chart(documents[2])):
        assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", printed(item, 120))
    for document in documents:
        sentence = report.summary(document)
        ends = (" neither bytes nor speed.", " added to the blocks.", " zeros were counted.", " projections' inputs.")
        assert sentence.endswith(ends)
        assert "\n" not in sentence


@given(st.dictionaries(LAYER, st.floats(0, 1), max_size=6))
def test_layer_grid_holds_each_numbered_layer(fractions: dict[str, float]) -> None:
    rows, columns, values = svg.layer_grid(fractions)
    assert columns == sorted(columns, key=int)
    assert set(values) <= {(row, column) for row in rows for column in columns}
    assert set(values.values()) <= set(fractions.values())
    names = {f"layers.{column}.{row}" for row, column in values}
    plain = {name for name in fractions if re.fullmatch(r"layers\.[0-9]+\.[\w.\[\]]+", name, re.ASCII)}
    assert plain <= names


@given(st.sampled_from(report.MEASURES), st.floats(0.01, 1e6), st.floats(0.01, 1e6))
def test_verdicts_follow_the_direction(measure: report.Measure, old: float, new: float) -> None:
    def verdict(before: float, after: float) -> str:
        if measure.points:  # a share
            before, after = before / 1e6, after / 1e6
        values = ({"layers.0.a": v} if measure.key == "zero_fraction" else v for v in (before, after))
        found = report.rows(*(side(**{measure.key: value}) for value in values))
        return next(row.change.verdict for row in found if row.measure.key == measure.key)

    assert verdict(old, old) == ""
    if measure.better is None:
        assert verdict(old, new) == ""
    elif old != new and abs(new / old - 1) > measure.noise + 1e-9:
        good = (new > old) == (measure.better == "higher")
        assert verdict(old, new) == ("better" if good else "worse")


def test_changes_within_noise_are_called_that() -> None:
    def change(key: str, value: float) -> report.Change:
        return next(row.change for row in report.rows(side(), side(**{key: value})) if row.measure.key == key)

    assert change("decode_tokens_per_s", 21.7 * 1.24) == report.Change("+24.0 %, within noise", rises=True)
    assert change("decode_tokens_per_s", 21.7 * 1.26) == report.Change("+26.0 %", "better", True)
    assert change("perplexity", 18.5523 * 1.04) == report.Change("+4.0 %", "worse", True)
    assert change("perplexity", 18.5524) == report.Change("+under 0.1 %", "worse", True)
    assert change("perplexity", 18.5523 * 20) == report.Change("x 20.00", "worse", True)
    assert change("bytes", 538_090_408) == report.Change("unchanged")
    assert change("top1_agreement", 0.8731) == report.Change("-12.7 points", "worse", False)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("perplexity", 18.5523, "18.55"),
        ("perplexity", 203.44, "203.4"),
        ("perplexity", 88213.7, "88,214"),
        ("perplexity", 1e9, "1.00e9"),
        ("perplexity", 0.0, "0"),
        ("kl_mean", 0.4121, "0.412 nats"),
        ("kl_mean", 0.00012, "1.20e-4 nats"),
        ("top1_agreement", 0.8731, "87.3 %"),
        ("bytes", 538_090_408, "538 MB"),
        ("bytes", 90_868_373, "90.9 MB"),
        ("bytes", 999_999_999, "1.00 GB"),
        ("bytes", 12, "12 bytes"),
        ("prefill_tokens_per_s", 2210.4, "2,210 tok/s"),
        ("decode_tokens_per_s", 21.72, "21.7 tok/s"),
        ("parameters", 134_515_008, "134.5 million"),
    ],
)
def test_units(key: str, value: float, words: str) -> None:
    row = next(row for row in report.rows(side(**{key: value}), side()) if row.measure.key == key)
    assert row.before == report.Cell(words)


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
def test_a_missing_perplexity_is_a_dash_with_a_reason(value: float | None) -> None:
    document = carve(after=side(value, 0.5))
    row = next(row for row in report.rows(document["before"], document["after"]) if row.measure.key == "perplexity")
    assert row.after == report.Cell("-", "not finite, or not measured")
    assert row.change == report.Change("-")
    assert "not finite, or not measured" in Page(report.carve_page(document)).text
    assert report.summary(document).startswith("Perplexity not finite or not measured; 100.0 %")


def test_the_original_has_no_distance_to_itself() -> None:
    document = carve(before=side(kl_mean=None, top1_agreement=None))
    cells = {row.measure.key: row.before for row in report.rows(document["before"], document["after"])}
    assert cells["kl_mean"] == cells["top1_agreement"] == report.Cell("-", "the original")


def test_heatmap_has_a_cell_a_layer_as_dark_as_its_share() -> None:
    rows, columns, values = svg.layer_grid(zeros(0.5) | {"layers.29.mlp.down_proj": 1.0, "lm_head": 0.3})
    assert columns == [str(n) for n in range(30)]
    assert rows == PROJECTIONS
    assert len(values) == 210
    picture = ET.fromstring(svg.heatmap("t", "d", rows, columns, values, column_title="layer"))
    cells = {
        r.findtext("title"): float(r.get("fill-opacity", "nan"))
        for r in picture.iter("rect")
        if r.find("title") is not None
    }
    assert len(cells) == 210
    assert cells["layer 29, mlp.down_proj: 100.00 %"] == svg.HEAT_OPACITY
    assert cells["layer 0, self_attn.q_proj: 50.00 %"] == pytest.approx(svg.HEAT_OPACITY / 2)


@pytest.mark.parametrize("layers", [1, 6, 30, 80, 250])
def test_heatmap_labels_do_not_collide(layers: int) -> None:
    rows, columns, values = svg.layer_grid(zeros(0.5, layers))
    picture = ET.fromstring(svg.heatmap("t", "d", rows, columns, values, column_title="layer"))
    ticks = [float(t.get("x", "nan")) for t in picture.iter("text") if (t.text or "").isdigit() and t.get("y") == "32"]
    assert ticks
    assert all(right - left > 6 * len(columns[-1]) for left, right in pairwise(ticks))


def widths(picture: str) -> list[float]:
    return [float(r.get("width", "nan")) for r in ET.fromstring(picture).iter("rect")]


def test_bars_have_the_scale_that_they_claim() -> None:
    items = [svg.Bar(str(value), value, "") for value in (20.0, 200.0, 2000.0)]
    one, two, three = widths(svg.bars("t", "d", items, axis="a", scale="log"))
    assert three - two == pytest.approx(two - one, abs=0.03)
    one, two, three = widths(svg.bars("t", "d", items, axis="a"))
    assert two / three == pytest.approx(0.1, abs=0.001)
    assert widths(svg.bars("t", "d", [svg.Bar("x", None, "none")], axis="a", scale="log")) == []


def test_pairs_share_a_scale_from_zero() -> None:
    item = svg.Pair("size", 200.0, 50.0, "200", "50")
    before, after = widths(svg.pairs("t", "d", [item]))
    assert after / before == pytest.approx(0.25, abs=0.001)
    assert widths(svg.pairs("t", "d", [svg.Pair("none", 0.0, 0.0, "0", "0")])) == []


@given(st.lists(st.floats(1e-12, 1e15), min_size=1, max_size=5))
def test_ranges_and_ticks_are_round_and_hold_the_values(values: list[float]) -> None:
    low, high = svg.nice_range(values)
    assert low < min(values)
    assert max(values) <= high
    ticks = svg.log_ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert all(f"{value:.0e}"[0] in "125" for value in (low, high, *ticks))


def test_exact_ranges() -> None:
    assert svg.nice_range([18.5523, 88213.7]) == (10.0, 100000.0)
    assert svg.nice_range([10.0, 50.0]) == (5.0, 50.0)
    assert svg.nice_range([]) == (1.0, 10.0)
    assert svg.log_ticks(10.0, 100.0) == [10.0, 20.0, 50.0, 100.0]
    assert svg.log_ticks(10.0, 1e5) == [10.0, 100.0, 1e3, 1e4, 1e5]


def luminance(red: float, green: float, blue: float) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(*one), luminance(*other)))
    return (high + 0.05) / (low + 0.05)


def test_both_palettes_can_be_read() -> None:
    style = report.carve_page(carve()).split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)", 1)
    for rules in (light, dark.split("}", 1)[0]):
        named = {
            name: tuple(int(code[k : k + 2], 16) / 255 for k in (0, 2, 4))
            for name, code in re.findall(r"--(\w+): #([0-9a-f]{6});", rules)
        }
        for ground in ("paper", "raised", "sunken"):
            for ink in ("ink", "muted", "accent", "good", "bad"):
                assert contrast(named[ground], named[ink]) >= 4.5, (ground, ink)
        share = svg.HEAT_OPACITY
        darkest = tuple(share * h + (1 - share) * p for h, p in zip(named["heat"], named["paper"], strict=True))
        assert contrast(darkest, named["ink"]) >= 4.5
        assert contrast(named["accent"], named["paper"]) >= 3
    assert "size: A4" in style
    assert "print-color-adjust: exact" in style
    assert "break-inside: avoid" in style


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (carve() | {"format": 2}, "the carve report has format 2; accepted: 1"),
        ({**carve(), "after": None}, "the carve report lacks after"),
        ({"format": 1}, "the carve report lacks title"),
        ([], "the carve report is a list"),
    ],
)
def test_a_document_that_is_not_one_is_refused(document: Any, words: str) -> None:
    for function in (report.carve_page, report.carve_table, report.summary):
        with pytest.raises(IntaglioError, match=words):
            function(document)


def test_no_measured_layer_is_said() -> None:
    document = carve(after=side(zero_fraction={}))
    assert "No layer was measured." in Page(report.carve_page(document)).text
    assert "no layer was measured" in printed(report.carve_table(document), 120)
    other = carve(after=side(zero_fraction={"lm_head": 0.125}))
    assert "lm_head 12.50 %" in Page(report.carve_page(other)).text


def test_before_gets_a_map_only_when_it_has_zeros() -> None:
    def maps(document: dict[str, Any]) -> list[str]:
        found = [picture.findtext("title") or "" for picture in drawings(report.carve_page(document))]
        return [title for title in found if title.startswith("Zeros")]

    assert maps(carve()) == ["Zeros in each layer: After"]
    stray = side(zero_fraction=zeros(0.0) | {"layers.0.mlp.up_proj": 1e-6})
    assert maps(carve(before=stray)) == ["Zeros in each layer: After"]
    assert maps(carve(before=stray, after=stray)) == []
    assert maps(carve(before=side(share=0.25))) == ["Zeros in each layer: Before", "Zeros in each layer: After"]


def test_the_module_needs_neither_torch_nor_the_layers_above() -> None:
    code = (
        "import sys, intaglio; before = set(sys.modules); import intaglio.report; "
        "found = {m.split('.')[0] for m in sys.modules}; "
        "assert not found & {'torch', 'transformers', 'numpy'}, found; "
        "own = {m for m in set(sys.modules) - before if m.startswith('intaglio.')}; "
        "others = {m for m in own if not m.startswith('intaglio.report')}; "
        "assert others <= {'intaglio.errors', 'intaglio.atomic_io'}, others"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_share_that_is_none_is_not_shown() -> None:
    odd = side() | {
        "zero_fraction": {"layers.0.mlp.up_proj": 1e306, "layers.0.mlp.down_proj": 0.5},
        "top1_agreement": -2,
    }
    assert value_of(odd, "zero_fraction") == 0.5
    assert value_of(odd, "top1_agreement") is None


def test_units_that_rest_are_told_where_there_are_any() -> None:
    lines = [one_line(line) for line in printed(report.carve_table(carve(after=side(token_sparsity=0.8)))).splitlines()]
    assert "At rest - not measured 80.0 % -" in lines
    assert not any("At rest together" in line for line in lines)


def test_training_curves_have_whole_steps_and_no_negative_share() -> None:
    picture = ET.fromstring(curves({"step": [1, 2], "loss": [6.0, 5.9], "evaluation/forward": [0.0, 0.0]}))
    labels = [text.text for text in picture.iter("text")]
    assert "-0.5" not in labels
    assert "1.5" not in labels
    assert {"1", "2", "0.5"} <= set(labels)


def test_the_last_step_of_a_curve_is_written_whole() -> None:
    picture = ET.fromstring(curves({"step": [1, 3000], "loss": [6.0, 5.9]}))
    (last,) = [text for text in picture.iter("text") if text.text == "3,000"]
    assert float(last.get("x")) + svg.SMALL_CHARACTER * len("3,000") / 2 <= svg.WIDTH


def test_columns_of_text_are_aligned_left() -> None:
    """Texts, labels and names read from the left; numbers, also those with a unit or missing, stay right."""
    rows = [["a", "12", "tech (99%)", "–", "> quoted"], ["b", "7", "2020 (1%)", "1,024", "a text"]]
    table = {"title": "T", "headings": ["Class", "Index", "Predicted", "Count", "Text"], "rows": rows}
    section = {"title": "S", "summary": "", "tables": [table, {**table, "rows": []}]}
    page = report.html.trained_page("t", "s", [section])
    assert '<th scope="col">Index</th><th scope="col" class="text">Predicted</th><th scope="col">Count</th>' in page
    assert '<td>12</td><td class="text">tech (99%)</td><td>–</td><td class="text">&gt; quoted</td>' in page
