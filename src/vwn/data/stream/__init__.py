"""Streamed training data: text that is read, tokenised and packed while the model trains.

    source ............ files, a pattern or a hub data set, with its share of the tokens      source.py
      file range ...... a part of a file that one reader reads before it goes on to another   vwn.data.reading
        document ...... a row, or the text up to the next separator
          chunk ....... what is tokenised at once; the position saved is in tokens of a chunk

    reader 0 .. K-1 ... each reads every K-th file range of a pass over each source           reader.py
    batch of step s ... its slot j is filled by reader (s mod K/B) B + j                       loader.py

A run has K readers, a multiple of its global batch of B windows, however many processes and workers share them. So what
a batch holds depends on its step alone, and a checkpoint that says where every reader stands continues anywhere.
"""

from vwn.data.stream.loader import StreamLoader, TokenStream, prepare_stream

__all__ = ["StreamLoader", "TokenStream", "prepare_stream"]
