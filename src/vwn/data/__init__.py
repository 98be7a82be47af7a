"""Turn text into windows of token ids.

sources.py     what a name stands for: files, a folder, the standard library, a hub data set
reading.py     the documents of a file, whole or from any place on (unpacking.py: .xz, .gz, .zst)
tokenizer.py   documents to ids, with control tokens in the text kept as text
corpus.py      `prepare`: all of a text at once (splitting.py: in two sides), cached (packing.py)
stream/        `prepare_stream`: read while the model trains
"""

from vwn.data.corpus import Corpus, prepare
from vwn.data.packing import PackedWindows
from vwn.data.tokenizer import load_checkpoint_tokenizer, load_tokenizer

__all__ = ["Corpus", "PackedWindows", "load_checkpoint_tokenizer", "load_tokenizer", "prepare"]
