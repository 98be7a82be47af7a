"""Packages that only some commands need: which extra installs each, and the sentence when one is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from vwn.common.errors import UserError

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "tyro": "train",
    "jinja2": "lab",
    "matplotlib": "lab",
    "lm_eval": "eval",
    "liger_kernel": "liger",
    "torchtitan": "titan",
}
"""Package to extra, as in ``pyproject.toml``."""


class MissingExtra(UserError, ImportError):
    """A package that an extra installs is missing."""


def require_packages(purpose: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        purpose: what needs them, the subject of the sentence.
        packages: keys of :data:`EXTRAS`.

    Raises:
        MissingExtra: names the missing packages and the extras that install them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[package] for package in missing}))
        text = f"{purpose} needs {' and '.join(missing)}; install vwn with [{extras}]: pip install '.[{extras}]'"
        if sys.argv[:1] == ["-m"]:  # python -m imports a module's package where nothing could catch an error
            print(f"vwn: {text}", file=sys.stderr)
            sys.exit(2)
        raise MissingExtra(text)
