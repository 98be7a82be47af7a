"""Code blocks of the pages that are made from the code: `python docs/tools/blocks.py` writes them anew.

Such a block stands under a comment that says how it is made: ``<!-- made by: vwn cost --backbone medium -->``, or
``<!-- made by: diff OLD NEW -->`` for two files of the repository, ``<!-- made by: file NAME -->`` for one.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- made by: (.+?) -->\n```\w*\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)


def renewed(page: str) -> str:
    """A page with its blocks as they should be."""
    return BLOCK.sub(lambda match: match[1] + made(shlex.split(match[2])) + match[4], page)


def made(words: list[str]) -> str:
    """The content of a block.

    Raises:
        ValueError: a way of making it that is not known.
    """
    if words[0] == "diff":
        old, new = ((DOCS.parent / name).read_text().splitlines() for name in words[1:])
        return "".join(f"{line}\n" for line in changes(old, new))
    if words[0] == "file":
        return (DOCS.parent / words[1]).read_text()
    if words[:2] == ["vwn", "cost"]:
        from vwn.cli import main

        with (
            contextlib.chdir(DOCS.parent),
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            main()
        return printed.getvalue()
    raise ValueError(f"no block is made by {shlex.join(words)}")


def changes(old: list[str], new: list[str]) -> list[str]:
    """The lines that differ, as `diff` marks them, each group behind the line in front of it."""
    lines: list[str] = []
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(1):
        lines += [""] if lines else []
        for tag, i, i_end, j, j_end in group:
            if tag == "equal":
                lines += [f" {line}" for line in old[i:i_end]]
            else:
                lines += [f"-{line}" for line in old[i:i_end]] + [f"+{line}" for line in new[j:j_end]]
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        path.write_text(renewed(path.read_text()))
