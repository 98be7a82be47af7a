"""The paper's parts in plain PyTorch, one module per section.

| section | what | where |
|---|---|---|
| 3.1 | sizes ``D, m, n, d, r, D'`` | :mod:`.geometry` |
| 3.2 | over-width embedding and reduce; hashed n-grams | :mod:`.embedding`, :mod:`.ngram` |
| 3.3, eq. 10 | read and write | :mod:`.connection`; ``read_slots``, ``write_slots`` in :mod:`vwn.ops.reference` |
| 3.3, eqs. 12-14 | slot norm, dynamic routing | :mod:`.generalized`; ``coefficients`` in :mod:`vwn.ops.reference` |
| 3.3, eqs. 15-16 | initial values | ``GeneralizedHyperConnection.initial_values`` (:mod:`.generalized`) |
| 3.3 | Hyper-Connections, Frac-Connections, mHC | :mod:`.relatives` |
| 3.4 | multi-token prediction | :mod:`.multi_token` |
| 4, eq. 17 | the state as a sum over sublayers | ``Unrolled`` (:mod:`vwn.hf.measures`) |
"""
