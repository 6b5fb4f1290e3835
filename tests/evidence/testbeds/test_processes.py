"""Another process, with another hash seed and another working directory, gets the same testbeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import hashlib, sys
from intaglio.evidence.testbeds.digits import Digits
from intaglio.evidence.testbeds.docstrings import Docstrings
from intaglio.evidence.testbeds.haystack import Haystack
from intaglio.evidence.testbeds.movielens import MovieLens
from intaglio.evidence.testbeds.source_code import SourceCode

def results():
    docstrings = Docstrings(training_packages=("yaml",), evaluation_packages=("yaml",))
    source = SourceCode(packages=("yaml",), steps=5, documents_pilot=1)
    ratings = MovieLens(source=sys.argv[1], users_run=10)
    yield Digits(noise=0.2).training(3).digest
    yield docstrings.digest
    yield repr([pair.id for pair in docstrings.pairs("train")])
    yield Haystack(questions=2).draw("train", 9, 0).segments.digest
    yield repr(ratings.questions("evaluation", 4))
    yield source.digest
    yield source.training(3).digest
    yield repr([source.part(part).digest for part in ("train", "validation", "pilot", "evaluation")])

for value in results():
    print(hashlib.sha256(value.encode()).hexdigest())
"""


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"u{user}\ti{user * place % 13}\t3\t{place}" for user in range(40) for place in range(9)]
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(rows))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "INTAGLIO_HOME": str(tmp_path / "home")},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(tmp_path)])
        patch.setenv("INTAGLIO_HOME", str(tmp_path / "other"))
        exec(compile(CODE, "testbeds", "exec"), {})
    here = capsys.readouterr().out.split()
    assert done.stdout.split() == here
    assert len(set(here)) == 8
