"""Over-width embedding and reduce (section 3.2): from token ids to ``D'`` numbers, and from ``D'`` back to ``D``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.nn.ngram import NgramEmbedding
from vwn.ops.reference import inverse_rms

EMBEDDING_STD = 1.0
"""Standard deviation of the rows of a new token table, as in ``torch.nn.Embedding``: with the usual 0.02 a small model
learns its first tokens far more slowly."""
EMBEDDING_FORMS = ("direct", "factorised", "replicated")
REDUCE_FORMS = ("linear", "sum", "identity")
REDUCE_NORMS = ("group_norm", "rms_norm", "none")
REDUCE_INITS = ("first_slots", "normal")


class OverWidthEmbedding(StatesItsInitialValues):
    """Map token ids to the initial over-width state ``H'_0``.

    Args:
        geometry: ``(D, m, n)``.
        vocab_size: ``V``.
        form: ``"direct"``, a ``V x D'`` table; ``"factorised"``, a ``V x D`` table and one linear ``D' x D``;
            ``"replicated"``, a ``V x D`` table repeated cyclically over the slots (slot ``j`` = segment ``j mod m``),
            as Hyper-Connections do, and the function-preserving choice when trained weights are widened.
        padding_idx: as in ``torch.nn.Embedding``.
        ngram_order: ``K``; above 1, rows of hashed n-grams of the orders ``2..K`` are added to the table's row, before
            it is expanded or repeated, and ``input_ids`` have the sequence as their last dimension.
        ngram_buckets: rows of the table of each order, as wide as the token table's.
        table_factor: ``k``; above 1, a direct table is ``V x kD'`` and followed by a linear ``D' x kD'``: a wide
            table for a state that is not wider.
        table: the backbone's own embedding, ``V x D``, to use and widen instead of a new one: it may be of a class that
            scales its rows.

    Raises:
        ValueError: unknown ``form``; n-gram or table options that do not fit each other.
    """

    def __init__(
        self,
        geometry: Geometry,
        vocab_size: int,
        form: str = "direct",
        padding_idx: int | None = None,
        ngram_order: int = 1,
        ngram_buckets: int = 0,
        table_factor: int = 1,
        table: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        check_embedding(form, ngram_order, ngram_buckets, table_factor)
        self.geometry, self.form, self.table_factor = geometry, form, table_factor
        width = geometry.over_width * table_factor if form == "direct" else geometry.hidden_size
        self.table = nn.Embedding(vocab_size, width, padding_idx) if table is None else _widened_table(table, width)
        self.ngram = NgramEmbedding(ngram_order, ngram_buckets, width) if ngram_order > 1 else None
        if form == "factorised":
            self.expand_weight = nn.Parameter(torch.empty(geometry.over_width, geometry.hidden_size))
        if table_factor > 1:
            self.contract_weight = nn.Parameter(torch.empty(geometry.over_width, width))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """The linear, if any, keeps the variance of the table's rows, so all forms start at the same scale."""
        shapes = {name: p.shape for name, p in self.named_parameters(recurse=False)}
        return {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}

    def forward(
        self,
        input_ids: Tensor,
        preceding_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Map ``[...]`` ids to ``[..., D']``; the other arguments matter to n-grams only, see ``NgramEmbedding``."""
        rows = self.table(input_ids)
        if self.ngram is not None:
            rows = rows + self.ngram(input_ids, preceding_ids, attention_mask, documents)
        return self.expand(rows)

    def expand(self, rows: Tensor) -> Tensor:
        """Map rows of the table to the over-width state, ``[..., width of the table]`` to ``[..., D']``."""
        if self.form == "factorised":
            return F.linear(rows, self.expand_weight).to(rows.dtype)  # autocast must not round the state
        if self.table_factor > 1:
            return F.linear(rows, self.contract_weight).to(rows.dtype)
        return repeat_over_slots(rows, self.geometry) if self.form == "replicated" else rows

    def extra_repr(self) -> str:
        return f"form={self.form!r}" + (f", table_factor={self.table_factor}" if self.table_factor > 1 else "")


def _widened_table(table: nn.Embedding, width: int) -> nn.Embedding:
    """Return the same module; with new rows if they have to be of another width."""
    if table.embedding_dim != width and (len(list(table.parameters())) > 1 or len(list(table.children()))):
        raise ValueError(
            f"the backbone's {type(table).__name__} does more than look up rows, so it cannot be wider; use the "
            "'replicated' or 'factorised' embedding"
        )
    if table.embedding_dim != width:
        table.embedding_dim = width
        table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, width))
        table.reset_parameters()
    return table


def check_embedding(form: str, ngram_order: int, ngram_buckets: int, table_factor: int) -> None:
    """Refuse an unknown form and n-gram or table options that do not fit each other (``ValueError``)."""
    if form not in EMBEDDING_FORMS:
        raise ValueError(f"embedding form must be one of {EMBEDDING_FORMS}, got {form!r}")
    if ngram_order < 1:
        raise ValueError(f"ngram_order must be 1 (no n-grams) or more, got {ngram_order}")
    if ngram_order > 1 and ngram_buckets < 1:
        raise ValueError(
            f"ngram_order = {ngram_order} needs ngram_buckets, the rows of each order's table, got {ngram_buckets}"
        )
    if ngram_order == 1 and ngram_buckets != 0:
        raise ValueError(f"ngram_buckets = {ngram_buckets} needs ngram_order = 2 or more; with order 1 leave it at 0")
    if table_factor < 1:
        raise ValueError(f"table_factor must be 1 or more, got {table_factor}")
    if table_factor > 1 and form != "direct":
        raise ValueError(
            f"table_factor = {table_factor} widens the table of the direct embedding; use that, or table_factor 1 "
            f"with form {form!r}"
        )


class UnembeddingExpand(StatesItsInitialValues):
    """Map ``D -> kD`` in front of an unembedding whose table is ``k`` times as wide as the backbone."""

    def __init__(self, hidden_size: int, table_factor: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size * table_factor, hidden_size))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Normal with variance ``1 / kD``: it keeps the norm of what it maps, and with it the logits' scale."""
        return {"weight": torch.randn(self.weight.shape) * self.weight.shape[0] ** -0.5}

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., kD]``."""
        return F.linear(hidden, self.weight).to(hidden.dtype)


def repeat_over_slots(hidden: Tensor, geometry: Geometry) -> Tensor:
    """Map ``[..., D]`` to ``[..., D']``: slot ``j`` becomes segment ``j mod m``."""
    return torch.cat([hidden] * (-(-geometry.n // geometry.m)), dim=-1)[..., : geometry.over_width]


class OverWidthReduce(StatesItsInitialValues):
    """Map the final over-width state back to the backbone's width, before the final norm.

    Args:
        geometry: ``(D, m, n)``.
        form: ``"linear"``, the paper's ``W_reduce Norm(H')``; ``"sum"``, segment ``i`` is the sum of the slots
            ``j = i mod m``, as in Hyper-Connections; ``"identity"``, for ``n = m``, where the width is right already.
            ``None``: identity where ``n = m``, else linear.
        norm: the norm of group size ``D`` in front of the linear form: ``"group_norm"`` (the paper's),
            ``"rms_norm"``, or ``"none"``. ``None``: group norm for integer ``r``, else none, as in the paper.
        init: ``"first_slots"``, which starts as the plain residual stream, or ``"normal"`` with variance ``1 / D'``.
            The paper does not say; small models learn much faster from the former (docs/paper_to_code.md).
        eps: of the norm.

    Raises:
        ValueError: unknown option; identity with ``n != m``; a norm at fractional ``r`` or without a linear.
    """

    def __init__(
        self,
        geometry: Geometry,
        form: str | None = None,
        norm: str | None = None,
        init: str = "first_slots",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        form, norm = resolve_reduce(geometry, form, norm)
        if init not in REDUCE_INITS:
            raise ValueError(f"reduce init must be one of {REDUCE_INITS}, got {init!r}")
        self.geometry, self.form, self.norm, self.init, self.eps = geometry, form, norm, init, eps
        if form == "linear":
            self.weight = nn.Parameter(torch.empty(geometry.hidden_size, geometry.over_width))
        if norm != "none":
            self.group_norm = nn.Parameter(torch.empty(geometry.over_width))
        if norm == "group_norm":
            self.group_norm_bias = nn.Parameter(torch.empty(geometry.over_width))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Start ``W_reduce`` as ``init`` says, gains at one, biases at zero."""
        d_in, d_out, values = self.geometry.over_width, self.geometry.hidden_size, {}
        if self.form == "linear":
            first = torch.eye(d_out, d_in)
            values["weight"] = first if self.init == "first_slots" else torch.randn(d_out, d_in) * d_in**-0.5
        if self.norm != "none":
            values["group_norm"] = torch.ones(d_in)
        if self.norm == "group_norm":
            values["group_norm_bias"] = torch.zeros(d_in)
        return values

    def forward(self, state: Tensor) -> Tensor:
        """Map ``[..., D']`` to ``[..., D]``."""
        if self.form == "identity":
            return state
        if self.form == "sum":
            slots, m = state.unflatten(-1, (self.geometry.n, -1)), self.geometry.m
            return torch.cat([slots[..., i::m, :].sum(-2) for i in range(m)], dim=-1)
        return F.linear(self._normalise(state), self.weight)

    def _normalise(self, state: Tensor) -> Tensor:
        if self.norm == "none":
            return state
        groups = state.unflatten(-1, (-1, self.geometry.hidden_size))
        groups = groups.to(torch.promote_types(state.dtype, torch.float32))
        if self.norm == "rms_norm":
            return (groups * inverse_rms(groups, self.eps)).flatten(-2).to(state.dtype) * self.group_norm
        normed = F.layer_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2).to(state.dtype)
        return torch.addcmul(self.group_norm_bias, normed, self.group_norm)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, norm={self.norm!r}, init={self.init!r}"


def resolve_reduce(geometry: Geometry, form: str | None, norm: str | None) -> tuple[str, str]:
    """Fill in the form and norm that ``None`` stands for; check that they fit the geometry and each other."""
    g = geometry
    if form is None:
        form = "identity" if g.n == g.m else "linear"
    if norm is None:
        norm = "group_norm" if form == "linear" and g.is_whole else "none"
    if form not in REDUCE_FORMS:
        raise ValueError(f"reduce form must be one of {REDUCE_FORMS}, got {form!r}")
    if norm not in REDUCE_NORMS:
        raise ValueError(f"reduce norm must be one of {REDUCE_NORMS}, got {norm!r}")
    if form == "identity" and g.n != g.m:
        raise ValueError(f"reduce form 'identity' needs n = m, got m = {g.m}, n = {g.n}; use 'linear' or 'sum'")
    if form != "linear" and norm != "none":
        raise ValueError(f"reduce norm {norm!r} goes with the linear form only; use norm 'none' with form {form!r}")
    if norm != "none" and not g.is_whole:
        raise ValueError(
            f"reduce norm {norm!r} needs an integer r = n/m, got {g.n}/{g.m} = {g.ratio:g}; use 'none', the paper's way"
        )
    return form, norm
