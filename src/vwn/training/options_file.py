"""Options of ``vwn train`` from a file: the record of an earlier run, or YAML or JSON written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vwn.common.errors import UserError


def read_options(path: Path) -> dict[str, list[str]]:
    """Return the options of a file as ``{name: words of the command line}``.

    The file is a run directory, its ``run.json``, or a ``.json``, ``.yaml`` or ``.yml`` file of options and values.
    Names may be nested or dotted (``optim.steps``), the last part counts; null is the default.

    Raises:
        UserError: a file that cannot be read, or holds something else.
    """
    path = path / "run.json" if path.is_dir() else path
    try:
        content = _parse(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the options in {str(path)!r}: {getattr(error, 'strerror', error)}") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]  # of a run.json
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no options; write for example 'steps: 1000'")
    found: dict[str, list[str]] = {}
    for name, words in _options(content):
        if name in found:
            raise UserError(f"{path} gives {name} twice; give it once")
        found[name] = words
    return found


def _parse(path: Path, text: str) -> Any:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"the options in {str(path)!r} must be a run directory, a .json or a .yaml file")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml  # which transformers requires

        return yaml.safe_load(text)
    except Exception as error:  # YAML's are no ValueErrors
        raise UserError(f"{path} cannot be read as {path.suffix}: {' '.join(str(error).split())}") from error


def _options(content: dict[Any, Any]) -> Iterator[tuple[str, list[str]]]:
    for key, value in content.items():
        name = str(key).rpartition(".")[2].replace("_", "-")
        if isinstance(value, dict) and name == "rate-factors":
            value = [f"{group}={factor}" for group, factor in value.items()]
        if isinstance(value, dict):
            yield from _options(value)
        elif isinstance(value, bool) and name != "resume":
            yield name, [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, list):
            if value:
                yield name, [f"--{name}", *map(str, value)]
        elif value is not None:
            yield name, [f"--{name}={value}"]
