"""The site builds without warnings, with and without a record, and loads nothing from other hosts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from intaglio.evidence.engine import record as records
from intaglio.evidence.engine.record import Record
from intaglio.evidence.engine.tables import signed
from intaglio.methods.registry import PUBLISHED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


class Fetched(HTMLParser):
    """Addresses that a page loads, addresses that it links to, and its own link targets."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = {"", "__skip"}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        wanted = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
        if (address := given.get(wanted.get(tag, ""))) and given.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(address)
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        self.ids |= {given.get("id") or "", given.get("name") or ""}


def build(out: Path) -> Path:
    from mkdocs.commands.build import build as run
    from mkdocs.config import load_config

    run(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))
    return out


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, record: Record) -> Path:
    """Build the site with a record of Wanda and no others."""
    results = tmp_path_factory.mktemp("results")
    records.write_record(record, results / "wanda.json")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "RECORDS", results)
        return build(tmp_path_factory.mktemp("site") / "site")


def test_every_method_has_its_page(site: Path, record: Record) -> None:
    for slug in PUBLISHED:
        assert (site / "methods" / f"{slug}.html").is_file()
    page = (site / "methods" / "wanda.html").read_text(encoding="utf-8")
    assert record.effect is not None
    assert signed(record.effect) in page
    assert "<svg" in page.partition('class="effects"')[2]
    assert records.read_record(site / "records" / "wanda.json") == Record.from_document(
        json.loads(json.dumps(record.document()))
    )
    assert "Registered, not yet run" in (site / "methods" / "dsnot.html").read_text(encoding="utf-8")
    assert not (site / "records" / "dsnot.json").exists()


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        seen = Fetched(page)
        assert seen.addresses
        assert not [address for address in seen.addresses if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", text), sheet


def test_every_internal_link_has_a_target(site: Path) -> None:
    pages = {page.resolve(): Fetched(page) for page in site.rglob("*.html")}
    for page, seen in pages.items():
        if page.name == "404.html":  # its links start at the root of a host
            continue
        for link in seen.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (page, link)
            assert target not in pages or unquote(address.fragment) in pages[target].ids, (page, link)


def test_the_generator_is_not_part_of_the_site(site: Path) -> None:
    names = {path.suffix for path in site.rglob("*") if path.is_file()}
    assert not names & {".py", ".j2", ".pyc", ".md"}
    assert not (site / "methods" / "notes").exists()


def test_licences_are_shown(site: Path) -> None:
    text = (site / "licences.html").read_text(encoding="utf-8")
    assert "Martin Donath" in text
    assert "Permission is hereby granted" in text


def test_the_site_builds_as_committed(tmp_path: Path) -> None:
    site = build(tmp_path / "site")
    for slug in PUBLISHED:
        assert (site / "records" / f"{slug}.json").exists() == (records.committed(slug) is not None)
