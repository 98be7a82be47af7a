"""Text of one's own for torchtitan's loader: ``--dataloader.dataset jsonl --dataloader.dataset_path FILE``.

Files are streamed; each row's ``text`` is a document. A pattern such as ``shards/*.parquet`` names several.
"""

from __future__ import annotations

import glob
from functools import partial
from typing import Any

from datasets import load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from vwn.common.errors import UserError

FORMATS = {"jsonl": "json", "parquet": "parquet"}


def _stream(name: str, path: str) -> Any:
    files = sorted(glob.glob(path))
    if not files:
        raise UserError(f"no file matches --dataloader.dataset_path {path!r}; give a {name} file or a pattern of them")
    return load_dataset(FORMATS[name], data_files=files, split="train", streaming=True)


def _text(row: dict[str, Any]) -> str:
    if not isinstance(row.get("text"), str):
        raise UserError(f"a row has no text under the name 'text'; its columns are {', '.join(map(repr, row))}")
    return row["text"]


for _name in FORMATS:
    DATASETS[_name] = DatasetConfig(path="", loader=partial(_stream, _name), sample_processor=_text)
