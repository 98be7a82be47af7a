"""The paper's parts in plain PyTorch, one module per section.

- 3.1, sizes ``D, m, n, d, r, D'``: :mod:`.geometry`
- 3.2, over-width embedding and reduce: :mod:`.embedding`; hashed n-grams: :mod:`.ngram`
- 3.3, eq. 10, read and write: :mod:`.connection`; its two lines are ``read_slots`` and ``write_slots`` in
  :mod:`vwn.ops.reference`
- 3.3, eqs. 12-14, slot norm and dynamic routing: :mod:`.generalized`; its lines are in ``coefficients`` in
  :mod:`vwn.ops.reference`
- 3.3, eqs. 15-16, initial values: ``GeneralizedHyperConnection.initial_values`` in :mod:`.generalized`
- 3.3, Hyper-Connections, Frac-Connections, mHC: :mod:`.relatives`
- 3.4, multi-token prediction: :mod:`.multi_token`
- 4, eq. 17, the state as a sum over sublayers: ``DepthMap`` in :mod:`vwn.hf.measures`
"""
