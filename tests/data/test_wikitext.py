from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from intaglio.data import wikitext

FILLER = "This sentence is here because a paragraph must have some length."


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (
            "'''Bold''' and ''italic'' words stand here as they are read.",
            "Bold and italic words stand here as they are read.",
        ),
        (
            "A [[link]], a [[target|shown text]] and [[word]]s are read as text.",
            "A link, a shown text and words are read as text.",
        ),
        (
            "An [http://x.org external link] is text, a bare one [http://x.org] goes.",
            "An external link is text, a bare one goes.",
        ),
        (
            "References go<ref>{{cite|a=b}} [[x]]</ref> with<ref name=a /> every word of their text.",
            "References go with every word of their text.",
        ),
        (
            "Comments<!-- [[hidden]] --> and {{citation needed|date=May}} go without leaving a trace.",
            "Comments and go without leaving a trace.",
        ),
        (
            "The road is {{convert|5|km|mi}} long and {{convert|2|to|3|m}} wide, they say.",
            "The road is 5 km long and 2 to 3 m wide, they say.",
        ),
        (
            "The word ({{IPAc-en|w|ɜː}}; {{lang-el|λέξη}}) is spoken by all of them.",
            "The word (λέξη) is spoken by all of them.",
        ),
        (
            "The word ({{IPAc-en|w|ɜː}}) is spoken, and so is the next one ({{x}}, {{y}}).",
            "The word is spoken, and so is the next one.",
        ),
        (
            "Water is H<sub>2</sub>O &amp; nothing&nbsp;else &ndash; so they say.",
            "Water is H2O & nothing else – so they say.",
        ),
        (
            "Years 1914{{ndash}}1918 ({{circa|1900}}) are {{nowrap|kept together}} here.",
            "Years 1914–1918 (c. 1900) are kept together here.",
        ),
        (
            "The {{nihongo|strikes|打撃|dageki}} and {{lang|grc|λόγος}} are words in a sentence.",
            "The strikes and λόγος are words in a sentence.",
        ),
        (
            "A number in brackets[12] behind a word is a dead reference.[3]",
            "A number in brackets behind a word is a dead reference.",
        ),
        (
            "<nowiki>[x]</nowiki> is shown as it stands, and so is this<br>line of text.",
            "[x] is shown as it stands, and so is this line of text.",
        ),
    ],
)
def test_inline_markup(markup: str, expected: str) -> None:
    assert wikitext.prose(markup) == expected


@pytest.mark.parametrize(
    "markup",
    [
        "[[File:A.jpg|thumb|left|A caption with a [[link]] that is long enough to pass for prose.]]",
        "[[Category:Things that are long enough to pass for a paragraph of prose.]]",
        "[[de:Etwas das lang genug ist um als ein Absatz durchzugehen wenn man nicht hinsieht.]]",
        "{| class='wikitable'\n|-\n! Head\n|-\n| A cell with a text that is long enough to pass for prose.\n|}",
        "<gallery>\nA.jpg|A caption that is long enough to pass for a paragraph of prose.\n</gallery>",
        "The area of a circle is <math>\\pi r^2</math>, which every child learns at school.",
        "The height of the page is {{mvar|h}} and its width is another number altogether.",
        "The following are the best known of all of the methods that are in use today:",
        "* A short item of a list.",
        "* Smith, John (1990). ''A book of many things that nobody reads''. New York: Some Press. ISBN 1-2-3.",
        "== A heading that is long enough to be taken for a paragraph. ==",
        "Too short.",
        "A stray {| of an unclosed table, or a <ref> without an end, takes its paragraph along.",
        "",
    ],
)
def test_what_is_not_prose_goes(markup: str) -> None:
    assert wikitext.prose(markup) == ""
    assert wikitext.prose(f"{FILLER}\n\n{markup}\n\n{FILLER}") == f"{FILLER}\n\n{FILLER}"


def test_a_long_item_that_is_a_sentence_stays() -> None:
    item = "Whole sentences are kept even where the page sets them as the items of a list, if they are long enough."
    assert wikitext.prose(f"* {item}\n* short\n:{item}") == f"{item}\n\n{item}"


def test_sections_that_list_sources_go_with_their_subsections() -> None:
    page = "\n".join(
        [
            f"Lead. {FILLER}",
            "== History ==",
            f"History. {FILLER}",
            "=== ''See also'' ===",
            f"Gone. {FILLER}",
            "==== Deeper ====",
            f"Gone. {FILLER}",
            "=== Later ===",
            f"Later. {FILLER}",
            "== References ==",
            f"Gone. {FILLER}",
            "=== Books ===",
            f"Gone. {FILLER}",
            "== Legacy ==",
            f"Legacy. {FILLER}",
        ]
    )
    assert wikitext.prose(page) == "\n\n".join(f"{name}. {FILLER}" for name in ("Lead", "History", "Later", "Legacy"))


def test_articles_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    def page(title: str, text: str, space: int = 0, redirect: str = "") -> str:
        return f"<page><title>{title}</title><ns>{space}</ns>{redirect}<revision><text>{text}</text></revision></page>"

    long = "\n\n".join([f"'''A''' &lt;ref&gt;gone&lt;/ref&gt; {FILLER}"] * 10)
    xml = "".join(
        [
            page("Zebra", long),
            page("Redirected", long, redirect='<redirect title="Zebra" />'),
            page("Talk:Zebra", long, space=1),
            page("Short", FILLER),
            page("Aardvark &amp; others", long),
            "<page><title>Empty</title><ns>0</ns><revision><text /></revision></page>",
        ]
    )
    archive = tmp_path / "a.xml.bz2"
    archive.write_bytes(
        bz2.compress(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{xml}</mediawiki>'.encode())
    )
    assert [title for title, _ in wikitext.pages(archive)] == ["Zebra", "Short", "Aardvark & others", "Empty"]
    found = list(wikitext.documents(archive))
    assert [document["title"] for document in found] == ["Zebra", "Aardvark & others"]
    assert found[0]["text"] == "\n\n".join([f"A {FILLER}"] * 10)
