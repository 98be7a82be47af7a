"""Text of one's own for torchtitan's loader: ``--dataloader.dataset jsonl --dataloader.dataset_path FILE``.

Files are streamed, also packed ones (``.jsonl.xz``); each row is a document. A pattern such as ``shards/*.parquet``
names several.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path

from datasets import Features, IterableDataset, Value
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from vwn.common.errors import UserError
from vwn.data.reading import FileRange, kind, read_range

FORMATS = ("jsonl", "parquet")


def keep_control_tokens_text(tokenizer: BaseTokenizer) -> None:
    """Let control tokens that are written in a text (``<|im_start|>``) be encoded as text, as ``vwn train`` does."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.tokenizer.encode_special_tokens = True


def _stream(name: str, path: str) -> IterableDataset:
    files = [file for file in sorted(glob.glob(path)) if f".{name}" in kind(Path(file))]
    if not files:
        raise UserError(f"no {name} file matches --dataloader.dataset_path {path!r}; give a file or a pattern of them")
    return IterableDataset.from_generator(_rows, Features({"text": Value("string")}), gen_kwargs={"files": files})


def _rows(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        held = []
        for chunk in read_range(FileRange(Path(file))):
            held.append(chunk.text)
            if chunk.ends:
                yield {"text": "".join(held)}
                held = []


for _name in FORMATS:
    DATASETS[_name] = DatasetConfig(path="", loader=partial(_stream, _name), sample_processor=itemgetter("text"))
