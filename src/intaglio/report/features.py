"""Features of a dictionary as one self-contained HTML page with a search.

The page's own script is the only one that its content security policy allows, by hash. It writes text through
`textContent`, and the data are JSON in which `<`, `>` and `&` are escaped, so no text of a model or corpus is markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from intaglio.report.html import environment

LEVELS = 99
"""Parts of a feature's highest code in which codes are given."""


def features_page(document: Mapping[str, Any]) -> str:
    """Return the page of a document of `dictionaries.features.describe_features`."""
    templates = environment()
    script = templates.get_template("features.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    kept = {name: document[name] for name in ("features", "vocabulary")} | {"levels": LEVELS}
    data = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign, escape in (
        ("&", "\\u0026"),
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        data = data.replace(sign, escape)
    summary = (
        f"{document['alive']:,} of {document['width']:,} features of {document['dictionary']} fired on "
        f"{document['tokens']:,} tokens of {document['texts']}, {document['l0']:.1f} at a time."
    )
    return templates.get_template("features.html.j2").render(
        document={"title": f"Features of {document['model']}", "site": document["site"]},
        summary=summary,
        data=Markup(data),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
    )
