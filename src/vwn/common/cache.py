"""Cache folders that are built once: complete or absent, whatever kills the process that builds them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from vwn.common.errors import UserError

T = TypeVar("T")


def default_cache_dir() -> Path:
    """Return `$VWN_CACHE`, else `~/.cache/vwn`. Raises `UserError` where there is no home directory."""
    folder = os.path.expanduser(os.environ.get("VWN_CACHE") or "~/.cache/vwn")
    if folder.startswith("~"):
        raise UserError(
            f"the cache folder {folder} is in a home directory that cannot be found; name another folder in the "
            "environment variable VWN_CACHE"
        )
    return Path(folder)


def load_or_build(folder: Path, load: Callable[[Path], T | None], build: Callable[[Path], None]) -> T:
    """Load `folder`; where `load` returns None (nothing there, or not whole), `build` fills a new folder first.

    The new folder takes its name only when it is complete, by one rename. Processes that want the same folder wait for
    the first; what a killed one left is removed by the next. Raises `UserError` where the cache cannot be written.
    """
    if (found := load(folder)) is not None:
        return found
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if (found := load(folder)) is not None:
                return found
            for left in (partial, folder):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the cache in {folder.parent} cannot be written ({error.strerror or error}); free space there, or name "
            "another folder in the environment variable VWN_CACHE"
        ) from error
    found = load(folder)
    assert found is not None, f"{folder} was built incomplete"
    return found
