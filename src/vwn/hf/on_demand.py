"""Classes made when they are needed: a mixin of ours in front of a class of transformers."""

from functools import cache
from typing import Any, ClassVar


class OnDemand:
    """Base of such mixins. A pickle names the mixin and the class behind it, as the class itself has no module."""

    prefix: ClassVar[str]  # of the names of the classes

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new, (type(self)._mixin, own_class(self)), self.__dict__  # type: ignore[attr-defined]


@cache
def mixed_class(mixin: Any, base: Any) -> Any:
    """Make a subclass of ``base`` with ``mixin`` in front."""
    fields = {"widened_from": base, "_mixin": mixin, "__module__": base.__module__}  # transformers reads its source
    return type(f"{mixin.prefix}{base.__name__}", (mixin, base), fields)


def mix_in(mixin: Any, module: Any) -> None:
    """Put ``mixin`` in front of the class of ``module``, in place."""
    kind: Any = type(module)
    module.__class__ = mixed_class(mixin, kind)


def own_class(module: Any) -> Any:
    """Return the class that a module had before it was widened."""
    return getattr(type(module), "widened_from", type(module))


def _new(mixin: type, base: type) -> Any:
    cls = mixed_class(mixin, base)
    return cls.__new__(cls)
