"""Small texts and the files that hold them, for the tests of `vwn.data`."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path

from vwn.data.reading import SEPARATOR

DOCUMENTS = [f"Document {i}:\n\tein Stück Text, 数 {i * i}, 🎈 — and\r\n  more of it.\n" * 4 for i in range(40)]


def write_txt(folder: Path, documents: Iterable[str]) -> Path:
    path = folder / "text.txt"
    path.write_bytes(SEPARATOR.join(documents).encode())
    return path


def write_jsonl(folder: Path, documents: Iterable[str], column: str = "text") -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(documents)))
    return path


def write_parquet(folder: Path, documents: Iterable[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = folder / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": list(documents), "n": range(len(list(documents)))}), path)
    return path


def packed(path: Path) -> Path:
    result = path.with_name(path.name + ".xz")
    result.write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    return result


def write_folder(folder: Path, documents: Iterable[str]) -> Path:
    documents = list(documents)
    (folder / "b" / "deep").mkdir(parents=True)
    write_jsonl(folder, documents[:10]).rename(folder / "a.jsonl")
    packed(write_txt(folder, documents[10:20])).rename(folder / "b" / "deep" / "x.TXT.XZ")
    write_txt(folder, documents[20:]).rename(folder / "c.txt")
    (folder / "ignored.csv").write_text("not,read")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("not read either")
    return folder


WRITERS: dict[str, Callable[[Path, Iterable[str]], Path]] = {
    "txt": write_txt,
    "txt.xz": lambda folder, documents: packed(write_txt(folder, documents)),
    "jsonl": write_jsonl,
    "jsonl.xz": lambda folder, documents: packed(write_jsonl(folder, documents, "content")),
    "parquet": write_parquet,
    "folder": write_folder,
}
