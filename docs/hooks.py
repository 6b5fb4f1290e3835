"""MkDocs hooks that add the generated pages to the site.

MkDocs puts this directory on the import path while it loads this file.
"""

from __future__ import annotations

from typing import Any

from generate import pages
from generate.text import relink
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the areas and methods to the navigation under "Methods"."""
    nav: list[Any] = config.nav or []
    (methods,) = [part["Methods"] for part in nav if "Methods" in part]
    methods += pages.navigation()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated files."""
    for uri, content in pages.generated():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in the generated tables of a guide, and point its links at pages of the site."""
    if page.file.generated_by is not None:
        return markdown
    return relink(pages.fill(markdown), f"docs/{page.file.src_uri}", page.file.src_uri)
