"""Dimension letters: N images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from intaglio.data.images import Images, load_images
from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.digits import BOUNDS, Digits, noisy

BED = Digits()
SOME = Digits(training_images=200).training(0)
SEEDS = st.integers(0, 10**6)


def shades(images: Images) -> torch.Tensor:
    """Pixels in reading order, int64 0 to 16."""
    return (images.pixels_NCHW.flatten(1) * 16).round().to(torch.int64)


def rows(images: Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in shades(images)}


def test_the_sets_are_all_images_and_share_none() -> None:
    parts = [BED.part(part) for part in BOUNDS]
    pixels = load_digits().images.reshape(-1, 64).astype("int64")
    assert [len(rows(part)) for part in parts] == [len(part) for part in parts]
    assert set.union(*map(rows, parts)) == {image.tobytes() for image in pixels}
    assert sum(map(len, parts)) == len({image.tobytes() for image in pixels}) == 1797
    # Of ten classes none is missing or rare in any set.
    for part in parts:
        assert torch.bincount(part.labels_N, minlength=10).min() > 0.04 * len(part)


def test_pixels_and_classes_are_those_of_the_file() -> None:
    found = load_digits()
    classes = {
        image.astype("int64").tobytes(): int(label) for image, label in zip(found.data, found.target, strict=True)
    }
    images = BED.images("evaluation")
    assert images.pixels_NCHW.shape == (400, 1, 8, 8)
    assert images.pixels_NCHW.dtype == torch.float32
    assert (float(images.pixels_NCHW.min()), float(images.pixels_NCHW.max())) == (0.0, 1.0)
    for tokens, label, name in zip(shades(images), images.labels_N.tolist(), images.names, strict=True):
        assert classes[tokens.numpy().tobytes()] == label
        assert hashlib.sha256(tokens.to(torch.uint8).numpy().tobytes()).hexdigest()[:12] == name


def test_draws_stay_in_their_set_and_follow_from_seeds() -> None:
    inside = {part: set(BED.part(part).names) for part in BOUNDS}
    for seed in range(5):
        assert set(BED.training(seed).names) <= inside["train"]
        assert set(BED.images("validation", seed).names) <= inside["validation"]
        assert set(BED.images("pilot", seed).names) <= inside["pilot"]
        assert set(BED.images("evaluation", seed).names) <= inside["evaluation"]
    assert len({BED.training(seed).digest for seed in range(10)}) == 10
    assert len({BED.images("evaluation", base).digest for base in range(10)}) == 10
    assert BED.training(3).digest == Digits().training(3).digest
    # A smaller draw is the front of a larger one.
    assert Digits(training_images=200).training(3).names == BED.training(3).names[:200]


def test_the_numbers_do_not_depend_on_the_process() -> None:
    # What the process that wrote this test got; another would mean that records cannot be made again.
    assert (
        hashlib.sha256("".join(BED.part(part).digest for part in BOUNDS).encode()).hexdigest()[:16]
        == "7200537bd091b32f"
    )
    assert BED.training(0).digest[:16] == "1e6ab33a781761bd"
    assert Digits(noise=0.4).training(0).digest[:16] == "aaedaa259f638ab6"
    assert BED.images("evaluation").digest[:16] == "668b2b0c10814962"


@given(st.floats(0, 1), SEEDS)
def test_noise_is_exact_and_never_the_true_class(share: float, seed: int) -> None:
    images = SOME
    wrong = noisy(images, share, seed)
    assert int((wrong.labels_N != wrong.true_N).sum()) == round(share * 200)
    assert torch.equal(wrong.true_N, images.true_N)
    assert torch.equal(wrong.pixels_NCHW, images.pixels_NCHW)
    assert ((wrong.labels_N >= 0) & (wrong.labels_N < 10)).all()


def test_noise_is_fresh_in_each_draw_and_spread_over_the_other_classes() -> None:
    wrong = [noisy(BED.training(0), 0.5, seed) for seed in range(10)]
    assert len({images.digest for images in wrong}) == 10
    steps = torch.cat([(images.labels_N - images.true_N) % 10 for images in wrong])
    counts = torch.bincount(steps, minlength=10)
    assert counts[0] == 4000
    # 4,000 wrong labels over nine classes: 444 each, with a standard deviation of 20.
    assert int((counts[1:] - 444).abs().max()) < 100
    assert noisy(wrong[0], 0.0, 0).digest == BED.training(0).digest


def test_only_what_is_learned_from_is_noisy() -> None:
    bed = Digits(noise=0.3)
    for images, share in (
        (bed.training(1), 240),
        (bed.images("validation", 1), 75),
        (bed.images("evaluation"), 0),
    ):
        assert int((images.labels_N != images.true_N).sum()) == share


def test_places() -> None:
    images = BED.training(0)
    assert images.take([5, 2]).names == (images.names[5], images.names[2])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(IntaglioError, match="share of wrong labels is"):
        noisy(BED.training(0), share, 0)


def test_too_many_images_and_unknown_sets_are_refused() -> None:
    with pytest.raises(IntaglioError, match=r"5000 train images of digits were requested; there are \d+"):
        Digits(training_images=5000).training(0)
    with pytest.raises(IntaglioError, match="there is no set 'test'"):
        BED.part("test")  # type: ignore[arg-type]


def test_without_scikit_learn_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(IntaglioError, match=r"scikit-learn: pip install 'intaglio\[evidence\]'"):
        load_images("digits")


def test_settings_compare_by_their_fields() -> None:
    assert Digits() == Digits(training_images=800)
    assert hash(Digits()) != hash(Digits(noise=0.1))
    assert asdict(Digits()) == {
        "source": "digits", "training_images": 800, "validation_images": 250, "run_images": 400, "pilot_images": 160,
        "noise": 0.0, "balanced": False,
    }  # fmt: skip


@pytest.mark.slow
def test_mnist_has_four_disjoint_sets_of_all_classes() -> None:
    bed = Digits(source="mnist5k", training_images=2000)
    parts = [bed.part(part) for part in BOUNDS]
    assert sum(map(len, parts)) == len({name for part in parts for name in part.names}) == 5000
    assert bed.training(0).pixels_NCHW.shape == (2000, 1, bed.side, bed.side) == (2000, 1, 28, 28)
    for part in parts:
        assert float(part.pixels_NCHW.max()) == 1.0
        assert torch.bincount(part.labels_N, minlength=10).min() > 0.07 * len(part)
