"""What is exported, stock transformers reads by itself, and computes the same; what a format cannot say is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

import intaglio
from intaglio.checkpoint import Checkpoint
from intaglio.cli.app import app
from intaglio.errors import IntaglioError
from intaglio.exporters import export
from intaglio.exporters.compressed_tensors import bits_of, packed
from intaglio.methods.weights.bitnet import BitNet
from intaglio.methods.weights.lost import LOST
from tests.families import DECODERS, ENCODERS, tiny_model, tiny_tokenizer

IDS = torch.randint(8, 150, (2, 12), generator=torch.Generator().manual_seed(0))
LINEAR = [family for family in DECODERS if family != "gpt2"]
UNFUSED = [family for family in LINEAR if family not in ("phi3", "gpt_neox")]


def made(family: str = "llama", **fields: Any) -> Checkpoint:
    checkpoint = Checkpoint(tiny_model(family, layers=2), tiny_tokenizer(family), "tiny")
    return checkpoint if not fields else BitNet(**fields).apply(checkpoint)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def stock(path: Path, encoder: bool = False) -> Any:
    auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_plain_weights(family: str, tmp_path: Path) -> None:
    checkpoint = made(family)
    intaglio.Magnitude(sparsity=0.5).apply(checkpoint)
    export(checkpoint, tmp_path / "out")
    assert torch.equal(logits(stock(tmp_path / "out", family in ENCODERS)), logits(checkpoint.model))
    assert not (tmp_path / "out" / "intaglio.json").exists()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(checkpoint.tokenizer)


@pytest.fixture
def _uncompiled() -> Iterator[None]:
    # transformers compiles its small functions for this format, which takes most of a minute here.
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {}) for family in UNFUSED),
        ("llama", {"scale": "mean", "norm": "rmsnorm"}),
        ("llama", {"norm": "rmsnorm", "learnable_norm": True, "keep": "shadow"}),
        ("qwen3", {"targets": ["*.mlp.*"]}),
    ],
)
@pytest.mark.usefixtures("_uncompiled")
def test_ternary_weights_in_the_format_of_transformers(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = made(family, activation_range=127, **fields)
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if name.endswith("norm_weight"):
                parameter.add_(0.1)
    export(checkpoint, tmp_path / "out", "bitnet")
    model = stock(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(checkpoint.model), rtol=1e-3, atol=1e-3)
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("BitLinear") == len(checkpoint.record.live[0]["layers"])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {"bits": 4.0}) for family in LINEAR),
        ("bert", {"bits": 8.0}),
        ("llama", {"bits": 1.58}),
        ("llama", {"bits": 2.0, "per": "row"}),
        ("llama", {"bits": 3.0, "ignore": ["layers.0.*"]}),
        ("llama", {"bits": 8.0, "keep": "shadow"}),
    ],
)
def test_few_bits_as_compressed_tensors(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = made(family, activation_bits=None, **fields)
    export(checkpoint, tmp_path / "out", "compressed-tensors")
    model = stock(tmp_path / "out", family in ENCODERS)
    torch.testing.assert_close(logits(model), logits(checkpoint.model), rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 100))
def test_words_hold_the_codes_as_the_package_reads_them(bits: int, rows: int, inputs: int, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(packed(codes, bits), helpers.pack_to_int32(codes, bits))


def test_words_by_hand() -> None:
    assert packed(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), 2).tolist() == [[0b11_10_01_00]]
    assert packed(torch.full((1, 5), 127, dtype=torch.int8), 8).tolist() == [[-1, 255]]
    assert [bits_of(*limits) for limits in ((-1, 1), (-2, 1), (-8, 7), (-128, 127))] == [2, 2, 4, 8]


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("bitnet", "llama", {"bits": 1.58}, "activation_range is 128; the format bitnet of transformers supports only 127"),
    ("bitnet", "llama", {"activation_range": 127, "bits": 4.0}, "bits is 4"),
    ("bitnet", "llama", {"activation_range": 127, "per": "row"}, "per is row"),
    ("bitnet", "llama", {"activation_bits": None}, "activation_bits is None"),
    ("bitnet", "llama", {"activation_range": 127, "norm": "layernorm"}, "norm is layernorm"),
    ("bitnet", "llama", {"activation_range": 127, "eps": 1e-3}, "eps is 0.001"),
    ("bitnet", "llama", {"activation_range": 127, "activation_scale": "mean"}, "activation_scale is mean"),
    ("bitnet", "phi3", {"activation_range": 127}, "fused of projections with a scale each"),
    ("compressed-tensors", "llama", {"bits": 4.0}, "scaled by 128 / max.x. here and by 255 / 2"),
    ("compressed-tensors", "llama", {"activation_bits": None, "norm": "rmsnorm"}, "no norm before a projection"),
    ("compressed-tensors", "gpt2", {"activation_bits": None}, "is a Conv1D in the stock model"),
    ("safetensors", "llama", {"bits": 8.0}, "runtime parts .bitnet."),
    ("onnx", "llama", {"bits": 8.0}, "the format 'onnx' is unknown"),
]


@pytest.mark.parametrize(("format", "family", "fields", "match"), REFUSED)
def test_what_a_format_cannot_say_is_one_sentence(
    format: Any, family: str, fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(IntaglioError, match=match) as caught:
        export(made(family, **fields), tmp_path / "out", format)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_live_parts_that_merge_are_told_how_and_go_out_after_it(tmp_path: Path) -> None:
    checkpoint = LOST(rank=8, columns=0.05, activation="identity").apply(made())
    with pytest.raises(IntaglioError, match=r"runtime parts \(lost\).*a step `lost: \{merge: true\}`"):
        export(checkpoint, tmp_path / "out")
    LOST(merge=True).apply(checkpoint)
    export(checkpoint, tmp_path / "out")
    assert torch.equal(logits(stock(tmp_path / "out")), logits(checkpoint.model))


@pytest.mark.parametrize("format", ["bitnet", "compressed-tensors"])
def test_nothing_quantized_and_other_live_parts(format: Any, tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="nothing in the checkpoint is quantized"):
        export(made(), tmp_path / "out", format)
    both = intaglio.LayerwiseUnmasking(configuration="01").apply(made(bits=8.0))
    with pytest.raises(IntaglioError, match="cannot represent the runtime part of visibility"):
        export(both, tmp_path / "out", format)


def test_a_directory_that_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(IntaglioError, match="out"):
        export(made(), tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_the_verb(tmp_path: Path) -> None:
    made(activation_range=127).save(tmp_path / "model")
    runner = CliRunner()
    arguments = ["export", str(tmp_path / "model"), "--format", "bitnet", "-o", str(tmp_path / "out")]
    done = runner.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["format"] == "bitnet"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "bitnet"
    again = runner.invoke(app, arguments)
    assert again.exit_code == 2
    assert runner.invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    wrong = runner.invoke(app, ["export", str(tmp_path / "model"), "--format", "gguf", "-o", str(tmp_path / "b")])
    assert wrong.exit_code != 0
