"""What MkDocs calls while it builds the site: pages that are made join those that are written.

MkDocs puts this folder on the import path while it reads this file.
"""

from __future__ import annotations

from typing import Any

from generate import pages
from generate.text import relink
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give each room and each method its place under "Methods"."""
    nav: list[Any] = config.nav or []
    (methods,) = [part["Methods"] for part in nav if "Methods" in part]
    methods += pages.navigation()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what is made."""
    for uri, content in pages.made():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill the slots of a guide, and lead its links to files of the repository to their pages."""
    if page.file.generated_by is not None:
        return markdown
    return relink(pages.fill(markdown), f"docs/{page.file.src_uri}", page.file.src_uri)
