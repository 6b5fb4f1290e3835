"""Features on texts: firing rates, contexts and tokens; and their page in a browser."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from intaglio.checkpoint import Checkpoint
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.dictionaries.features import AFTER, BEFORE, TopContexts, describe_features, promoted_tokens
from intaglio.errors import IntaglioError
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, read_sites
from intaglio.report import features_page
from tests.browser import browse, find_browser
from tests.families import FAMILIES, tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (5, 30), generator=torch.Generator().manual_seed(0))


def dictionary(width: int = 32, latents: int = 12, site: Site | None = None) -> SparseDictionary:
    rows = torch.randn(latents, width, generator=torch.Generator().manual_seed(1))
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_dec": torch.zeros(width), "b_enc": torch.zeros(latents)}
    tensors["b_enc"][3] = -1e6
    return SparseDictionary("topk", tensors, k=4, site=site or Site(1))


def described(**options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    own = dictionary()
    document = describe_features(ckpt, "own", own, IDS, contexts=2, nearest=3, batch_size=2, **options)
    return document, own.encode(read_sites(anatomy(ckpt.model), (Site(1),), {"input_ids": IDS})[Site(1)])


def test_rates_and_contexts_are_those_of_the_codes() -> None:
    document, codes = described()
    codes[:, 0] = 0
    tokenizer = tiny_tokenizer("llama")
    assert document["tokens"] == 5 * 29
    assert document["width"] == 12
    assert document["l0"] == pytest.approx(float((codes > 0).sum()) / 145)
    shown = {feature["id"]: feature for feature in document["features"]}
    assert 3 not in shown
    assert document["alive"] == len(shown) == int((codes > 0).any(0).any(0).sum())
    rates = [feature["rate"] for feature in document["features"]]
    assert rates == sorted(rates, reverse=True)
    for m, feature in shown.items():
        own = codes[..., m]
        assert feature["rate"] == pytest.approx(float((own > 0).double().mean()) * 30 / 29)
        assert feature["highest"] == pytest.approx(float(own.max()))
        assert feature["mean"] == pytest.approx(float(own[own > 0].mean()), rel=1e-4)
        peaks = own.max(1)
        best = peaks.values.topk(2)
        for (ids, levels), segment, peak in zip(feature["contexts"], best.indices, best.values, strict=False):
            at = int(peaks.indices[segment])
            low, high = max(0, at - BEFORE), min(30, at + AFTER + 1)
            words = [tokenizer.decode([int(i)]) for i in IDS[segment, low:high]]
            assert [document["vocabulary"][i] for i in ids] == words
            expected = (own[segment, low:high] / own.max() * 99).ceil().long().tolist()
            assert levels == expected
            assert max(levels) == pytest.approx(99 * float(peak / own.max()), abs=1)
        assert len(feature["contexts"]) == min(2, int((peaks.values > 0).sum()))


def test_the_first_tokens_and_padding_do_not_count() -> None:
    top = TopContexts(1, 1)
    codes = torch.zeros(1, 6, 1)
    codes[0, :, 0] = torch.tensor([9.0, 1.0, 3.0, 2.0, 0.0, 8.0])
    valid = torch.tensor([[False, True, True, True, True, False]])
    top.update(torch.arange(6)[None], codes, valid)
    assert float(top.peaks_MC) == 3
    assert int(top.count_M) == 3
    assert top.tokens == 4
    assert top.codes_MCW[0, 0][top.ids_MCW[0, 0] >= 0].tolist() == [0, 1, 3, 2, 0, 0]


def test_contexts_do_not_depend_on_the_batches() -> None:
    draws = torch.Generator().manual_seed(0)
    codes, ids = torch.rand(7, 9, 5, generator=draws), torch.randint(0, 50, (7, 9), generator=draws)
    results = []
    for sizes in ([7], [2, 4, 1]):
        top = TopContexts(5, 3)
        for own_ids, own in zip(ids.split(sizes), codes.split(sizes), strict=True):
            top.update(own_ids, own, torch.ones(own.shape[:2], dtype=torch.bool))
        results.append((top.peaks_MC, top.ids_MCW, top.codes_MCW, top.count_M))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_by_unembedding(family: str) -> None:
    """A direction that is an unembedding row over the norm's gain promotes that row's token first."""
    parts = anatomy(tiny_model(family, layers=1))
    own = (parts.head or parts.embedding).weight.float()
    norm = parts.final_norm if parts.head is not None else None
    gain = torch.ones(32) if norm is None else norm.weight + (1 if "Gemma" in type(norm).__name__ else 0)
    own = own / own.norm(dim=1, keepdim=True)
    tokens = torch.tensor([9, 77])
    with torch.no_grad():
        (parts.head or parts.embedding).weight.copy_(own)
    raised, lowered = promoted_tokens(parts, own[tokens] / gain, 3)
    assert raised[:, 0].tolist() == tokens.tolist()
    opposite, _ = promoted_tokens(parts, -own[tokens] / gain, 3)
    assert torch.equal(opposite, lowered)
    assert promoted_tokens(parts, torch.ones(2, 8), 3) is None


def test_the_most_frequent_features_are_shown_and_options_reach_them() -> None:
    document, _ = described(most=2)
    everything, _ = described()
    assert document["features"] == everything["features"][:2]
    assert [len(feature["raised"]) for feature in document["features"]] == [3, 3]
    assert described(skip=10)[0]["tokens"] == 5 * 20


def test_texts_are_cut_to_the_length_and_ordered_by_the_seed() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=2), tiny_tokenizer("llama"), "tiny")
    texts = [f"the river {i} runs through the town {i} in the north" for i in range(9)]

    def read(**options: Any) -> dict[str, Any]:
        return describe_features(ckpt, "own", dictionary(), texts, tokens=30, **options)

    short, other, longer = read(length=11), read(length=11, seed=5), read(length=16)
    assert (short["tokens"], longer["tokens"]) == (30, 30)
    assert max(len(ids) for row in short["features"] for ids, _ in row["contexts"]) <= 11
    assert max(len(ids) for row in longer["features"] for ids, _ in row["contexts"]) > 11
    assert short["vocabulary"] != other["vocabulary"]


def test_what_cannot_be_shown_is_refused() -> None:
    ckpt = Checkpoint(tiny_model("llama", layers=2), None, "tiny")
    with pytest.raises(IntaglioError, match="tiny has no tokenizer"):
        describe_features(ckpt, "own", dictionary(), IDS)
    nowhere = SparseDictionary("topk", dictionary().tensors, k=4)
    with pytest.raises(IntaglioError, match="own does not name the activation"):
        describe_features(Checkpoint(ckpt.model, tiny_tokenizer("llama")), "own", nowhere, IDS)
    anatomy(ckpt.model).embedding.weight.data[IDS[2, 3]] = torch.inf
    with pytest.raises(IntaglioError, match=r"layers.1 hold NaN or infinite values in batch [01]"):
        describe_features(Checkpoint(ckpt.model, tiny_tokenizer("llama")), "own", dictionary(), IDS, batch_size=2)


# --- the page ---------------------------------------------------------------------------------------------------------

SCRIPT = "</script><script>document.title='owned'</script>"
IMAGE = "<img src=x onerror=\"document.title='owned'\">"


def page() -> str:
    def feature(m: int, tokens: list[int], rate: float) -> dict[str, Any]:
        levels = [0] * (len(tokens) - 1) + [99]
        return {
            "id": m, "rate": rate, "highest": 4.0, "mean": 2.0, "contexts": [[tokens, levels]],
            "raised": tokens[:1], "lowered": tokens[-1:],
        }  # fmt: skip

    words = [f" {SCRIPT}", IMAGE, " river", "\u2028 &amp;", " sun"]
    features = [feature(7, [0, 1, 2], 0.25), feature(12, [3, 1, 4], 0.5), feature(31, [1, 0], 0.125)]
    return features_page(
        {
            "model": SCRIPT,
            "dictionary": IMAGE,
            "site": "layers.1",
            "texts": SCRIPT,
            "tokens": 1000,
            "width": 40,
            "alive": 3,
            "l0": 2.5,
            "vocabulary": words,
            "features": features,
        }
    )


def test_all_text_is_escaped() -> None:
    text = page()
    assert SCRIPT not in text
    assert IMAGE not in text
    assert len(re.findall(r"<script\b", text)) == 2
    assert len(re.findall(r"</script>", text)) == 2
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert held is not None
    assert json.loads(held[1])["vocabulary"][1] == IMAGE
    assert "\u2028" not in held[1]
    assert "script-src 'sha256-" in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def opened(tmp_path: Path, mark: str, *options: str) -> str:
    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    address = f"file://{tmp_path / 'page.html'}{mark}"
    return browse(find_browser(), tmp_path / "profile", "--virtual-time-budget=2000", *options, address)


def test_the_page_lists_features_and_runs_no_text_in_a_browser(tmp_path: Path) -> None:
    dom = opened(tmp_path, "", "--dump-dom")
    body = dom[dom.index("<body") :]
    assert re.findall(r'data-id="(\d+)"', body) == ["12", "7", "31"]
    assert "3 of 3 features" in body
    assert "<h2>Feature 12</h2>" in body
    assert re.search(r' <mark[^>]*style="--level: ?84%;?"[^>]*>sun</mark>', body)
    assert "steer: {feature: 12, scale: 1}" in body
    assert "<title>owned</title>" not in dom
    assert not re.search(r"<img\b", dom)


@pytest.mark.parametrize(
    ("query", "ids"), [("q=river", ["7"]), ("q=SUN", ["12"]), ("31", ["31"]), ("q=zebra", []), ("%", ["12", "7", "31"])]
)
def test_the_search_finds_marked_tokens_and_numbers(tmp_path: Path, query: str, ids: list[str]) -> None:
    body = re.sub(r"<script.*?</script>", "", opened(tmp_path, f"#{query}", "--dump-dom"), flags=re.DOTALL)
    assert re.findall(r'data-id="(\d+)"', body) == ids
    assert ("No feature matches." in body) == (not ids)


def test_the_marks_have_a_colour(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = Path(os.environ.get("INTAGLIO_SCREENSHOT", tmp_path / "page.png"))
    opened(tmp_path, "", f"--screenshot={picture}", "--window-size=1100,800")
    with image.open(picture) as shown:
        colours = {colour for _, colour in shown.convert("RGB").getcolors(1 << 24)}
    assert any(red > blue + 60 for red, _, blue in colours)
