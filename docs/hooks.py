"""Hooks of the documentation site: pages that lie outside `docs/`, and links that lead there.

The pages of `docs/` are read on their own, too, where their files lie in the repository. There a
link to `../benchmarks/README.md` is right; in the site that file is a page like the others. See
https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

OUTSIDE = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md"}
"""Pages of the site whose files lie elsewhere in the repository."""

LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
"""The target of a link or a picture that is a file of the repository."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie outside `docs/`."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    home = dirname(OUTSIDE.get(uri, f"docs/{uri}"))
    pages = {path: name for name, path in OUTSIDE.items()}

    def page_of(link: re.Match[str]) -> str:
        target = normpath(join(home, link["path"]))
        name = pages.get(target) or target.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return link[0]  # the strict build then fails, and names the link
        return relpath(name, dirname(uri) or ".") + (link["anchor"] or "")

    return LINK.sub(page_of, markdown)
