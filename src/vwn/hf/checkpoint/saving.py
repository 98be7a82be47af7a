"""Saving and loading: what lies beside the weights of a checkpoint, and what is refused when one is read."""

import shutil
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from vwn.common.errors import UserError
from vwn.hf.checkpoint.card import TrainingFacts, model_card
from vwn.hf.configuration import NOT_PLAIN
from vwn.nn.connection import Connection
from vwn.nn.initialisation import OLD_NAMES

SHIM = Path(__file__).with_name("shim.py")
SHIM_MODULE = "modeling_virtual_width"
TASKS = ("ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
AUTO_MAP = {
    "AutoConfig": f"{SHIM_MODULE}.VirtualWidthConfig",
    "AutoModel": f"{SHIM_MODULE}.VirtualWidthModel",
    **{f"AutoModel{task}": f"{SHIM_MODULE}.VirtualWidth{task}" for task in TASKS},
}
CARD = "README.md"
_TEMPLATE = "This model card has been automatically generated."  # of what transformers uploads for want of a card


class SavingMixin:
    """``save_pretrained`` with a model card, ``from_pretrained`` that loads the whole model or raises."""

    config: Any
    _carries_code = False  # folders hold the shim module; see register_for_auto_class
    new_weights: tuple[str, ...] = ()
    """Prefixes of weights that start afresh where a checkpoint lacks them: those of another task's head."""
    training_facts: TrainingFacts | None = None
    """Facts about the training for the model card; a training run sets them."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save safetensors and ``config.json`` as transformers does, and a model card where there is no ``README.md``.

        The folder holds no code: transformers loads its tokenizer without a question, and its model after
        ``import vwn.hf``. See :meth:`register_for_auto_class` for programs without that import.
        """
        if kwargs.pop("safe_serialization", True) is not True:
            raise UserError("safe_serialization = False would write a pickle; leave it out, weights are safetensors")
        self._carries_code |= getattr(self.config, "auto_map", None) is not None  # loaded from a folder that does
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if not adapters_only and is_main_process:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            if self._carries_code:
                shutil.copyfile(SHIM, folder / f"{SHIM_MODULE}.py")
            if not (folder / CARD).exists():
                model_card(self, self.training_facts).save(folder / CARD)
        config = self.config
        if not adapters_only:
            self.config = deepcopy(config)
            if self._carries_code:
                self.config.auto_map = dict(AUTO_MAP)
            # A plain class would read its config inside ours and start with new weights: this name makes it fail.
            self.config.backbone.transformers_weights = NOT_PLAIN
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        finally:
            self.config = config

    def _upload_modified_files(self, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any) -> Any:
        """Restore our card before a push: transformers has put the hub's card, or an empty template, over it."""
        card = Path(working_dir) / CARD
        if card.exists() and _TEMPLATE in (template := ModelCard.load(card)).content:
            self.add_model_tags(template.data.tags or [])  # type: ignore[attr-defined]
            model_card(self, self.training_facts).save(card)
        stamps = {name: time for name, time in files_timestamps.items() if name not in (CARD, f"{SHIM_MODULE}.py")}
        return super()._upload_modified_files(working_dir, repo_id, stamps, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Have folders saved from now on load with ``trust_remote_code=True``, without ``import vwn.hf``.

        They get ``modeling_virtual_width.py``, which imports the classes from the installed package. transformers then
        asks before it loads anything of the folder, the tokenizer included, unless it gets ``trust_remote_code``.
        """
        cls._carries_code = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the whole model, from safetensors alone: no weight is left at its initial value.

        Args:
            ignore_mismatched_sizes: let weights that are missing, or of another shape, start afresh, and leave out
                those that the model has no place for; with a warning that lists them.

        Raises:
            UserError: damaged files, weights that are missing or do not fit, or a checkpoint of another model type.
        """
        source = pretrained_model_name_or_path
        if use_safetensors is False:
            raise UserError("use_safetensors = False would load a pickle, which can run code; leave it out")
        ours = cls.config_class.model_type  # type: ignore[attr-defined]
        if (found := getattr(kwargs.get("config"), "model_type", ours)) != ours:
            raise UserError(f"the config is of model type {found!r}, not {ours!r}; load it with AutoModelForCausalLM")
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                source,
                *model_args,
                ignore_mismatched_sizes=True,  # they are looked at below, with the missing ones
                output_loading_info=True,
                use_safetensors=True,
                key_mapping=OLD_NAMES | (kwargs.pop("key_mapping", None) or {}),
                **kwargs,
            )
        except SafetensorError as error:
            raise UserError(f"the weights in {source} are damaged ({error}); copy or download them again") from error
        if conversions := getattr(model, "_weight_conversions", None):  # saving would bring the old names back
            model._weight_conversions = [c for c in conversions if c.source_patterns[0] not in OLD_NAMES]
        if info["mismatched_keys"] and source is not None:
            where = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
            found = cached_file(source, "config.json", **{name: kwargs[name] for name in where if name in kwargs})
            _take_old_scalars(model, info, Path(found).parent if found else Path(source))
        if not ignore_mismatched_sizes:
            _check_complete(model, info, source)
        if getattr(getattr(model.config, "distributed_config", None), "fsdp_mixed_precision", False):
            raise UserError("fsdp_mixed_precision would round the routing; leave it out, and give dtype=torch.bfloat16")
        _free_connections(model)
        return (model, info) if output_loading_info else model

    def post_init(self) -> None:
        """Keep the routing in float32 (section 4), and drop the parallel plans that an over-width state breaks."""
        for connection in (m for m in self.modules() if isinstance(m, Connection)):  # type: ignore[attr-defined]
            if any(t.dtype in (torch.float16, torch.bfloat16) for t in connection.state_dict().values()):
                connection.float()
        super().post_init()  # type: ignore[misc]
        self._pp_plan: dict[str, Any] = {}  # pipeline buffers are hidden_size wide
        for name in ("_tp_plan", "_fsdp_plan"):  # the backbone's own table and final norm are not in it
            plan = getattr(self, name, None) or {}
            gone = [key for key in plan if key.endswith(("backbone.embed_tokens", "backbone.norm"))]
            setattr(self, name, {key: style for key, style in plan.items() if key not in gone})


def _check_complete(model: Any, info: dict[str, Any], source: Any) -> None:
    """Refuse a model that is not all from the checkpoint, or a checkpoint that does not all go into the model."""
    c = model.config
    model_is = f"this model (m = {c.m}, n = {c.n}, connection {c.connection!r}, {c.embedding} embedding)"
    afresh = "or pass ignore_mismatched_sizes=True to start these afresh"
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"{len(info['mismatched_keys'])} weights in {source} have other shapes than in {model_is}, for instance "
            f"{name}: {tuple(stored)} in the checkpoint, {tuple(wanted)} in the model; use the checkpoint's own "
            f"config, {afresh}"
        )
    missing = [name for name in info["missing_keys"] if not name.startswith(model.new_weights)]
    if missing:
        raise UserError(
            f"{len(missing)} weights of {model_is} are missing from {source} ({_some(missing)}); use a whole "
            f"checkpoint and its own config, {afresh}"
        )
    routing = [name for name in info["unexpected_keys"] if ".connections." in name and ".mtp." not in f".{name}"]
    if routing:
        raise UserError(
            f"{source} holds {len(routing)} routing weights that {model_is} has no place for ({_some(routing)}); use "
            "the checkpoint's own config, or pass ignore_mismatched_sizes=True to leave them out"
        )


@torch.no_grad()
def _take_old_scalars(model: Any, info: dict[str, Any], folder: Path) -> None:
    """Load the scales that earlier checkpoints hold without a dimension."""
    scalars = {name for name, stored, wanted in info["mismatched_keys"] if (*stored, 1) == tuple(wanted)}
    weights = model.state_dict()  # also of frozen connections, whose scales are buffers
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            keys = {key.removeprefix("model."): key for key in tensors.keys()}  # noqa: SIM118
            for name in (name for name in scalars if name.removeprefix("model.") in keys):
                weights[name].copy_(tensors.get_tensor(keys[name.removeprefix("model.")]))
                info["mismatched_keys"] = {key for key in info["mismatched_keys"] if key[0] != name}


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:2]) + (", ..." if len(first) > 2 else "")


def _free_connections(model: Any) -> None:
    """Take accelerate's hooks from the connections, and load for good what ``device_map`` offloads of them.

    The layer's own hook has moved the state by then. A hook on a connection would keep it from the fused ``write_read``
    and from ``keep_states_every``, and its weights are a small part of a layer.
    """
    for connection in (m for m in model.modules() if isinstance(m, Connection)):
        hook = getattr(connection, "_hf_hook", None)
        if hook is None:
            continue
        from accelerate.hooks import remove_hook_from_module

        hook.pre_forward(connection)  # brings in what is offloaded
        hook.offload = False
        remove_hook_from_module(connection)
        vars(connection).pop("forward", None)  # it leaves the class's own in the instance
