"""MediaWiki pages to plain English prose.

Running text as rendered stays; the rest is dropped: templates, tables, references, pictures and captions, categories,
formulas, headings, short list items and sections that only list sources. A paragraph in which something was dropped
from a sentence (a formula or a table) is dropped as a whole.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell import nodes

LEAST_CHARACTERS = 500
"""Fewest characters of prose of a page."""

_LEAST_PARAGRAPH = 40
_LEAST_LIST_ITEM = 80
_DROPPED_SECTIONS = frozenset(
    {
        "bibliography",
        "citations",
        "external links",
        "footnotes",
        "further reading",
        "gallery",
        "notes",
        "notes and references",
        "references",
        "references and notes",
        "see also",
        "sources",
        "works cited",
    }
)
_DROPPED_TAGS = frozenset({"ref", "references", "gallery", "timeline", "imagemap", "source", "syntaxhighlight", "pre"})
_HOLE_TAGS = frozenset({"math", "chem", "hiero", "score", "code"})
_BLOCK_TAGS = frozenset({"blockquote", "center", "dd", "div", "dl", "dt", "hr", "li", "ol", "p", "poem", "table", "ul"})
_LIST_TAGS = frozenset({"dd", "dt", "li"})
_UNITS = {
    "C": "°C",
    "F": "°F",
    "ft": "feet",
    "km2": "km²",
    "m2": "m²",
    "mi": "miles",
    "sqkm": "km²",
    "sqmi": "square miles",
}
_SOURCE = re.compile(r"\bISBN\b|\bpp?\. ?\d|\bPress\b|\(\d{4}\)[.,:]|\b(?:London|New York|Paris|Berlin|Oxford):")
# A link with one of these prefixes is shown; any other prefix that looks like a language is not.
_SHOWN_PREFIXES = frozenset({"wikt", "wiktionary", "w", "wikipedia", "wp", "s", "wikisource", "commons", "species"})
_NAMESPACES = frozenset({"file", "image", "category", "media", "template", "portal"})
_HOLE = "\ufffc"
_ITEM = "\ufffb"
_MARKUP = re.compile(
    r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|</?[a-zA-Z]|<!--|-->|https?://|\|\s*(?:thumb|left|right|style|class|align)\b|'''|\|"
)
_ENDED = re.compile(r"[.!?…][\"'”’»)\]]*$")
_REPAIRS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u00a0\u2009\u200a\u202f\s]+", " "),
        (r"[\u200b-\u200f\ufeff\u00ad]", ""),
        (r"'{2,}|__[A-Z]+__|\[\d+\]", ""),
        (r"([(\[])[\s,;:/–—-]+", r"\1"),
        (r"[\s,;:/–—]+([)\]])", r"\1"),
        (r"\(\s*(?:or|and|from|see|pronounced|listen)?\s*\)|\[\s*\]", ""),
        (r" {2,}", " "),
        (r" +([,.;:!?)\]])(?!\w)", r"\1"),
        (r",(?:\s*,)+", ","),
        (r",\.(?!\w)", "."),
    )
)


def pages(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield title and markup of each article (name space 0, no redirects) of a compressed MediaWiki export."""
    with bz2.open(archive) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.rpartition("}")[2] != "page":
                continue
            # The export's XML namespace contains its version; the names below do not depend on it.
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
            page.clear()


def prose(markup: str) -> str:
    """Return the running text of a page, paragraphs separated by blank lines."""
    text = _render(_kept_sections(mwparserfromhell.parse(markup).nodes))
    return "\n\n".join(filter(None, map(_paragraph, _blocks(text))))


def documents(archive: Path) -> Iterator[dict[str, str]]:
    """Yield {"title", "text"} for each article of an export that has at least 500 characters of prose."""
    for title, markup in pages(archive):
        text = prose(markup)
        if len(text) >= LEAST_CHARACTERS:
            yield {"title": title, "text": text}


def _kept_sections(children: list[Any]) -> Iterator[Any]:
    dropped_level = None
    for node in children:
        if isinstance(node, nodes.Heading):
            if dropped_level is not None and node.level > dropped_level:
                continue
            title = _render(node.title.nodes).strip().lower()
            dropped_level = node.level if title in _DROPPED_SECTIONS else None
        if dropped_level is None:
            yield node


def _render(children: Any) -> str:
    return "".join(_node(child) for child in children)


def _node(node: Any) -> str:
    shown = _SHOWN.get(type(node))
    return shown(node) if shown else ""


def _link(node: Any) -> str:
    target = str(node.title).strip()
    prefix, colon, _ = target.partition(":")
    prefix = prefix.strip().lower()
    language = re.fullmatch(r"[a-z]{2,3}(-[a-z-]+)?|simple", prefix) and prefix not in _SHOWN_PREFIXES
    if colon and (prefix in _NAMESPACES or (language and node.text is None)):
        return ""
    return _render(node.title.nodes).lstrip(":") if node.text is None else _render(node.text.nodes)


def _tag(node: Any) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name in _HOLE_TAGS:
        return _HOLE
    if name == "table":
        return "\n\n"
    if name == "br":
        return " "
    if name in _LIST_TAGS and node.wiki_markup:
        return f"\n\n{_ITEM}"
    inside = _render(node.contents.nodes) if node.contents is not None else ""
    if name in _LIST_TAGS:
        return f"\n\n{_ITEM}{inside}\n\n"
    return f"\n\n{inside}\n\n" if name in _BLOCK_TAGS else inside


def _external(node: Any) -> str:
    return _render(node.title.nodes) if node.brackets and node.title is not None else ""


def _values(template: Any) -> list[str]:
    return [_render(p.value.nodes).strip() for p in template.params if not p.showkey]


def _template(node: Any) -> str:
    name = re.sub(r"[\s_]+", " ", str(node.name)).strip().lower()
    values = _values(node)
    if name in _TEMPLATES:
        try:
            return _TEMPLATES[name](values)
        except IndexError:
            return _HOLE
    if name.startswith("lang-") and values:
        return values[0]
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    return ""


def _converted(values: list[str]) -> str:
    # {{convert|5|to|6|km|mi}}: a range has a joining word as its second argument.
    if values[1] in {"-", "–", "to", "and", "x", "by", "or"}:
        joint = {"-": "–", "–": "–"}.get(values[1], f" {values[1]} ")
        return f"{values[0]}{joint}{values[2]} {_unit(values[3])}"
    return f"{values[0]} {_unit(values[1])}"


def _unit(unit: str) -> str:
    return _UNITS.get(unit, unit)


def _first(values: list[str]) -> str:
    return values[0]


def _last(values: list[str]) -> str:
    return values[-1]


def _constant(text: str) -> Callable[[list[str]], str]:
    return lambda values: text


# Templates for words inside a sentence, which would be incomplete without them. All others are dropped.
_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(("convert", "cvt"), _converted),
    **dict.fromkeys(("nowrap", "nobr", "small", "smaller", "big", "large", "sc", "sic", "linktext", "abbr"), _first),
    **dict.fromkeys(("quote", "blockquote", "cquote", "quotation", "val", "num"), _first),
    **dict.fromkeys(("unicode", "polytonic", "hebrew", "music", "uss", "hms", "ss", "rms"), _first),
    **dict.fromkeys(("lang", "transl", "transliteration", "rtl-lang", "script"), _last),
    **dict.fromkeys(("ndash", "en dash"), _constant("–")),
    **dict.fromkeys(("mdash", "mdashb", "em dash"), _constant("—")),
    **dict.fromkeys(("spaced ndash", "snd", "spnd"), _constant(" – ")),
    **dict.fromkeys(("nbsp", "space", "spaces", "thinsp"), _constant(" ")),
    **dict.fromkeys(("circa", "c."), lambda values: " ".join(["c.", *values[:1]])),
    **dict.fromkeys(("frac", "fraction", "sfrac"), "/".join),
    **dict.fromkeys(("chem", "chem2"), "".join),
    **dict.fromkeys(("math", "mvar", "e", "su", "sub", "sup", "radic", "vr", "!", "age"), _constant(_HOLE)),
    **dict.fromkeys(("railgauge", "pop density", "currentyear"), _constant(_HOLE)),
    "nihongo": lambda values: values[0] or values[2],
    "angbr": lambda values: f"⟨{values[0]}⟩",
    "as of": lambda values: " ".join(["As of", *values]),
    "us$": lambda values: f"US${values[0]}",
    "'s": _constant("'s"),
    "'": _constant("'"),
    "pi": _constant("π"),
    "=": _constant("="),
}

_SHOWN: dict[type, Callable[[Any], str]] = {
    nodes.Text: lambda node: str(node.value),
    nodes.HTMLEntity: lambda node: str(node.normalize()),
    nodes.Heading: lambda node: "\n\n",
    nodes.Wikilink: _link,
    nodes.ExternalLink: _external,
    nodes.Tag: _tag,
    nodes.Template: _template,
}


def _blocks(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        # A list item ends with its line; what follows on the next line is a paragraph of its own.
        yield from block.split("\n") if _ITEM in block else (block,)


def _paragraph(block: str) -> str:
    """Return a block as a line of prose, or "" if it is not whole sentences."""
    item = _ITEM in block
    text = block.replace(_ITEM, " ")
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if _HOLE in text or _MARKUP.search(text) or not _ENDED.search(text):
        return ""
    if item and (len(text) < _LEAST_LIST_ITEM or _SOURCE.search(text)):
        return ""
    return text if len(text) >= _LEAST_PARAGRAPH else ""
