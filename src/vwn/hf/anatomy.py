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
    """Names of the parts of a base model.

    Args:
        stack_name: path from the model to the module that runs the layers; empty for the model itself.
        layers_name: attribute of the stack that holds the list of layers.
        norm_name: attribute of the stack that holds the norm behind the last layer, or empty.
        embedding_name: path from the model to the token embedding.
    """

    stack_name: str
    layers_name: str
    norm_name: str
    embedding_name: str

    def stack(self, model: nn.Module) -> Any:
        """The module that runs the layers."""
        return model.get_submodule(self.stack_name)

    def layers(self, model: nn.Module) -> Any:
        """The ``nn.ModuleList`` of layers."""
        return getattr(self.stack(model), self.layers_name)

    def take_norm(self, model: nn.Module) -> nn.Module:
        """The final norm, replaced by nothing."""
        if not self.norm_name:
            return nn.Identity()
        stack = self.stack(model)
        norm = getattr(stack, self.norm_name)
        setattr(stack, self.norm_name, nn.Identity())
        return norm

    def take_embedding(self, model: nn.Module) -> Any:
        """The token embedding, of which the model keeps nothing."""
        parent, _, name = self.embedding_name.rpartition(".")
        owner = model.get_submodule(parent)
        table = getattr(owner, name)
        setattr(owner, name, None)
        return table


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
        (path, name)
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters())
    ]
    paths = [f"{path}.{name}".lstrip(".") for path, name in lists]
    inner = tuple(f"{path}." for path in paths)  # of a list inside one of these, like a layer's experts
    stacks = [found for found, path in zip(lists, paths, strict=True) if not path.startswith(inner)]
    if len(stacks) != 1:
        found = ", ".join(f"{path}.{name}".lstrip(".") for path, name in stacks) or "none"
        _refuse(model, f"it should run one list of decoder layers, found {found}")
    stack_name, layers_name = stacks[0]
    other = family_of(model.config).embedding_norm
    norms = [n for n, child in model.get_submodule(stack_name).named_children() if n != other and _is_norm(child)]
    if len(norms) > 1:
        _refuse(model, f"it should have one norm behind its layers, found {', '.join(norms)}")
    return Anatomy(stack_name, layers_name, norms[0] if norms else "", embedding)


def check_order(model: Any, ran: list[nn.Module]) -> None:
    """Check how the parts of a base model run.

    Args:
        model: with its ``anatomy``.
        ran: the layers and the other modules of the stack, in the order in which they ran.

    Raises:
        UserError: layers that do not run once each and in turn, or something other than one norm behind them.
    """
    anatomy = model.anatomy
    stack, layers = anatomy.stack(model), [*anatomy.layers(model)]
    names = {id(module): name for name, module in stack.named_children()}
    if [id(m) for m in ran if id(m) not in names] != [id(m) for m in layers]:
        _refuse(model, "it should run each of its layers once, from the first to the last")
    rest = [m for m in ran[ran.index(layers[-1]) + 1 :] if not isinstance(m, nn.Dropout)]
    behind = [names[id(m)] for m in rest]
    if behind != [anatomy.norm_name] * bool(anatomy.norm_name):
        found = ", ".join(f"{name} ({type(getattr(stack, name)).__name__})" for name in behind) or "nothing"
        _refuse(model, f"behind its last layer should run its norm and nothing else, not {found}")
    if behind and ran.count(getattr(stack, anatomy.norm_name)) > 1:
        _refuse(model, f"it uses its final norm {anatomy.norm_name!r} elsewhere as well")


def _refuse(model: Any, reason: str) -> NoReturn:
    raise UserError(f"{own_class(model).__name__} cannot be widened: {reason}")


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is called a norm, has no modules inside, and no weights but vectors."""
    named = "norm" in type(module).__name__.lower() or isinstance(module, nn.Identity)
    return named and not any(module.children()) and all(p.ndim == 1 for p in module.parameters())
