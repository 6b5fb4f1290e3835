"""The site's colours: those of the reports, read from their style sheet, so that a picture looks the same in both."""

from __future__ import annotations

import re

SHEET = "src/intaglio/pages/style.css.j2"
_BLOCK = re.compile(r":root \{([^}]*)\}")


def style(sheet: str) -> str:
    """The palettes under Material's two schemes, and the rules of the pictures.

    Args:
        sheet: the reports' style sheet.

    Raises:
        ValueError: it has no two palettes, or no rules for pictures.
    """
    palettes = [block for block in _BLOCK.findall(sheet) if "--ink" in block]
    pictures = [line for line in sheet.split("\n") if line.startswith(".picture")]
    if len(palettes) != 2 or not pictures:
        raise ValueError(f"{SHEET} has {len(palettes)} palettes and {len(pictures)} rules for pictures")
    # The second changes some of the first: what it leaves out stays.
    light, dark = (re.sub(r"\s*color-scheme:[^;]*;", "", palette).strip() for palette in palettes)
    return "\n".join(
        [
            f"[data-md-color-scheme='default'], [data-md-color-scheme='slate'] {{ {light} }}",
            f"[data-md-color-scheme='slate'] {{ {dark} }}",
            *pictures,
            "",
        ]
    )
