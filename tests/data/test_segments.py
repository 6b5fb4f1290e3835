"""Dimension letters: N segments, T tokens of a segment."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from intaglio.data.segments import Segments, segment_bytes, segments, special_affixes
from intaglio.data.texts import Corpus, document_hash
from intaglio.errors import IntaglioError

TRAINING_TEXT = "the cat and the dog — 日本日本 naïve naïve ééé the end"


def byte_level(bos: bool = False, added: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TRAINING_TEXT], trainer)
    if added:
        backend.add_tokens([AddedToken(added, special=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=16)


def word_level() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


BYTES = byte_level()
BYTES_BOS = byte_level(bos=True)
WORDS = word_level()


def corpus(n: int = 40) -> Corpus:
    return Corpus("c", tuple(f"document {i}: the cat and the dog" for i in range(n)))


def test_the_affixes_are_those_that_the_tokenizer_adds() -> None:
    assert special_affixes(BYTES) == ([], [])
    assert special_affixes(BYTES_BOS) == ([0], [])
    assert special_affixes(WORDS) == ([2], [3])


@pytest.mark.parametrize("tokenizer", [BYTES, BYTES_BOS, WORDS], ids=["plain", "bos", "cls_sep"])
def test_segments_are_the_front_of_the_joined_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Corpus("c", ("a b c d e f g h", "h g f e d c b a", "a a b b c c d d e e f f g g h h"))
    found = segments(tokenizer, texts, samples=2, length=12, seed=0, order="file")
    prefix, suffix = special_affixes(tokenizer)
    joined = tokenizer("\n\n".join(texts.documents), add_special_tokens=False, verbose=False)["input_ids"]
    inner = 12 - len(prefix) - len(suffix)
    assert found.ids_NT.tolist() == [prefix + joined[i * inner :][:inner] + suffix for i in range(2)]
    assert found.mask_NT is None
    assert (found.n, found.length, found.tokens) == (2, 12, 24)


def test_the_order_is_keyed_by_seed_and_document_alone() -> None:
    def order(texts: Corpus, seed: int) -> list[str]:
        found = segments(BYTES, texts, samples=1, length=400, seed=seed)
        return [d for d in BYTES.decode(found.ids_NT[0]).split("\n\n")[:-1] if d in texts.documents]

    full = corpus(60)
    half = Corpus("half", full.documents[59:19:-1])
    first, again = order(full, 0), order(half, 0)
    assert len(first) > 10
    shared = [d for d in first if d in half.documents]
    assert shared == again[: len(shared)]
    assert first != order(full, 1)
    assert first != list(full.documents[: len(first)])


def test_documents_are_keyed_by_their_hash() -> None:
    texts = corpus(5)
    keys = {d: hashlib.sha256(f"3:{document_hash(d)}".encode()).digest() for d in texts.documents}
    found = segments(BYTES, texts, samples=1, length=60, seed=3)
    expected = "\n\n".join(sorted(texts.documents, key=keys.__getitem__))
    assert expected.startswith(BYTES.decode(found.ids_NT[0]))


def test_fewer_samples_are_the_first_of_more_and_equal_calls_are_equal() -> None:
    few = segments(BYTES, corpus(), samples=3, length=16, seed=5)
    more = segments(BYTES, corpus(), samples=9, length=16, seed=5)
    assert torch.equal(more.ids_NT[:3], few.ids_NT)
    assert few.digest == segments(BYTES, corpus(), samples=3, length=16, seed=5).digest
    assert few.digest != segments(BYTES, corpus(), samples=3, length=16, seed=6).digest


def test_documents_behind_the_last_segment_are_not_tokenised() -> None:
    class Counting:
        calls = 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.calls += 1
            return BYTES(text, **options)

    counting = Counting()
    segments(counting, corpus(), samples=1, length=8, seed=0)  # type: ignore[arg-type]
    # Two calls look for the special tokens; one document is enough.
    assert counting.calls == 3


def test_long_documents_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        segments(BYTES, Corpus("c", ("the cat " * 200,)), samples=2, length=64, seed=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


def test_too_little_text_is_told_with_the_number_it_gives() -> None:
    texts = Corpus("tale", ("a b c d e f g h " * 5,))
    # 40 words, 8 of them a segment between [CLS] and [SEP].
    assert segments(WORDS, texts, samples=5, length=10, seed=0).n == 5
    with pytest.raises(IntaglioError, match="'tale' give 5 segments of 10 tokens, 6 are needed"):
        segments(WORDS, texts, samples=6, length=10, seed=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"length": 7}, "length is 7"),
        ({"order": "random"}, "accepted: shuffled, file"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        segments(BYTES, corpus(), **{"samples": 1, "length": 8, "seed": 0, **change})


def test_batches_cover_the_segments_in_order() -> None:
    ids_NT = torch.arange(35).reshape(5, 7)
    plain = list(Segments.of(ids_NT).batches(2))
    assert [set(batch) for batch in plain] == [{"input_ids"}] * 3
    assert torch.equal(torch.cat([batch["input_ids"] for batch in plain]), ids_NT)
    mask_NT = ids_NT % 3 > 0
    masked = Segments(ids_NT, mask_NT)
    assert masked.tokens == int(mask_NT.sum())
    assert torch.equal(torch.cat([b["attention_mask"] for b in masked.batches(3)]).bool(), mask_NT)
    assert masked.digest != Segments.of(ids_NT).digest
    assert Segments.of(ids_NT.reshape(7, 5)).digest != Segments.of(ids_NT).digest
    with pytest.raises(IntaglioError, match="batch_size is 0"):
        masked.batches(0)


@pytest.mark.parametrize(
    "ids", [[[1.5]], [1, 2], [[1, 2], [3]], [[]], torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 2, 3).long()]
)
def test_what_is_not_a_table_of_integers_is_refused(ids: Any) -> None:
    with pytest.raises(IntaglioError):
        Segments.of(ids)


def test_a_mask_of_another_shape_or_type_is_refused() -> None:
    ids_NT = torch.zeros(2, 3, dtype=torch.int64)
    for mask in (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(IntaglioError, match="the mask must be bool"):
            Segments(ids_NT, mask)


@given(st.text(st.sampled_from("the cat—日本ïé😀\n"), min_size=1, max_size=30), st.data())
def test_bytes_add_up_exactly_whatever_the_cut(text: str, data: st.DataObject) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(0, len(ids)))
    left, right = (Segments.of([[0, *part]]) for part in (ids[:cut], ids[cut:]))
    assert segment_bytes(BYTES, Segments.of([[0, *ids]])) == [len(text.encode())]
    assert segment_bytes(BYTES, left)[0] + segment_bytes(BYTES, right)[0] == len(text.encode())
    # Without BOS the first token is context: what it stands for is not scored.
    first = segment_bytes(BYTES, Segments.of([[0, ids[0]]]))[0]
    assert segment_bytes(BYTES, Segments.of([ids])) == [len(text.encode()) - first]


def test_special_tokens_stand_for_no_bytes_and_added_ones_for_themselves() -> None:
    tokenizer = byte_level(bos=True, added="<é>")
    ids = tokenizer("a<é>b")["input_ids"]
    assert ids[0] == 0
    assert len(ids) == 4
    assert segment_bytes(tokenizer, Segments.of([[*ids, 1]])) == [len("a<é>b".encode())]
    with pytest.raises(IntaglioError, match="token id 5000"):
        segment_bytes(tokenizer, Segments.of([[0, 5000]]))


def test_padding_stands_for_no_bytes_and_the_first_token_behind_it_is_context() -> None:
    ids = BYTES("xyz", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    pad, mask = [7, 7], torch.tensor([[False, False, True, True, True]])
    assert segment_bytes(BYTES, Segments(torch.tensor([pad + ids]), mask)) == [2]
    assert segment_bytes(BYTES, Segments(torch.tensor([ids + pad]), mask.flip(1))) == [2]
    assert segment_bytes(BYTES, Segments(torch.tensor([ids + pad]), torch.zeros(1, 5, dtype=torch.bool))) == [0]


def test_bytes_of_a_vocabulary_that_is_not_byte_level_are_those_of_the_decoded_text() -> None:
    ids = WORDS("a b c")["input_ids"]
    assert segment_bytes(WORDS, Segments.of([ids])) == [len("a b c")]
    # Without [CLS] the first word is context, the space behind it is scored.
    assert segment_bytes(WORDS, Segments.of([ids[1:]])) == [len(" b c")]
