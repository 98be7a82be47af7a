"""A file of JSON lines in the run directory, one for each measurement, which a resumed run continues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError
from vwn.common.files import finite


class StepLines:
    """JSON objects, each with the ``step`` that it was measured at, in the order of the steps.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        with self.path.open("a") as file:
            file.write(json.dumps(finite(entry), allow_nan=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run takes once more; a kill in between loses no line."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return all entries; none without a file. Raises `UserError` if it is damaged."""
        try:
            return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it or restore it") from error


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill
