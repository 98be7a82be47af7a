"""Text in, windows of token ids out: reading, tokenisers, packing and the cache of token ids."""

from vwn.data.corpus import Corpus, prepare
from vwn.data.packing import PackedWindows
from vwn.data.tokenizer import load_tokenizer

__all__ = ["Corpus", "PackedWindows", "load_tokenizer", "prepare"]
