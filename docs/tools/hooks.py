"""What mkdocs does besides: measured results join the site, and links that lead out of docs/ lead somewhere."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

BESIDE_DOCS = ("results", "benchmarks/results", "CONTRIBUTING.md")
"""Folders and files of the repository that are part of the site, under the same path."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\](?:\([^)]*\))?)*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands beside docs/."""
    root = Path(config.config_file_path).parent
    for name in BESIDE_DOCS:
        for path in sorted([root / name, *(root / name).rglob("*")]):
            if path.is_file():
                name = path.relative_to(root).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they work in the repository, made to work in the site; source files have no page and lose theirs."""
    here = page.file.src_uri
    in_repository = here if here.startswith(BESIDE_DOCS) else f"docs/{here}"

    def relink(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        text = LINK.sub(relink, text)
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return f"{image}[{text}]({target})"
        path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        path = path.removeprefix("docs/")
        if files.get_file_from_path(path) is None and not path.startswith(
            ("src", "tests", "benchmarks", "examples", "recipes", "results", "CHANGELOG.md")
        ):
            return match.group()  # mkdocs says what is wrong with it
        if files.get_file_from_path(path) is None:
            return text
        path = posixpath.relpath(path, posixpath.dirname(here) or ".")
        return f"{image}[{text}]({path}{'#' if anchor else ''}{anchor})"

    return _outside_code(markdown, lambda part: LINK.sub(relink, part))


def _outside_code(markdown: str, change: Any) -> str:
    parts, end = [], 0
    for block in CODE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
