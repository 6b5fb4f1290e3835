"""The site's colours, read from the style sheet of the reports so that figures look the same in both."""

from __future__ import annotations

import re

SHEET = "src/intaglio/report/templates/style.css.j2"
_BLOCK = re.compile(r":root \{([^}]*)\}")


def style(sheet: str) -> str:
    """Return the palettes of the reports' style sheet under Material's two schemes, and its rules for figures.

    Raises:
        ValueError: the sheet does not have two palettes, or has no rules for figures.
    """
    palettes = [block for block in _BLOCK.findall(sheet) if "--ink" in block]
    pictures = [line for line in sheet.split("\n") if line.startswith(".picture")]
    if len(palettes) != 2 or not pictures:
        raise ValueError(f"{SHEET} has {len(palettes)} palettes and {len(pictures)} rules for figures")
    # The dark palette overrides part of the light one.
    light, dark = (re.sub(r"\s*color-scheme:[^;]*;", "", palette).strip() for palette in palettes)
    return "\n".join(
        [
            f"[data-md-color-scheme='default'], [data-md-color-scheme='slate'] {{ {light} }}",
            f"[data-md-color-scheme='slate'] {{ {dark} }}",
            *pictures,
            "",
        ]
    )
