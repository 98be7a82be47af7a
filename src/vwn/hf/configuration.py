"""Configuration of a virtual-width model: any causal-LM backbone config of transformers, plus the virtual width."""

import logging
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vwn.common.errors import UserError
from vwn.nn.embedding import EMBEDDING_FORMS, REDUCE_INITS, check_embedding, resolve_reduce
from vwn.nn.generalized import CARRY_CONSTRAINTS
from vwn.nn.geometry import Geometry

_log = logging.getLogger("vwn.hf")

# Saved in the backbone's config as the name of its weights, so that a plain class fails (vwn.hf.checkpoint.saving).
NOT_PLAIN = "these are weights of a model with virtual width; `import vwn.hf` and load it with AutoModelForCausalLM"

CONNECTIONS = ("ghc", "hc", "mhc", "residual")

# Trainers, generation, adapters and evaluation harnesses read these from the outer config, or set them on it.
DELEGATED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "use_cache",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
)

_SIZES = (*DELEGATED[:3], "num_attention_heads", "num_key_value_heads", "head_dim")

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

# transformers chooses these when a model is made; the choice is the backbone's.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")

# Other options that may be given: those of any config.
_OTHERS = {*TOKEN_IDS, *IMPLEMENTATIONS, "auto_map", "is_decoder", "quantization_config"}
_OTHERS |= {name for name in dir(PreTrainedConfig) if not callable(getattr(PreTrainedConfig, name))}

# Names of options on the command line and in papers.
_ALIASES = {"mtp": "num_mtp_modules", "static": "dynamic=False", "num_slots": "n", "fraction_rate": "m"}


@strict
class VirtualWidthConfig(PreTrainedConfig):
    """A backbone and its virtual width.

    Args:
        backbone: config (or its dict, with ``model_type``) of the transformers causal-LM that is widened.
        m: fraction rate, divides the backbone's ``hidden_size``.
        n: slots, ``n >= m``; the virtual width factor is ``r = n / m``.
        connection: ``"ghc"``, Generalized Hyper-Connections; ``"hc"``, Hyper-Connections (``m = 1``) or
            Frac-Connections (``n = m``); ``"mhc"`` (``m = 1``); or ``"residual"``: the backbone's own layers, untouched
            (``m = n = 1``), the baseline. Papers with ``m = 1`` streams start from copies of the embedding and end in
            their sum: ``embedding="replicated"``, ``reduce="sum"``.
        dynamic: token-dependent routing (eqs. 12-14) or static matrices only.
        frozen: keep the routing at its initial values.
        carry_constraint: ``"none"``, the paper's, or for ``"ghc"`` ``"identity"`` or ``"doubly_stochastic"``.
        embedding: ``"direct"``, ``"factorised"`` or ``"replicated"`` (section 3.2).
        ngram_order: ``K``; above 1, hashed n-grams of the orders ``2..K`` are added to the embedding.
        ngram_buckets: rows of each order's n-gram table.
        table_factor: ``k``, for ``connection="residual"``: the token table is ``V x kD``, then a linear ``kD -> D``,
            and the unembedding a linear ``D -> kD``, then ``V x kD``: the parameters of a wide table, no wide state.
        reduce: ``"linear"``, ``"sum"`` or ``"identity"``; ``None`` is identity where ``n = m``, else linear.
        reduce_norm: ``"group_norm"``, ``"rms_norm"`` or ``"none"``; ``None`` is the paper's choice.
        reduce_init: ``"first_slots"`` (starts as the plain residual stream) or ``"normal"``.
        num_mtp_modules: multi-token prediction modules (section 3.4), chained; 1 predicts the next two tokens.
        mtp_loss_weight: λ, the weight of each further token's loss.
        tie_word_embeddings: share the ``V x D`` table with the unembedding; impossible for a ``V x D'`` table.

    Raises:
        ValueError: unknown options, or options that do not fit the backbone or each other.
    """

    model_type = "virtual_width"
    sub_configs = {"backbone": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "cache_params",
        "over_width_state",
        "over_width_hidden_states",
        "router_logits",
        "mtp_logits",
        "losses",
    ]

    base_model_fsdp_plan = {"embed_tokens.table": "free_full_weight", "norm": "keep_full_weight"}

    backbone: Any = None  # a dict until __post_init__, then a config
    m: int = 1
    n: int = 1
    connection: str = "ghc"
    dynamic: bool = True
    frozen: bool = False
    carry_constraint: str = "none"
    embedding: str = "direct"
    ngram_order: int = 1
    ngram_buckets: int = 0
    table_factor: int = 1
    reduce: str | None = None
    reduce_norm: str | None = None
    reduce_init: str = "first_slots"
    num_mtp_modules: int = 0
    mtp_loss_weight: float | int = 0.3
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone is None:
            self.backbone = CONFIG_MAPPING["llama"]()
        elif isinstance(self.backbone, dict):
            fields = deepcopy(self.backbone)
            if (kind := fields.pop("model_type", None)) not in CONFIG_MAPPING:
                raise ValueError(f"the backbone's model_type must be one that transformers knows, got {kind!r}")
            self.backbone = CONFIG_MAPPING[kind](**fields)
        elif not isinstance(self.backbone, PreTrainedConfig):
            raise ValueError(f"backbone must be a transformers config or its dict, got {type(self.backbone).__name__}")
        elif self.backbone.get_text_config(decoder=True) is not self.backbone:
            kind = self.backbone.get_text_config(decoder=True).model_type
            raise ValueError(
                f"a backbone of type {self.backbone.model_type} takes more than text; give the config of its text "
                f"model, of type {kind}"
            )
        else:
            self.backbone = deepcopy(self.backbone)  # several models may be made from one backbone's config
        if getattr(self.backbone, "transformers_weights", None) == NOT_PLAIN:
            del self.backbone.transformers_weights
        if self.transformers_version is None:  # a saved config may hold what other libraries put there
            self._check_names(kwargs)
        for name in DELEGATED:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.backbone, "tie_word_embeddings", False))
            if self.tie_word_embeddings and self.embedding == "direct" and self.n != self.m:
                self.tie_word_embeddings = False
                _log.warning_once(  # type: ignore[attr-defined] # transformers adds it
                    f"the backbone of type {self.backbone.model_type} ties its embeddings, but a direct table is as "
                    "wide as the state: not tied here (embedding='factorised' or 'replicated' would keep them tied)"
                )
        self._check_choices()
        self.reduce, self.reduce_norm = resolve_reduce(self.geometry, self.reduce, self.reduce_norm)
        for key in TOKEN_IDS:
            kwargs.setdefault(key, getattr(self.backbone, key, None))
        for name in IMPLEMENTATIONS:  # it would be set to None here, and with it the backbone's own
            kwargs.setdefault(name, getattr(self.backbone, f"_{name}"))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in TOKEN_IDS and value is not None and isinstance(self.__dict__.get("backbone"), PreTrainedConfig):
            setattr(self.backbone, name, value)  # heads read them there

    def _check_names(self, given: dict[str, Any]) -> None:
        """Refuse options that there are not, and name the one that may be meant."""
        known = {*self.__dataclass_fields__, *DELEGATED}
        for name in given:
            if name in known | _OTHERS or name in GenerationConfig._get_default_generation_params():
                continue
            near = [_ALIASES[name]] if name in _ALIASES else get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "if it is the backbone's, set it in the backbone's config"
            raise ValueError(f"VirtualWidthConfig has no option {name!r}; {hint}")

    def _check_choices(self) -> None:
        for name, choices in (
            ("connection", CONNECTIONS),
            ("carry_constraint", CARRY_CONSTRAINTS),
            ("embedding", EMBEDDING_FORMS),
            ("reduce_init", REDUCE_INITS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.connection == "residual" and (self.m, self.n) != (1, 1):
            raise ValueError(
                f"connection 'residual' is the plain backbone, so m = n = 1; got m = {self.m}, n = {self.n}; "
                "use connection 'ghc' for a virtual width"
            )
        check_embedding(self.embedding, self.ngram_order, self.ngram_buckets, self.table_factor)
        if self.table_factor > 1 and self.connection != "residual":
            raise ValueError(
                f"table_factor = {self.table_factor} is for the plain backbone, connection 'residual'; with connection "
                f"{self.connection!r} m and n set the table's width"
            )
        if self.connection == "mhc" and (self.m != 1 or not self.dynamic):
            raise ValueError(
                "connection 'mhc' is dynamic and has streams of the backbone's width, m = 1; got m = "
                f"{self.m}, dynamic = {self.dynamic}; use 'ghc' or 'hc'"
            )
        if self.carry_constraint != "none" and self.connection != "ghc":
            raise ValueError(
                f"carry_constraint {self.carry_constraint!r} belongs to connection 'ghc', got {self.connection!r}; "
                "set carry_constraint to 'none'"
            )
        if self.num_mtp_modules < 0:
            raise ValueError(f"num_mtp_modules must be 0 or more, got {self.num_mtp_modules}")
        if not 0 <= self.mtp_loss_weight < float("inf"):
            raise ValueError(f"mtp_loss_weight must be finite and 0 or more, got {self.mtp_loss_weight}")
        if self.tie_word_embeddings and self.embedding == "direct" and self.n != self.m:
            raise ValueError(
                f"tie_word_embeddings needs a table as wide as the backbone, but the direct embedding at m = {self.m}, "
                f"n = {self.n} is {self.n / self.m:g} times wider; use the factorised embedding, or set "
                "tie_word_embeddings to false"
            )

    @property
    def geometry(self) -> Geometry:
        """``(D, m, n)`` and what follows from them."""
        return Geometry(self.backbone.hidden_size, self.m, self.n)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """The backbone's tensor-parallel plan; the over-width state and its routing are replicated."""
        plan = self.backbone.base_model_tp_plan or {}
        wide = {"embed_tokens.table": "embedding_rowwise"} if plan else {}
        return wide | {f"backbone.{name}": style for name, style in plan.items()}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: Any) -> None:
        """Ignore the value, which transformers before 5.18 sets; here it follows from the backbone."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: classes of an installed package are imported, their source is not copied into checkpoints."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a ``config.json``; a ``UserError`` if it is of another model type."""
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (found := fields.get("model_type")) != cls.model_type:
            raise UserError(
                f"{pretrained_model_name_or_path} is a checkpoint of model type {found!r}, not {cls.model_type!r}; "
                "load it with AutoModelForCausalLM, and give it a virtual width with vwn.widen"
            )
        return fields, unused

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the backbone's sizes that other libraries look for here."""
        return super().to_dict() | {name: getattr(self, name) for name in _SIZES if hasattr(self, name)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that are saved; the sizes are in the backbone."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in _SIZES}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's config: what caches, masks and generation read."""
        return self.backbone

    def mtp_backbone(self) -> PreTrainedConfig:
        """Return the config of a backbone of one layer, of the kind of the last: the extra layer of an MTP module."""
        fields = self.backbone.to_dict()
        depth = self.backbone.num_hidden_layers
        per_layer = {k: v[-1:] for k, v in fields.items() if k.endswith("layer_types") and v and len(v) == depth}
        config = type(self.backbone)(**fields | {"num_hidden_layers": 1} | per_layer)
        config._attn_implementation = self.backbone._attn_implementation
        return config


def _delegate(name: str) -> property:
    """Make a field that lives on the backbone's config and is read and set through the outer one."""

    def get(self: VirtualWidthConfig) -> Any:
        try:
            return getattr(self.backbone, name)
        except RuntimeError as error:  # it differs by layer
            raise AttributeError(str(error)) from error

    return property(get, lambda self, value: setattr(self.backbone, name, value))


for _name in (*DELEGATED, *(f"_{name}_internal" for name in IMPLEMENTATIONS)):
    setattr(VirtualWidthConfig, _name, _delegate(_name))
