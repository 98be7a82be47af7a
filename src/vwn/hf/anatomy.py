"""The parts of a base model of transformers: where its layers, its final norm and its token embedding are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from vwn.common.errors import UserError
from vwn.hf.families import family_of
from vwn.hf.on_demand import own_class


@dataclass(frozen=True)
class Anatomy:
    """Paths from a base model to its parts; ``norm_path`` is empty where no norm is behind the layers."""

    layers_path: str
    norm_path: str
    embedding_path: str

    def stack(self, model: nn.Module) -> Any:
        """Return the module that runs the layers."""
        return model.get_submodule(self.layers_path.rpartition(".")[0])

    def layers(self, model: nn.Module) -> Any:
        """Return the ``nn.ModuleList`` of layers."""
        return model.get_submodule(self.layers_path)

    def take_ends(self, model: nn.Module) -> tuple[Any, Any]:
        """Take the final norm and the token embedding out of the model, and return them."""
        norm = _replace(model, self.norm_path, nn.Identity()) if self.norm_path else nn.Identity()
        return norm, _replace(model, self.embedding_path, None)


def _replace(model: nn.Module, path: str, new: nn.Module | None) -> Any:
    owner, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    setattr(model.get_submodule(owner), name, new)
    return old


def find_anatomy(model: Any) -> Anatomy:
    """Find the parts of a base model by what its modules are; :func:`check_order` looks at how they run.

    Raises:
        UserError: no list of layers or several, several norms beside it, no token embedding, or no inputs_embeds.
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        _refuse(model, "its forward takes no inputs_embeds")
    table = model.get_input_embeddings()
    embedding = next((path for path, module in model.named_modules() if module is table and path), None)
    if embedding is None or not isinstance(table, nn.Embedding):
        _refuse(model, "it has no token embedding that could be replaced")
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    ]
    inner = tuple(f"{path}." for path in lists)  # of a list inside one of these, like a layer's experts
    lists = [path for path in lists if not path.startswith(inner)]
    if len(lists) != 1:
        _refuse(model, f"it should run one list of decoder layers, found {', '.join(lists) or 'none'}")
    stack, other = lists[0].rpartition(".")[0], family_of(model.config).embedding_norm
    norms = [n for n, child in model.get_submodule(stack).named_children() if n != other and _is_norm(child)]
    if len(norms) > 1:
        _refuse(model, f"it should have one norm behind its layers, found {', '.join(norms)}")
    return Anatomy(lists[0], f"{stack}.{norms[0]}".lstrip(".") if norms else "", embedding)


def check_order(model: Any, ran: list[nn.Module]) -> None:
    """Refuse a base model unless its layers run once each and in turn, with its norm and nothing else behind them.

    Args:
        model: with its ``anatomy``.
        ran: the layers and the other modules of the stack, in the order in which they ran.
    """
    wanted = [*model.anatomy.layers(model)]
    last = max((i for i, module in enumerate(ran) if module is wanted[-1]), default=0)
    if model.anatomy.norm_path:
        wanted.append(model.get_submodule(model.anatomy.norm_path))
    found = [m for i, m in enumerate(ran) if m in wanted or (i > last and not isinstance(m, nn.Dropout))]
    if found != wanted:
        _refuse(model, "it should run each of its layers once, in turn, and its norm once, with nothing else behind")


def _refuse(model: Any, reason: str) -> NoReturn:
    raise UserError(f"{own_class(model).__name__} cannot be widened: {reason}")


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is called a norm, has no modules inside, and no weights but vectors."""
    named = "norm" in type(module).__name__.lower() or isinstance(module, nn.Identity)
    return named and not any(module.children()) and all(p.ndim == 1 for p in module.parameters())
