"""Atomic, durable writes of files: each is there whole or not at all, also after a loss of power."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CannotWrite(UserError):
    """The disk is full, or does not take what must be written; what was there before is untouched."""

    exit_code = 74
    """Exit code of the command line: EX_IOERR of sysexits.h."""


def read_json(path: Path) -> Any:
    """Read a JSON object that a run wrote.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it or restore it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold what it should; delete it or restore it")
    return value


def as_json(value: Any) -> str:
    """Format as strict JSON, in which a number that is not finite is null."""
    return json.dumps(finite(value), indent=1, default=str, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as :func:`write_text` does; what is not finite becomes null."""
    write_text(path, as_json(value))


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all.

    Raises:
        CannotWrite: the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in NO_ROOM:
            raise
        raise CannotWrite(
            f"{path} cannot be written ({error.strerror}); make room and go on with --resume, nothing saved is lost"
        ) from error
    sync_directory(path.parent)


def sync(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a folder's names to disk; systems that cannot open folders do so by themselves."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finite(value: Any) -> Any:
    """Replace every number that is not finite, which strict JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
