from __future__ import annotations

from pathlib import Path

import pytest

from intaglio.data.interactions import Interactions, load_interactions
from intaglio.errors import IntaglioError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\n"


def written(folder: Path, inter: str | None, item: str | None = None) -> Path:
    for name, content in (("a.inter", inter), ("a.item", item)):
        if content is not None:
            (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_a_table_is_read(tmp_path: Path) -> None:
    rows = "u1\ti2\t3\t20\nu2\ti1\t5\t5\nu1\ti1\t1\t10\nu1\ti3\t1\t20\n"
    found = load_interactions(
        written(tmp_path, INTER + rows, ITEM + "i1\tToy Story\t1995\ni2\tHeat\u2028 (Uncut)\t1995\n")
    )
    assert found.users == ("u1", "u2", "u1", "u1")
    assert found.items == ("i2", "i1", "i1", "i3")
    assert found.times == (20.0, 5.0, 10.0, 20.0)
    assert found.titles == {"i1": "Toy Story", "i2": "Heat\u2028 (Uncut)"}
    # In time; what was at the same time, in the order of the file.
    assert found.by_user() == {"u1": ("i1", "i2", "i3"), "u2": ("i1",)}


def test_titles_may_be_absent(tmp_path: Path) -> None:
    assert load_interactions(written(tmp_path, INTER + "u\ti\t1\t1\n")).titles == {}


def test_the_digest_is_of_the_content() -> None:
    one = Interactions(("a", "b"), ("x", "y"), (1.0, 2.0))
    assert one.digest == Interactions(("a", "b"), ("x", "y"), (1.0, 2.0)).digest
    others = [
        Interactions(("a", "b"), ("x", "y"), (1.0, 3.0)),
        Interactions(("b", "a"), ("x", "y"), (1.0, 2.0)),
        Interactions(("a", "b"), ("x", "y"), (1.0, 2.0), {"x": "title"}),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_the_missing_asset_is_named_with_what_to_run() -> None:
    with pytest.raises(
        IntaglioError, match=r"the bundled interactions 'movielens' is not in .*; run `intaglio assets`"
    ):
        load_interactions("movielens")


@pytest.mark.parametrize(
    ("inter", "item", "sentence"),
    [
        (None, None, "has no interactions: one file"),
        ("", None, "has no column 'user_id'; it has: nothing"),
        ("user_id:token\titem_id:token\n", None, "has no column 'timestamp'; it has: user_id, item_id"),
        (INTER + "u\ti\t1\n", None, "line 2 of .* has 3 columns; 4 are named"),
        (INTER + "u\ti\t1\t1\nu\ti\t1\tsoon\n", None, "line 3 of .* has the timestamp 'soon'; a number"),
        (INTER + "u\ti\t1\t1\n", "name:token\nx\n", "has no column 'item_id'; it has: name"),
    ],
)
def test_malformed_tables_are_one_sentence(tmp_path: Path, inter: str | None, item: str | None, sentence: str) -> None:
    with pytest.raises(IntaglioError, match=sentence):
        load_interactions(written(tmp_path, inter, item))


def test_other_bad_places_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IntaglioError, match="'nowhere' are neither a bundled name nor a file or directory"):
        load_interactions("nowhere")
    written(tmp_path, INTER).joinpath("b.inter").write_text(INTER)
    with pytest.raises(IntaglioError, match=r"has 2 files \*.inter; one is accepted"):
        load_interactions(tmp_path)
    (tmp_path / "b.inter").unlink()
    (tmp_path / "a.inter").write_bytes(b"\xff\xfe")
    with pytest.raises(IntaglioError, match=r"a.inter is not UTF-8 \(byte offset 0\)"):
        load_interactions(tmp_path)


def test_a_csv_file_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text('time,Item,USER_ID,title\r\n3,"a, b",u1,"One ""more"""\r\n2024-01-31T00:00:00,c,u2,C\r\n')
    found = load_interactions(file)
    assert found == Interactions(("u1", "u2"), ("a, b", "c"), (3.0, 1706659200.0), {"a, b": 'One "more"', "c": "C"})
    file = tmp_path / "log.tsv"
    file.write_text("user\titem\ttimestamp\nu\ti\t1\n")
    assert load_interactions(file) == Interactions(("u",), ("i",), (1.0,))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [("u,i,nan", "has the timestamp 'nan'; a finite number"), ('u,"i,1', "is not a CSV file: unexpected end of data")],
)
def test_malformed_csv_files_are_one_sentence(tmp_path: Path, rows: str, sentence: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(f"user,item,time\n{rows}\n")
    with pytest.raises(IntaglioError, match=sentence):
        load_interactions(file)
