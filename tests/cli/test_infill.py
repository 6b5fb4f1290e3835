"""`intaglio generate --prefix --suffix`: holes, files, drafting, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intaglio.cli.app import app
from intaglio.data.infill_format import infill_format
from intaglio.measures.infilling import infill
from intaglio.methods.objectives.codegen2 import CodeGen2
from tests.families import tiny_checkpoint_dir
from tests.trainer.helpers import checkpoint, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    ckpt = checkpoint(layers=1)
    run(ckpt, objective=CodeGen2(length=64, pack=False), steps=2)
    path = tmp_path_factory.mktemp("infill") / "model"
    ckpt.save(path)
    return str(path)


def generated(*arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(app, ["generate", *arguments, "--json", "--max-new-tokens", "8"])
    assert done.exit_code == 0, done.output
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_a_hole_is_filled_as_in_python_and_by_any_decoder(model: str, tmp_path: Path) -> None:
    import intaglio

    ckpt = intaglio.load(model)
    expected = infill(ckpt, ["the quick", " jumps over"], max_new_tokens=8)[0]
    plain = generated(model, "--prefix", "the quick", "--suffix", " jumps over")
    assert plain["text"] == expected
    (tmp_path / "head.txt").write_text("the quick", encoding="utf-8")
    file = f"@{tmp_path / 'head.txt'}"
    for decoder in ("greedy", "prompt_lookup"):
        found = generated(model, "--prefix", file, "--suffix", " jumps over", "--decoder", decoder)
        assert found["token_ids"] == plain["token_ids"]
    banned = set(infill_format(ckpt.tokenizer, "").added) - {infill_format(ckpt.tokenizer, "").end}
    assert not banned & set(plain["token_ids"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prefix", "a", "--suffix", "b " * 200], "the prefix is"),
        (["a prompt", "--prefix", "a"], "give a prompt to continue, or --prefix and --suffix"),
        ([], "give a prompt to continue, or --prefix and --suffix"),
        (["--prefix", "a", "--chat"], "without --chat"),
        (["--prefix", "@none.py"], "cannot read the text none.py"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, model: str) -> None:
    done = CliRunner().invoke(app, ["generate", model, *arguments])
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())


def test_a_model_that_cannot_fill_holes_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", str(tiny_checkpoint_dir("llama", tmp_path)), "--suffix", "b"])
    assert done.exit_code == 2
    assert "cannot fill holes" in done.stderr
