"""OMP transplant: every line of what "faithful" means, the joins of vocabularies, and the baselines."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from intaglio.checkpoint import Checkpoint, from_scratch, load
from intaglio.checkpoint.from_scratch import byte_letters, new
from intaglio.errors import IntaglioError
from intaglio.methods.decoding import lud
from intaglio.methods.weights.omp_transplant import Donor, OMPTransplant, Vocabulary, match_tokens, omp, scaled_k
from intaglio.methods.weights.omp_transplant.baselines import (
    landmark_pca,
    linear_map,
    neighbours,
    normal,
    sparse_basis,
    subword,
    undertrained,
)
from intaglio.methods.weights.omp_transplant.matching_pursuit import Rope, mp_rope
from intaglio.methods.weights.omp_transplant.vocabulary import Token
from tests.alive import alive, carved, refused
from tests.families import VOCAB, tiny_checkpoint_dir, tiny_model, tiny_tokenizer

# A donor with the same tokens, and one with others.
_DONORS = Path(tempfile.mkdtemp(prefix="intaglio-donors-"))
atexit.register(shutil.rmtree, _DONORS, ignore_errors=True)
_OTHER = from_scratch.new(
    "llama", width=24, depth=1, vocab=VOCAB + 200, seed=2, tokenizer=["a rather quick, lazy river 1995\n" * 9]
).save(_DONORS / "other")
EXAMPLES = (
    {"donor": str(tiny_checkpoint_dir("llama", _DONORS / "same", seed=1))},
    {"donor": str(_OTHER), "k": 3, "join": "strings", "byte_match": "both"},
    {"donor": str(_OTHER), "method": "linear", "noise": 0.01, "digits": "single"},
)
_SPELT = str(_DONORS / "spelt")
BASE = {"donor": str(_OTHER), "k": 3}
ALIVE = {
    "donor": str(_DONORS / "same"),
    "method": "subword",
    "k": 2,
    "join": alive("strings", donor=_SPELT, least_overlap=0.0),
    "byte_match": alive("embedding", join="strings", donor=_SPELT, least_overlap=0.0),
    "prefix_match": "both",
    "metric": alive("cosine", method="common_interpolation"),
    "weighting": alive("barycentric", method="common_interpolation"),
    "pieces": alive("sum", method="subword"),
    "magikarp": True,
    "noise": 0.01,
    "scale": 2.0,
    "digits": alive("single", donor=_SPELT, least_overlap=0.0),
    "least_overlap": refused(1.0),
    "dtype": "float64",
    "batch": 5,
}


def observe(method: OMPTransplant) -> Any:
    if not Path(_SPELT).exists():
        tokenizer = metaspace(["▁return", "12", "123", "1", "2", "3", "▁", "é"])
        Checkpoint(tiny_model("llama", layers=1, vocab_size=len(tokenizer)), tokenizer).save(_SPELT)
    return carved(method)


CODE = [
    "def area(width, height):\n    return width * height\n\nfor item in items:\n    print(item, 1234)\n" * 3,
    "class Thing:\n    def __init__(self, name):\n        self.name = name\n    # café, naïve\n" * 3,
]
PROSE = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun for an hour in 1995\n" * 3,
    "she said that the other one is there, and there is no other thing in it; return to the river at 12345\n" * 3,
]
F64 = torch.float64


@functools.cache
def _made(which: str, width: int, **fields: Any) -> Checkpoint:
    texts = {"base": CODE, "donor": PROSE + CODE[:1]}[which]
    return new("llama", width=width, depth=1, tokenizer=texts, vocab=330 if which == "base" else 360, seed=len(which))


def base(width: int = 16, tied: bool = True) -> Checkpoint:
    made = copy.deepcopy(_made("base", width))
    return made if tied else _untied(made)


def donor(width: int = 24, tied: bool = True) -> Checkpoint:
    made = copy.deepcopy(_made("donor", width))
    return made if tied else _untied(made)


def _untied(made: Checkpoint) -> Checkpoint:
    model: Any = made.model
    model.config.tie_word_embeddings = False
    weight = model.get_input_embeddings().weight
    model.lm_head.weight = nn.Parameter(torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)))
    return made


def matrices(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    model: Any = checkpoint.model
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def transplanted(own: Checkpoint, other: Checkpoint, **fields: Any) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return OMPTransplant(donor="donor", **fields).transplant(own, Donor.from_checkpoint(other))


# --- the pursuit -----------------------------------------------------------------------------------------------------


def slow(y: Tensor, atoms: Tensor, k: int) -> tuple[list[int], Tensor]:
    """The algorithm in words: one target, and a least-squares fit a step."""
    support: list[int] = []
    residual = y
    for _ in range(k):
        score = (atoms @ residual).abs()
        score[support] = -1
        support.append(int(score.argmax()))
        weight = torch.linalg.lstsq(atoms[support].T, y[:, None]).solution[:, 0]
        residual = y - atoms[support].T @ weight
    return support, weight


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([0, 1 << 30]), st.integers(1, 9))
def test_equals_the_slow_algorithm(seed: int, k: int, gram: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    atoms_ND = torch.randn(40, 32, generator=generator, dtype=F64)
    y_TD = torch.randn(20, 32, generator=generator, dtype=F64)
    found = omp(y_TD, atoms_ND, k, gram_bytes=gram, batch=batch)
    for place in range(len(y_TD)):
        support, weight = slow(y_TD[place], atoms_ND, k)
        assert found.support_TK[place].tolist() == support
        assert torch.allclose(found.weight_TK[place], weight, atol=1e-9)


def test_the_worked_example() -> None:
    atoms = torch.tensor([[3.0, 0, 0], [0, 2, 0], [1, 1, 1], [0, 0, 1]])
    y = torch.tensor([[2.0, 2, 0]])
    one, two = omp(y, atoms, 1), omp(y, atoms, 2)
    assert one.support_TK.tolist() == [[0]]
    assert torch.allclose(one.weight_TK, torch.tensor([[2 / 3]]))
    assert two.support_TK.tolist() == [[0, 1]]
    assert torch.allclose(two.weight_TK, torch.tensor([[2 / 3, 1]]))
    assert torch.allclose(two.combine(atoms), y)


def test_atoms_are_not_normalised() -> None:
    found = omp(torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]]), 1)
    assert found.support_TK.tolist() == [[1]]


@pytest.mark.parametrize("gram", [0, 1 << 30])
def test_supports_of_four_atoms_are_recovered(gram: int) -> None:
    generator = torch.Generator().manual_seed(0)
    atoms_ND = nn.functional.normalize(torch.randn(400, 64, generator=generator), dim=1)
    support_T4 = torch.stack([torch.randperm(400, generator=generator)[:4] for _ in range(200)])
    weight_T4 = (1 + torch.rand(200, 4, generator=generator)) * torch.randint(2, (200, 4), generator=generator).mul(
        2
    ).sub(1)
    y_TD = (weight_T4[:, :, None] * atoms_ND[support_T4]).sum(1)
    found = omp(y_TD, atoms_ND, 4, gram_bytes=gram)
    assert torch.equal(found.support_TK.sort(1).values, support_T4.sort(1).values)
    assert float((found.combine(atoms_ND) - y_TD).norm(dim=1).max()) < 1e-5


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, F64]))
def test_residuals_shrink_and_are_orthogonal_and_supports_distinct(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    atoms_ND = torch.randn(50, 16, generator=generator).to(dtype)
    y_TD = torch.randn(6, 16, generator=generator).to(dtype)
    before = y_TD.norm(dim=1)
    for k in range(1, 16, 2):
        found = omp(y_TD, atoms_ND, k)
        residual_TD = y_TD - found.combine(atoms_ND)
        now = residual_TD.norm(dim=1)
        assert bool((now <= before + 1e-5).all())
        before = now
        chosen_TKD = atoms_ND[found.support_TK]
        inner = (chosen_TKD @ residual_TD[:, :, None]).squeeze(2).abs() / (
            chosen_TKD.norm(dim=2) * y_TD.norm(dim=1, keepdim=True)
        )
        assert float(inner.max()) < (1e-4 if dtype == torch.float32 else 1e-9)
        assert all(len(set(row)) == k for row in found.support_TK.tolist())


def test_more_atoms_than_dimensions_add_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    atoms_ND = torch.randn(30, 6, generator=generator, dtype=F64)
    y_TD = torch.cat([torch.randn(5, 6, generator=generator, dtype=F64), torch.zeros(1, 6, dtype=F64)])
    found = omp(y_TD, atoms_ND, 30)
    assert torch.allclose(found.combine(atoms_ND), y_TD, atol=1e-9)
    assert float(found.weight_TK.abs().max()) < 1e3
    assert bool((found.weight_TK[-1] == 0).all())
    for k in (0, 31):
        with pytest.raises(ValueError, match="from 1 to 30"):
            omp(y_TD, atoms_ND, k)


@pytest.mark.parametrize("k", [3, 12])
def test_a_linear_map_between_the_spaces_is_kept(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    atoms_ND, map_DE = (
        torch.randn(60, 12, generator=generator, dtype=F64),
        torch.randn(12, 7, generator=generator, dtype=F64),
    )
    y_TD = torch.randn(9, 12, generator=generator, dtype=F64)
    found = omp(y_TD, atoms_ND, k)
    residual_TD = y_TD - found.combine(atoms_ND)
    assert torch.allclose(found.combine(atoms_ND @ map_DE), (y_TD - residual_TD) @ map_DE, atol=1e-10)
    if k == 12:
        assert float(residual_TD.abs().max()) < 1e-10
    assert torch.allclose(y_TD @ linear_map(atoms_ND, atoms_ND @ map_DE), y_TD @ map_DE, atol=1e-10)


# --- the transplant --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("other_tied", [True, False])
def test_shared_rows_are_copied_bit_for_bit_and_new_ones_lie_in_a_span_of_k(tied: bool, other_tied: bool) -> None:
    own, other = base(tied=tied), donor(tied=other_tied)
    before, joined = (
        matrices(own),
        match_tokens(Vocabulary.from_tokenizer(own.tokenizer), Vocabulary.from_tokenizer(other.tokenizer)),
    )
    before = tuple(matrix.clone() for matrix in before)  # type: ignore[assignment]
    given = matrices(other)
    done = transplanted(own, other, k=3, dtype="float64")
    after = matrices(done)
    assert (after[0] is after[1]) or tied is False or torch.equal(*after)
    assert ("head" in done.record.steps[-1].chosen) is not tied
    ids, base_ids = list(joined.ids), list(joined.ids.values())
    fresh = sorted(set(joined.donor.tokens) - set(ids))
    assert fresh
    assert done.vocabulary == joined.donor.rows
    for place in (0, 1) if not tied else (0,):
        assert torch.equal(after[place][ids], before[place][base_ids])
        code = omp(given[place][fresh].double(), given[place][ids].double(), 3)
        made = code.combine(before[place][base_ids].double())
        assert torch.allclose(after[place][fresh].double(), made, atol=1e-6)
        for row, support in zip(after[place][fresh], code.support_TK, strict=True):
            atoms = before[place][base_ids][support].double()
            assert int(torch.linalg.matrix_rank(torch.cat([atoms, row[None].double()]), atol=1e-4)) == 3


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "gpt2", "modernbert"])
def test_onto_itself_it_is_the_identity(family: str) -> None:
    own = Checkpoint(tiny_model(family), tiny_tokenizer(family), source="tiny")
    ids = torch.randint(8, 150, (2, 12))
    with torch.no_grad():
        expected = own.model(ids).logits
        assert torch.equal(transplanted(own, copy.deepcopy(own)).model(ids).logits, expected)
    for (name, old), new_ in zip(tiny_model(family).named_parameters(), own.model.parameters(), strict=True):
        assert torch.equal(old, new_), name
    assert own.record.steps[-1].chosen["embedding"]["new"] == 0


def test_a_permuted_vocabulary_says_the_same_text() -> None:
    own = base()
    count = len(own.tokenizer)
    own.model.resize_token_embeddings(count, mean_resizing=False)  # type: ignore[operator]
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    backend = json.loads(own.tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] = {text: ids[i] for text, i in own.tokenizer.get_vocab().items()}
    for token in backend["added_tokens"]:
        token["id"] = ids[token["id"]]
    names = {name: getattr(own.tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "mask_token")}
    mixed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **names)
    other = donor()
    model: Any = other.model
    model.resize_token_embeddings(count, mean_resizing=False)
    other.tokenizer = mixed
    for role in ("pad", "bos", "eos"):
        setattr(model.config, f"{role}_token_id", getattr(mixed, f"{role}_token_id"))
    before = matrices(own)[0].clone()
    done = transplanted(copy.deepcopy(own), other)
    assert torch.equal(matrices(done)[0][ids], before)
    for checkpoint in (own, done):
        prompt = torch.tensor([checkpoint.tokenizer.encode("def area(", add_special_tokens=False)])
        said = checkpoint.model.generate(prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        checkpoint.source = checkpoint.tokenizer.decode(said[0])
    assert own.source == done.source


def test_the_batch_changes_nothing() -> None:
    one, other = (transplanted(base(), donor(), k=4, batch=batch) for batch in (3, 512))
    assert torch.allclose(matrices(one)[0], matrices(other)[0], atol=1e-6)


def test_ids_config_template_and_tokenizer_are_the_donors(tmp_path: Path) -> None:
    own, other = base(), donor()
    other.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    other.model.generation_config.eos_token_id = [5, 6]  # type: ignore[union-attr]
    own.model.generation_config.suppress_tokens = [3]  # type: ignore[union-attr]
    setattr(own.model.config, lud.NOTE, {"pad": 3, "cap": 4, "vocabulary": own.vocabulary})
    other.save(tmp_path / "donor")
    transplant = OMPTransplant(donor=str(tmp_path / "donor"))
    with pytest.warns(UserWarning, match="a number token has up to"):
        transplant.apply(own)
    own.save(tmp_path / "out")
    back = load(tmp_path / "out")
    config: Any = back.config
    for role in ("pad", "bos", "eos"):
        assert getattr(config, f"{role}_token_id") == getattr(other.tokenizer, f"{role}_token_id")
    assert config.vocab_size == back.vocabulary == other.vocabulary
    assert back.model.generation_config.eos_token_id == [5, 6]  # type: ignore[union-attr]
    assert back.model.generation_config.suppress_tokens is None  # type: ignore[union-attr]
    assert back.tokenizer.chat_template == other.tokenizer.chat_template
    assert back.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert not hasattr(back.model.config, lud.NOTE)
    told = back.record.steps[-1].chosen
    assert told["tokens"]["shared"] + told["embedding"]["new"] == told["tokens"]["donor"]
    assert 0 < told["embedding"]["reconstruction error"] < 1
    assert {"mean norm of new rows", "mean norm of shared rows"} <= told["embedding"].keys()
    assert transplant.new_tokens(base().tokenizer, back.tokenizer)


def test_only_two_tensors_of_the_donor_are_read(tmp_path: Path) -> None:
    other = donor(tied=False)
    other.save(tmp_path / "donor")
    path = tmp_path / "donor" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    read = Donor.load(str(tmp_path / "donor"))
    assert torch.equal(read.embedding_VD, matrices(other)[0])
    assert read.head_VD is not None
    assert torch.equal(read.head_VD, matrices(other)[1])


def test_padded_rows_and_ids_beyond_the_rows() -> None:
    own, other = base(), donor()
    own.model.resize_token_embeddings(own.vocabulary + 7, mean_resizing=False)  # type: ignore[operator]
    rows = other.vocabulary
    other.model.resize_token_embeddings(rows - 4, mean_resizing=False)  # type: ignore[operator]
    done = transplanted(own, other)
    assert done.vocabulary == rows
    assert bool((matrices(done)[0][rows - 4 :] == 0).all())
    assert done.record.steps[-1].chosen["embedding"]["zero"] == 4


@pytest.mark.parametrize(
    "method",
    [
        "zero",
        "mean",
        "randn",
        "john_hewitt",
        "subword",
        "common_interpolation",
        "landmark_pca",
        "stb",
        "mp_rope",
        "linear",
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_baseline_keeps_shared_rows_and_runs(method: Any, family: str) -> None:
    if (method, family) == ("mp_rope", "bert"):
        return
    own = base(tied=False) if family == "llama" else Checkpoint(tiny_model("bert"), tiny_tokenizer("bert"))
    other = donor()
    before = matrices(own)[0].clone()
    done = transplanted(own, other, method=method, k=4)
    joined = match_tokens(
        Vocabulary.from_tokenizer(base().tokenizer if family == "llama" else tiny_tokenizer("bert")),
        Vocabulary.from_tokenizer(other.tokenizer),
    )
    assert torch.equal(matrices(done)[0][list(joined.ids)], before[list(joined.ids.values())])
    fresh = matrices(done)[0][sorted(set(joined.donor.tokens) - set(joined.ids))]
    assert bool(torch.isfinite(fresh).all())
    assert bool((fresh == 0).all()) == (method == "zero")
    if method == "mean":
        assert torch.allclose(fresh[0], before.mean(0), atol=1e-6)


def test_bias_of_a_head_goes_with_its_row() -> None:
    own = Checkpoint(tiny_model("bert"), tiny_tokenizer("bert"))
    bias = own.model.get_output_embeddings().bias.detach().clone()  # type: ignore[operator]
    joined = match_tokens(Vocabulary.from_tokenizer(own.tokenizer), Vocabulary.from_tokenizer(donor().tokenizer))
    done = transplanted(own, donor())
    after: Any = done.model.get_output_embeddings()  # type: ignore[operator]
    assert torch.equal(after.bias[list(joined.ids)], bias[list(joined.ids.values())])
    assert len(after.bias) == done.vocabulary
    assert bool((after.bias[sorted(set(joined.donor.tokens) - set(joined.ids))] != 0).any())


def test_noise_scale_and_seed() -> None:
    plain = matrices(transplanted(base(), donor()))[0]
    scaled = matrices(transplanted(base(), donor(), scale=0.5))[0]
    noisy, again = (matrices(transplanted(base(), donor(), noise=0.1))[0] for _ in range(2))
    fresh = (plain != scaled).any(1)
    assert fresh.any()
    assert torch.allclose(scaled[fresh], 0.5 * plain[fresh])
    assert torch.equal(noisy, again)
    assert abs(float((noisy - plain)[fresh].std()) - 0.1) < 0.02
    assert torch.equal(noisy[~fresh], plain[~fresh])


def test_half_precision_is_computed_up_and_stored_down() -> None:
    own = base()
    own.model.to(torch.bfloat16)
    done = transplanted(own, donor(), k=4)
    exact = base()
    exact.model.to(torch.bfloat16).float()
    assert matrices(done)[0].dtype == torch.bfloat16
    assert torch.equal(matrices(done)[0], matrices(transplanted(exact, donor(), k=4))[0].to(torch.bfloat16))


def test_prefixes_go_where_they_are_asked_for() -> None:
    for where, places in (("embedding", (True, False)), ("head", (False, True)), ("both", (True, True))):
        own, other = base(tied=False), donor(tied=False)
        chosen = transplanted(own, other, prefix_match=where).record.steps[-1].chosen
        assert tuple("by prefix" in chosen[role] for role in ("embedding", "head")) == places


def test_under_trained_tokens_are_left_out_or_zero() -> None:
    own, other = base(tied=False), donor(tied=False)
    joined = match_tokens(Vocabulary.from_tokenizer(own.tokenizer), Vocabulary.from_tokenizer(other.tokenizer))
    i, j = next(iter(joined.ids.items()))
    matrices(own)[0][j] = 1e-6
    matrices(other)[0][i] = 1e-6
    fresh = sorted(set(joined.donor.tokens) - set(joined.ids))[0]
    matrices(other)[0][fresh] = 1e-6
    done = transplanted(own, other, magikarp=True)
    assert bool((matrices(done)[0][[i, fresh]] == 0).all())
    only_base = list(joined.ids.items())[1]
    own, other = base(tied=False), donor(tied=False)
    matrices(own)[0][only_base[1]] = 1e-6
    done = transplanted(own, other, magikarp=True)
    assert float(matrices(done)[0][only_base[0]].norm()) > 1e-3  # made anew from well-trained tokens
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rows[199] = torch.ones(8)
    rows[5] = 1.01
    assert undertrained(rows, None, [], range(199)) == {5, 199}
    assert undertrained(torch.ones(10, 3), None, [9], range(10)) == {9}  # none is nearer than the others


@pytest.mark.parametrize("scheme", ["letters", "metaspace"])
def test_digit_by_digit(scheme: str) -> None:
    own, other = base(), donor()
    if scheme == "metaspace":
        other.tokenizer = metaspace(["▁return", "12", "123", "1", "2", "3", "▁"])
        other.model.resize_token_embeddings(len(other.tokenizer), mean_resizing=False)  # type: ignore[operator]
    assert Vocabulary.from_tokenizer(other.tokenizer).digits > 1
    done = transplanted(own, other, digits="single", least_overlap=0.0)
    assert Vocabulary.from_tokenizer(done.tokenizer).digits == 1
    ids = done.tokenizer("return 12312", add_special_tokens=False)["input_ids"]
    assert done.tokenizer.decode(ids).strip() == "return 12312"
    unsaid = done.model.generation_config.suppress_tokens  # type: ignore[union-attr]
    assert {done.tokenizer.convert_ids_to_tokens(i).strip("Ġ▁") for i in unsaid} <= {str(n) for n in range(10, 100000)}
    assert Vocabulary.from_tokenizer(other.tokenizer).digits > 1  # the donor's own is as it was


# --- vocabularies ----------------------------------------------------------------------------------------------------


def metaspace(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the SentencePiece kind with lone bytes."""
    special = special or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    letters = sorted({letter for word in words for letter in word})
    pieces = [
        *special.values(),
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *(w for w in words if len(w) > 1),
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def pairs_of(own: Any, other: Any, by: Any = "bytes") -> dict[str, str]:
    joined = match_tokens(Vocabulary.from_tokenizer(own), Vocabulary.from_tokenizer(other), by)
    return {joined.donor.tokens[i].text: joined.base.tokens[j].text for i, j in joined.ids.items()}


def test_across_kinds_the_bytes_are_compared() -> None:
    own = base().tokenizer
    word = max((text for text in own.get_vocab() if text[0] == "Ġ" and text[1:].isalpha()), key=len)
    space = metaspace([f"▁{word[1:]}", "é", "c", "a", "f", "▁"])
    found = pairs_of(own, space)
    assert found[f"▁{word[1:]}"] == word
    assert found["é"] == "Ã©"
    assert found["<0xE2>"] == byte_letters()[0xE2]
    assert found["<0x41>"] == "A"
    assert found["▁"] == "Ġ"
    assert found["</s>"] == "<|eos|>"
    strings = pairs_of(own, space, "strings")
    assert strings[f"▁{word[1:]}"] == word
    assert strings["é"] == "é"  # which is how the other spells byte 0xE9: why bytes are the default
    assert "<0xE2>" not in strings
    # The other way round a whole character's own token comes before the lone byte.
    assert pairs_of(space, own)["a"] == "a"
    assert pairs_of(space, own)["B"] == "<0x42>"


def test_lone_bytes_by_strings() -> None:
    own = Checkpoint(base().model, metaspace(["▁return", "c", "▁"]))
    joined = match_tokens(
        Vocabulary.from_tokenizer(own.tokenizer), Vocabulary.from_tokenizer(base().tokenizer), "strings"
    )
    token = next(t for t in joined.donor.tokens.values() if t.text == "B")
    found = joined.base.byte(token, joined.donor)
    assert found is not None
    assert joined.base.tokens[found].text == "<0x42>"
    assert joined.base.find(token, joined.donor, "strings") is None


@pytest.mark.parametrize("where", ["no", "embedding"])
def test_byte_tokens_are_matched_where_the_field_says(where: Any) -> None:
    method = OMPTransplant(donor=_SPELT, k=3, join="strings", byte_match=where, least_overlap=0.0)
    chosen = observe(method)[2]["chosen"]
    assert ("by byte" in chosen["embedding"]) == (where == "embedding")


def test_special_tokens_by_role_then_by_name() -> None:
    own = metaspace(["a"], unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    ends = metaspace(["a"], unk_token="?", bos_token="<|x|>", eos_token="<|x|>", cls_token="[CLS]", pad_token="[PAD]")
    found = pairs_of(own, ends)
    assert found["<|x|>"] == "</s>"  # it ends texts too
    assert (found["?"], found["[PAD]"], found["[CLS]"]) == ("<unk>", "<pad>", "<s>")
    ends.add_special_tokens({"additional_special_tokens": ["<tool>", "<pad>"]})
    own.add_special_tokens({"additional_special_tokens": ["<other>", "<tool>"]})
    found = pairs_of(own, ends)
    assert found["<tool>"] == "<tool>"
    assert found["[PAD]"] == "<pad>"


def test_prefixes_are_whole_characters_and_more_than_space() -> None:
    own, other = metaspace(["▁", "▁re", "c"]), metaspace(["▁return", "▁x", "cé", "▁"])
    joined = match_tokens(Vocabulary.from_tokenizer(own), Vocabulary.from_tokenizer(other))
    by_text = {t.text: t for t in joined.donor.tokens.values()}

    def prefix(text: str, by: Any = "bytes") -> str | None:
        found = joined.base.prefix(by_text[text], joined.donor, by)
        return None if found is None else joined.base.tokens[found].text

    for by in ("bytes", "strings"):
        assert prefix("▁return", by) == "▁re"
        assert prefix("▁x", by) is None
        assert prefix("cé", by) == "c"
        assert prefix("</s>", by) is None


@functools.cache
def letters() -> Vocabulary:
    return Vocabulary.from_tokenizer(base().tokenizer)


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=12))
def test_pieces_spell_the_token(text: str) -> None:
    own = letters()
    written = Token(0, text, text.encode("utf-8", "ignore"), "text")
    assert b"".join(own.tokens[i].content for i in own.pieces(written)) == written.content


def test_half_a_character_has_pieces() -> None:
    own = letters()
    half = Token(0, "", b"\xe2\x82", "text")
    assert [own.tokens[i].content for i in own.pieces(half)] == [b"\xe2", b"\x82"]
    space = Vocabulary.from_tokenizer(metaspace(["a"]))
    assert [space.tokens[i].content for i in space.pieces(half)] == [b"\xe2", b"\x82"]


# --- baselines -------------------------------------------------------------------------------------------------------


def test_subword_weights() -> None:
    rows = torch.eye(4)
    pieces = [[0, 1, 3], []]
    for role, weights in (("embedding", [1, 2, 0, 3]), ("head", [3, 2, 0, 1])):
        found = subword(rows, pieces, "weighted_mean", role)  # type: ignore[arg-type]
        assert torch.allclose(found[0], torch.tensor(weights) / 6)
        assert bool((found[1] == 0).all())
    assert subword(rows, pieces, "sum", "head")[0].tolist() == [1, 1, 0, 1]
    assert subword(rows, pieces, "first_last", "embedding")[0].tolist() == [0, 0, 0, 1]
    assert subword(rows, pieces, "first_last", "head")[0].tolist() == [1, 0, 0, 0]
    assert torch.allclose(subword(rows, pieces, "mean", "head")[0], torch.tensor([1, 1, 0, 1]) / 3)


def test_john_hewitt_has_the_rows_mean_and_covariance() -> None:
    rows = (
        torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        @ torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
        + 1
    )  # of rank 3
    drawn = normal(rows, 20_000, torch.Generator().manual_seed(2))
    assert torch.allclose(drawn.mean(0), rows.mean(0), atol=0.1)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(rows.T), atol=0.3)


def test_john_hewitt_divides_by_the_number_of_rows() -> None:
    """Rows of one column at -1 and 1 have the variance 1."""
    drawn = normal(torch.tensor([[-1.0], [1.0]], dtype=F64), 9, torch.Generator().manual_seed(2))
    expected = torch.randn((9, 1), generator=torch.Generator().manual_seed(2), dtype=F64)
    assert torch.allclose(drawn.abs(), expected.abs())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbours(metric: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    atoms_ND = torch.randn(30, 6, generator=generator, dtype=F64)
    y_TD = torch.randn(7, 6, generator=generator, dtype=F64)
    errors = {}
    for weighting in ("distance", "barycentric", "least_squares"):
        found = neighbours(y_TD, atoms_ND, 4, metric, weighting, 3)  # type: ignore[arg-type]
        errors[weighting] = float((found.combine(atoms_ND) - y_TD).norm())
        if weighting != "least_squares":
            assert torch.allclose(found.weight_TK.sum(1), torch.ones(7, dtype=F64))
    assert errors["least_squares"] <= errors["barycentric"] <= errors["distance"]
    alone = neighbours(atoms_ND[:3], atoms_ND, 1, metric, "distance", 3)
    assert alone.support_TK[:, 0].tolist() == [0, 1, 2]


def test_landmark_pca_undoes_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms_ND = torch.randn(50, 6, generator=generator, dtype=F64) * torch.arange(1, 7)
    turn_DD, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=F64))
    y_TD = torch.randn(5, 6, generator=generator, dtype=F64)
    found = landmark_pca(y_TD, atoms_ND, atoms_ND @ turn_DD + 2)
    assert torch.allclose(found, y_TD @ turn_DD + 2, atol=1e-9)


def test_a_sparse_basis_with_all_atoms_keeps_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms_ND, map_DE = (
        torch.randn(40, 6, generator=generator, dtype=F64),
        torch.randn(6, 9, generator=generator, dtype=F64),
    )
    y_TD = torch.randn(5, 6, generator=generator, dtype=F64)
    rows, near = sparse_basis(y_TD, atoms_ND, atoms_ND @ map_DE, 3)
    assert torch.allclose(near, y_TD, atol=1e-8)
    assert torch.allclose(rows, y_TD @ map_DE, atol=1e-8)


def test_a_rotated_atom_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    rope = Rope(heads=2, base=100.0)
    atoms_ND = torch.randn(3, 16, generator=generator, dtype=F64) * torch.tensor([[1.0], [1.0], [40.0]], dtype=F64)
    position = torch.tensor([0.4], dtype=F64)
    y_TD = 0.7 * rope.rotate(atoms_ND[2:], position)
    found = mp_rope(y_TD, atoms_ND, 1, rope)
    assert found.sparse.support_TK.tolist() == [[2]]
    assert torch.allclose(found.position_TK[0], position)
    assert torch.allclose(found.combine(atoms_ND, rope), y_TD)
    assert torch.allclose(rope.rotate(rope.rotate(y_TD, position), -position), y_TD)


# --- amounts and refusals --------------------------------------------------------------------------------------------


def test_k_is_scaled_to_the_width() -> None:
    assert [scaled_k(width, 10**6) for width in (8, 80, 576, 2048)] == [1, 8, 57, 64]
    assert scaled_k(2048, 5) == 5
    assert OMPTransplant.paper(donor="x").k == 64


def refusal(own: Checkpoint, other: Checkpoint, **fields: Any) -> str:
    before = [p.clone() for p in own.model.parameters()]
    tokenizer = own.tokenizer
    with pytest.raises(IntaglioError) as caught:
        transplanted(own, other, **fields)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, own.model.parameters(), strict=True))
    assert own.tokenizer is tokenizer
    assert own.record.steps == []
    return str(caught.value)


def test_refusals() -> None:
    assert "k is 400; the two vocabularies share" in refusal(base(), donor(), k=400)
    assert "least_overlap requires 99%" in refusal(base(), donor(), least_overlap=0.99)
    apart = donor()
    apart.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"яблоко": 0, "груша": 1}, "груша"))
    )
    assert "share no token" in refusal(base(), apart)
    bare = base()
    bare.tokenizer = None
    assert "has no tokenizer" in refusal(bare, donor())
    with pytest.raises(IntaglioError, match=r"donor: .*has no tokenizer"):
        Donor.from_checkpoint(Checkpoint(tiny_model("llama")))
    broken = donor()
    matrices(broken)[0][3, 1] = float("nan")
    assert "the embedding of new llama holds NaN or infinite values, first in row 3" in refusal(base(), broken)
    odd = base(tied=False)
    odd.model.lm_head = nn.Linear(16, 11)
    assert "has 11 rows for 330 embeddings" in refusal(odd, donor())
    odd.model.lm_head = nn.Sequential(nn.Linear(16, 330))
    odd.model.lm_head.weight = odd.model.lm_head[0].weight  # type: ignore[index]
    assert "is a Sequential, not a plain linear layer" in refusal(odd, donor())
    assert "mp_rope needs rotary positions" in refusal(
        Checkpoint(tiny_model("gpt2"), tiny_tokenizer("gpt2")), donor(), method="mp_rope"
    )


def test_an_unknown_donor_is_refused_before_any_work(tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path)):
        with pytest.raises(IntaglioError, match="donor: ") as caught:
            OMPTransplant(donor=name).apply(base())
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="byte_match needs join: strings"):
        OMPTransplant(donor="x", byte_match="both")


def test_a_large_k_warns() -> None:
    with pytest.warns(UserWarning, match="over half of the donor's width of 24"):
        OMPTransplant(donor="x", k=13).transplant(base(), Donor.from_checkpoint(donor()))


def test_a_neighbour_twice_as_far_weighs_half() -> None:
    code = neighbours(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 2, "euclidean", "distance", 1)
    assert code.support_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(code.weight_TK, torch.tensor([[2 / 3, 1 / 3]]))


def test_transplant_draws_from_seed_zero_in_the_precision_of_its_work() -> None:
    def noisy(dtype: str, **seed: int) -> Tensor:
        made = base()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            method = OMPTransplant(donor="donor", noise=0.1, dtype=dtype)  # type: ignore[arg-type]
            method.transplant(made, Donor.from_checkpoint(donor()), **seed)
        return matrices(made)[0]

    assert torch.equal(noisy("float32"), noisy("float32", seed=0))
    assert not torch.equal(noisy("float32"), noisy("float32", seed=1))
    # A generator draws other numbers in double precision.
    assert not torch.allclose(noisy("float64"), noisy("float32"), atol=1e-3)
