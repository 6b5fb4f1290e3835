"""Fitting on a model: one pass for several dictionaries, exact resume, measurements, and what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from intaglio.checkpoint import Checkpoint, load
from intaglio.data.segments import Segments
from intaglio.dictionaries import activations as streamed
from intaglio.dictionaries import fitting
from intaglio.dictionaries.activations import ActivationStream, split_held_out, token_segments
from intaglio.dictionaries.baselines import TopKSAE
from intaglio.dictionaries.dictionary import SparseDictionary
from intaglio.errors import IntaglioError
from intaglio.methods.activations.gba_sae import GBASAE
from intaglio.modeling.anatomy import anatomy
from intaglio.modeling.sites import Site, hooked, read_sites
from tests.families import tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (11, 9), generator=torch.Generator().manual_seed(0))
FIELDS: dict[str, Any] = {
    "layer": 1, "width": 24, "tokens": 200, "batch_tokens": 16, "buffer": 48, "groups": 3, "adapt_every": 2,
}  # fmt: skip
SEVERAL = {**FIELDS, "seeds": 2, "layer": [0, 1], "beside": [{"topk_sae": {"k": 3}}, {"l1_sae": {"layer": 0}}]}


def checkpoint(family: str = "llama") -> Checkpoint:
    return Checkpoint(tiny_model(family, layers=2), tiny_tokenizer(family), "tiny")


def stream(**changes: Any) -> ActivationStream:
    own: dict[str, Any] = {
        "parts": anatomy(checkpoint().model), "sites": (Site(0), Site(1, "mlp")), "data": Segments.of(IDS),
        "tokens": 250, "buffer": 50, "skip": 1, "batch_size": 2, "seed": 3,
    }  # fmt: skip
    return ActivationStream(**own | changes)


# --- the stream -------------------------------------------------------------------------------------------------------


def test_a_pass_gives_every_token_once_but_the_first_ones() -> None:
    own = stream(tokens=88)  # eight of nine tokens of each segment
    x_ND = torch.cat([own.chunk(index)[Site(0)] for index in range(len(own))])
    expected = read_sites(own.parts, (Site(0),), {"input_ids": IDS})[Site(0)][:, 1:].reshape(-1, 32)
    assert len(own) == 2
    assert [own.size(index) for index in range(2)] == [48, 40]
    gaps = torch.cdist(x_ND.double(), expected.double()).min(1)
    assert float(gaps.values.max()) < 1e-4
    assert sorted(gaps.indices.tolist()) == list(range(88))
    assert gaps.indices.tolist() != list(range(88))
    assert stream(skip=0, tokens=99).chunk(0)[Site(0)].shape == (45, 32)


def test_sites_are_in_step_and_later_passes_have_an_order_of_their_own() -> None:
    own = stream(tokens=176, buffer=88)
    chunks = [own.chunk(index) for index in range(2)]
    assert len(own) == 2
    first, second = (chunk[Site(0)].double() for chunk in chunks)
    places = torch.cdist(first, second).min(1).indices.tolist()
    assert sorted(places) == list(range(88))
    assert places != list(range(88))
    assert torch.equal(own.chunk(1)[Site(0)], chunks[1][Site(0)])
    assert not torch.equal(stream(tokens=176, buffer=88, seed=4).chunk(0)[Site(0)], chunks[0][Site(0)])
    hidden = read_sites(own.parts, own.sites, {"input_ids": IDS})
    pairs = torch.cat([hidden[site][:, 1:].reshape(-1, 32) for site in own.sites], 1)
    shuffled = torch.cat([chunks[0][site] for site in own.sites], 1)
    assert float(torch.cdist(shuffled.double(), pairs.double()).min(1).values.max()) < 1e-4


def test_padding_is_left_out() -> None:
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 7:] = False
    own = stream(data=Segments(IDS, mask), tokens=88)
    assert sum(len(own.chunk(index)[Site(0)]) for index in range(len(own))) == 66
    mask[3:, 1:] = False
    given = token_segments(checkpoint(), Segments(IDS, mask), 88, 9, 1, 0)
    assert torch.equal(given.ids_NT, IDS[:3])
    assert torch.equal(given.mask_NT, mask[:3])
    with pytest.raises(IntaglioError, match="the first 7 tokens of all segments are skipped and the others are padd"):
        token_segments(checkpoint(), Segments(IDS, mask), 88, 9, 7, 0)


def test_activations_that_are_not_finite_are_refused_with_their_batch() -> None:
    own = stream()
    with torch.no_grad():
        own.parts.embedding.weight[int(IDS[own._order(2, 3)[0], 4])] = torch.nan
    with pytest.raises(IntaglioError, match=r"the activations of layers.0 hold NaN or infinite values in batch \d of"):
        own.chunk(0)


def test_short_texts_give_fewer_segments_and_held_out_ones_are_a_tenth() -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 9, "and then the dog sleeps in the sun " * 9]
    few = token_segments(checkpoint(), texts, 10_000, 12, 1, 0)
    enough = token_segments(checkpoint(), texts, 44, 12, 1, 0)
    assert few.n > enough.n == 4
    assert torch.equal(few.ids_NT[:4], enough.ids_NT)
    training, held_out = split_held_out(Segments.of(IDS))
    assert torch.equal(torch.cat([training.ids_NT, held_out.ids_NT]), IDS)
    assert held_out.n == 1
    assert split_held_out(Segments.of(IDS[:1]))[0].n == 1
    many = Segments.of(IDS.repeat(100, 1))
    assert split_held_out(many)[1].n == streamed.HELD_OUT


# --- several dictionaries ---------------------------------------------------------------------------------------------


def test_several_dictionaries_share_a_pass_and_equal_those_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = checkpoint()
    passes: list[int] = []
    original = streamed.read_sites
    monkeypatch.setattr(streamed, "read_sites", lambda *args: passes.append(1) or original(*args))
    method = GBASAE(**SEVERAL)
    method.fit(ckpt, IDS, seed=5, batch_size=2)
    count = len(passes)
    names = [
        "gba_sae.layers.0", "gba_sae.layers.0.seed1", "gba_sae.layers.1", "gba_sae.layers.1.seed1",
        "topk_sae.layers.0", "topk_sae.layers.0.seed1", "topk_sae.layers.1", "topk_sae.layers.1.seed1",
        "l1_sae.layers.0", "l1_sae.layers.0.seed1",
    ]  # fmt: skip
    assert list(method.dictionaries) == names
    passes.clear()
    alone = GBASAE(**FIELDS).fit(checkpoint(), IDS, seed=5, batch_size=2)
    assert len(passes) == count
    mine, other = (one.attachments["gba_sae"].tensors for one in (ckpt, alone))
    for name in ("W_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(mine[f"gba_sae.layers.1:{name}"], other[f"gba_sae.layers.1:{name}"])
    seeds = [method.dictionary(name).decoder_MD for name in names[2:4]]
    assert not torch.equal(*seeds)
    topk = method.dictionary("topk_sae.layers.1")
    assert (topk.architecture, topk.k, topk.width, topk.site) == ("topk", 3, 24, Site(1))
    own = {name: value for name, value in FIELDS.items() if name not in ("groups", "adapt_every")}
    other_topk = TopKSAE(**own, k=3)
    other_topk.fit(checkpoint(), IDS, seed=5, batch_size=2)
    for name, tensor in topk.tensors.items():
        assert torch.equal(other_topk.dictionary().tensors[name], tensor)
    assert {"shared_latents", "shared_strongest", "fvu", "l0", "alive", "loss_recovered"} <= topk.about.keys()


def test_two_of_a_kind_have_names_of_their_own() -> None:
    method = GBASAE(**FIELDS, beside=[{"topk_sae": {"k": 3}}, {"topk_sae": {"k": 4}}])
    assert [job.method.k for job in method.jobs(2, 0).values() if isinstance(job.method, TopKSAE)] == [3, 4]


def test_dictionaries_beside_have_the_fields_of_the_pass_and_may_have_others_of_their_own() -> None:
    fields = {
        "layer": [0, 1], "site": "mlp", "width": 30, "tokens": 300, "length": 20, "skip": 2, "batch_tokens": 40,
        "buffer": 99, "warmup": 3, "decay": 0.5, "seeds": 3,
    }  # fmt: skip
    (topk,) = GBASAE(**fields, beside=[{"topk_sae": {"k": 3}}]).companions()
    assert {name: getattr(topk, name) for name in fields} == fields
    changed = {"layer": 1, "site": "z", "width": 8, "batch_tokens": 4, "warmup": 5, "decay": 0.1, "seeds": 1}
    (topk,) = GBASAE(**fields, beside=[{"topk_sae": {"k": 3, **changed}}]).companions()
    assert {name: getattr(topk, name) for name in fields} == fields | changed


def test_the_middle_layer_is_the_default() -> None:
    assert GBASAE().sites(30) == (Site(15),)


def test_a_killed_fit_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second chunk's state, and once more while that of the third is written."""
    expected = GBASAE(**SEVERAL).fit(checkpoint(), IDS, seed=1).attachments["gba_sae"]

    class Killed(Exception):
        pass

    saves: list[int] = []
    original = fitting._save

    def save(directory: Path, step: int, state: dict[str, Any]) -> None:
        saves.append(step)
        if step == 3 and saves.count(3) == 1:
            (directory / "checkpoint-3").mkdir()
            (directory / "checkpoint-3" / fitting.TENSORS).write_bytes(b"half")
            raise Killed
        original(directory, step, state)

    monkeypatch.setattr(fitting, "_save", save)
    with pytest.raises(Killed):
        GBASAE(**SEVERAL).fit(checkpoint(), IDS, seed=1, directory=tmp_path / "run")
    resumed = GBASAE(**SEVERAL).fit(checkpoint(), IDS, seed=1, directory=tmp_path / "run", resume=True)
    assert saves[:4] == [1, 2, 3, 3]
    again = GBASAE(**SEVERAL).fit(checkpoint(), IDS, seed=1, directory=tmp_path / "run", resume=True)
    for other in (resumed.attachments["gba_sae"], again.attachments["gba_sae"]):
        assert other.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in expected.tensors.items())
        assert other.about == expected.about


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    GBASAE(**FIELDS).fit(checkpoint(), IDS, directory=tmp_path / "run")
    with pytest.raises(IntaglioError, match="holds a run with another"):
        GBASAE(**FIELDS | {"step_down": 0.5}).fit(checkpoint(), IDS, directory=tmp_path / "run", resume=True)
    with pytest.raises(IntaglioError, match="holds a run with another"):
        GBASAE(**FIELDS).fit(checkpoint(), IDS + 1, directory=tmp_path / "run", resume=True)


# --- measurements -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_recovered() -> None:
    """(L_mean - L_dictionary) / (L_mean - L_clean): 1 for the identity, 0 for the mean."""
    ckpt, data = checkpoint(), Segments.of(IDS)
    parts, site = anatomy(ckpt.model), Site(0)
    logits = ckpt.model(IDS).logits[:, :-1]
    expected = float(F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
    assert fitting.next_token_loss(parts, data, 3) == pytest.approx(expected, rel=1e-5)

    class Mixed:
        share = 0.0

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return self.share * mean + (1 - self.share) * x

    mean = read_sites(parts, (site,), {"input_ids": IDS})[site][:, 1:].flatten(0, 1).mean(0)
    mixed = Mixed()
    assert fitting.loss_recovered(parts, mixed, site, data) == pytest.approx(1, abs=1e-4)
    mixed.share = 1.0
    assert fitting.loss_recovered(parts, mixed, site, data) == pytest.approx(0, abs=1e-4)
    with hooked(parts, {Site(1): torch.zeros_like}):  # the logits are the same whatever the site holds
        assert fitting.loss_recovered(parts, mixed, site, data) is None


@pytest.mark.parametrize("skip", [1, 3])
def test_the_measurements_are_those_of_the_held_out_segments(skip: int) -> None:
    ckpt = checkpoint()
    method = GBASAE(**FIELDS, skip=skip)
    method.fit(ckpt, IDS, batch_size=2)
    dictionary, site = method.dictionary(), Site(1)
    parts, held_out = anatomy(ckpt.model), Segments.of(IDS[-1:])
    x_ND = read_sites(parts, (site,), {"input_ids": held_out.ids_NT})[site][0, skip:]
    recovered = fitting.loss_recovered(parts, dictionary, site, held_out, skip=skip)
    assert dictionary.about["loss_recovered"] == pytest.approx(recovered, rel=1e-4)
    codes = dictionary.encode(x_ND)
    error = (x_ND - dictionary.decode(codes)).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert dictionary.about["fvu"] == pytest.approx(float(error), rel=1e-4)
    assert dictionary.about["l0"] == pytest.approx(float((codes != 0).sum(1).double().mean()))
    assert dictionary.about["max_activation"] == pytest.approx(codes.amax(0).tolist(), rel=1e-3, abs=1e-5)
    tiny = {name: 1e-8 * tensor if name == "W_enc" else tensor for name, tensor in dictionary.tensors.items()}
    faint = SparseDictionary("standard", {name: tiny[name] for name in ("W_enc", "W_dec", "b_dec", "b_enc")}, site=site)
    fitting.measure(ckpt, {"faint": faint}, held_out, skip=skip)
    highest = faint.encode(x_ND).amax(0).tolist()
    assert 0 < max(highest) < 1e-6
    assert faint.about["max_activation"] == pytest.approx(highest, rel=1e-3, abs=0)
    step = ckpt.record.steps[-1]
    assert step.chosen["gba_sae.layers.1"]["fvu"] == dictionary.about["fvu"]


def test_a_latent_is_alive_that_fired_in_the_last_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int] = []
    monkeypatch.setattr(fitting.TrainingRun, "alive", lambda run, window: windows.append(window) or 0.25)
    method = GBASAE(**FIELDS)
    method.fit(checkpoint(), IDS)
    in_memory = GBASAE(**FIELDS).fit_activations(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    assert windows == [40, 40]
    assert [one.dictionary().about["alive"] for one in (method, in_memory)] == [0.25, 0.25]


def test_the_strongest_latents_are_compared_between_seeds_too() -> None:
    about = [{"max_activation": [5.0, *[1.0] * 19]}, {"max_activation": [1.0] * 18 + [4.0, 4.0]}]
    rows = torch.eye(20)
    others = torch.cat([rows[:1], -rows[1:]])
    dictionaries = {
        name: SparseDictionary("standard", {
            "W_enc": decoder.T.contiguous(), "W_dec": decoder, "b_dec": torch.zeros(20), "b_enc": torch.zeros(20)
        }, about=own)
        for name, decoder, own in zip("ab", (rows, others), about, strict=True)
    }  # fmt: skip
    method = GBASAE(**FIELDS)
    fitting._note_shared({name: fitting.Job(method, Site(1), seed) for seed, name in enumerate("ab")}, dictionaries)
    assert [one.about["shared_latents"] for one in dictionaries.values()] == [0.05, 0.05]
    assert [one.about["shared_strongest"] for one in dictionaries.values()] == [0.5, 0.0]


def test_encoders_are_fitted_too() -> None:
    method = GBASAE(**FIELDS)
    ckpt = method.fit(checkpoint("bert"), IDS)
    assert "loss_recovered" not in method.dictionary().about
    assert "fvu" in method.dictionary().about
    assert not ckpt.model.training


# --- what is attached -------------------------------------------------------------------------------------------------


def test_what_is_attached_comes_back(tmp_path: Path) -> None:
    ckpt = checkpoint()
    method = GBASAE(**SEVERAL)
    method.fit(ckpt, IDS)
    ckpt.save(tmp_path / "out")
    back = load(tmp_path / "out").fitted("gba_sae")
    assert back.model_dump() == GBASAE(**SEVERAL).model_dump()
    assert list(back.dictionaries) == list(method.dictionaries)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.encode(x), method.encode(x))
    assert torch.equal(back.decode(back.encode(x)), method.decode(method.encode(x)))
    named = back.dictionary("topk_sae.layers.1")
    assert isinstance(named, SparseDictionary)
    assert named.about == method.dictionary("topk_sae.layers.1").about


@pytest.mark.parametrize(
    ("fields", "texts", "says"),
    [
        ({"layer": 2}, IDS, "layer is 2; the model has the layers 0 to 1"),
        ({}, None, "a dictionary is trained on activations of text"),
        ({"skip": 9}, IDS, "segments have 9 tokens and skip is 9"),
        ({"skip": 12, "length": 12}, ["the quick brown fox"], "length is 12 and skip is 12"),
        ({"beside": [{"topk_sae": {"k": 99}}]}, IDS, "beside.topk_sae.*width is 24 and k is 99"),
        ({"beside": [{"topk_sae": {"kk": 9}}]}, IDS, "beside.topk_sae.kk: there is no such field"),
    ],
)
def test_bad_input_is_one_sentence(fields: dict[str, Any], texts: Any, says: str) -> None:
    ckpt = checkpoint()
    with pytest.raises(IntaglioError, match=says) as caught:
        GBASAE(**FIELDS | fields).fit(ckpt, texts)
    assert "\n" not in str(caught.value)
    assert ckpt.record.steps == []
    assert ckpt.attachments == {}


def test_nothing_fitted_and_unknown_names() -> None:
    with pytest.raises(IntaglioError, match="gba_sae has no dictionary yet"):
        GBASAE().encode(torch.ones(1, 2))
    method = GBASAE(**FIELDS)
    method.fit(checkpoint(), IDS)
    with pytest.raises(IntaglioError, match="there is no dictionary 'other'"):
        method.dictionary("other")
