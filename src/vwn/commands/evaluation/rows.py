"""Rows of evaluation sets from local files; the task files in ``tasks/`` name `load_rows` as their data set."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vwn.common.errors import UserError
from vwn.data.reading import parse_row
from vwn.data.unpacking import open_unpacked, refuse_unreadable

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(name: str, fields: Sequence[str], data_dir: str | Path | None = None, **_: Any) -> dict[str, Dataset]:
    """Load ``{"test": rows}`` from ``data_dir/name.jsonl.xz`` or ``.jsonl``; ``set/subset`` also from ``set.tar.xz``.

    Only the ``fields`` are kept, which every row must have; ``gold`` must be the index of one of ``choices``. lm-eval
    passes ``data_dir`` on from its ``--metadata``, with other keys that are ignored.

    Raises:
        UserError: no folder named, no file, a damaged one, or a row without a field.
    """
    from datasets import Dataset

    if data_dir is None:
        raise UserError(
            f"the task file of {name} reads local data: name the folder with "
            """--metadata '{"data_dir": "FOLDER"}' (lm_eval) or --data-dir (vwn eval)"""
        )
    where, lines = _read(Path(os.path.expanduser(data_dir)), name)
    rows = [_row(line, fields, f"line {i} of {where}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{where} is empty; restore it")
    return {"test": Dataset.from_list(rows)}


def _read(folder: Path, name: str) -> tuple[Path, list[str]]:
    """Find the lines; return where they were, too."""
    archive = folder / f"{name.split('/')[0]}.tar.xz"
    paths = [folder / f"{name}.jsonl.xz", folder / f"{name}.jsonl"]
    path = next((p for p in paths if p.is_file()), None)
    try:
        if path is None and "/" in name and archive.is_file():
            member = f"{name.split('/')[1]}.jsonl"
            found = _members(archive, archive.stat().st_mtime_ns)
            if member not in found:
                raise UserError(f"{archive} holds no {member}; restore it")
            return archive / member, _lines(found[member])
        if path is None:
            expected = [*paths, archive] if "/" in name else paths
            raise UserError(f"there is no {' nor '.join(map(str, expected))}; put one there, or name another folder")
        return path, _lines(_unpacked(path))
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{path or archive} is damaged ({error}); restore it") from error


@lru_cache(maxsize=1)
def _members(archive: Path, _modified: int) -> dict[str, bytes]:
    """Unpack the files of an archive by name without folders: once, not for every subset."""
    with tarfile.open(fileobj=io.BytesIO(_unpacked(archive))) as tar:
        files = {m.name: tar.extractfile(m) for m in tar if m.isfile()}
        return {name.split("/")[-1]: file.read() for name, file in files.items() if file is not None}


def _unpacked(path: Path) -> bytes:
    with refuse_unreadable(path), open_unpacked(path) as file:
        return file.read()


def _lines(data: bytes) -> list[str]:
    # not splitlines, which cuts at characters that JSON strings may hold
    return data.decode().removeprefix("\ufeff").split("\n")


def _row(line: str, fields: Sequence[str], where: str) -> dict[str, Any]:
    try:
        row = parse_row(line, where)
        kept = {field: row[field] for field in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a JSON object with {', '.join(fields)}; restore it") from error
    for field, value in kept.items():
        texts = value if field == "choices" else [value]
        if field != "gold" and not (isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)):
            raise UserError(f"{where} has {field} = {value!r:.40}, which should be text; restore it")
    if "choices" in kept and len(kept["choices"]) < 2:
        raise UserError(f"{where} has {len(kept['choices'])} choices, which should be two or more; restore it")
    if "gold" in kept and not (type(kept["gold"]) is int and 0 <= kept["gold"] < len(kept["choices"])):
        raise UserError(f"{where} has gold = {kept['gold']!r:.20}, not the number of a choice; restore it")
    return kept
