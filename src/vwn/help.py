"""The text of ``vwn --help``, made from the commands' dataclasses. It is fast, because it does not import torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vwn.training.presets import PRESETS

WHAT = (
    "Virtual Width Networks: train, compare and examine language models whose representation is wider than their "
    "transformer (arXiv 2511.11238)."
)
_INDENT = 24  # of the options' texts
_SYNONYMS = {"lr": "learning-rate", "bs": "batch-size", "dataset": "data", "output-dir": "out", "seq-len": "window"}


@dataclass(frozen=True)
class Option:
    """One option, or a positional argument, of a command."""

    name: str
    metavar: str
    text: str
    default: str
    group: str
    positional: bool
    switch: bool

    @property
    def usage(self) -> str:
        """Return the option as it is typed."""
        return self.metavar if self.positional else f"--{self.name} {self.metavar}".strip()


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        config: dataclass that its options are made from; its docstring is the purpose, in one sentence.
        run: what is called with such a dataclass.
        examples: command lines, without ``vwn``.
        first: options that everybody needs, shown first.
        packages: packages of extras that it needs.
        hidden: options of a shared dataclass that this command does not have.
        file: what a file in front of the options may be, if there can be one.
    """

    config: type
    run: Callable[[Any], None]
    examples: tuple[str, ...]
    first: tuple[str, ...]
    packages: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    file: str = ""

    @cached_property
    def options(self) -> list[Option]:
        """Return all options, those of nested dataclasses by their group."""
        return [option for option in _options(self.config) if option.name not in self.hidden]


def overview(commands: Mapping[str, Command]) -> str:
    """Return what ``vwn`` and ``vwn --help`` print."""
    lines = [_wrap(WHAT), "", "usage: vwn COMMAND [OPTIONS]", ""]
    for name, command in commands.items():
        lines += [_row(name, command.config.__doc__ or "", 10), f"{'':12}vwn {command.examples[0]}"]
    return "\n".join([*lines, "", "vwn COMMAND --help shows the options of a command, vwn --version the version."])


def command_help(name: str, command: Command) -> str:
    """Return what ``vwn NAME --help`` prints."""
    options = command.options
    needed = [o.usage for o in options if o.default == "required"]
    usage = " ".join(["usage: vwn", name, *(["[FILE]"] if command.file else []), *needed, "[OPTIONS]"])
    lines = [usage, "", _wrap(command.config.__doc__ or "")]
    if command.file:
        lines.append(_wrap(f"FILE: {command.file}"))
    lines += ["", "examples:"]
    lines += [f"  vwn {example}" for example in command.examples]
    by_name = {o.name: o for o in options}
    groups: dict[str, list[Option]] = {"main": [by_name[o] for o in command.first]}
    for option in options:
        if option.name not in command.first:
            groups.setdefault(option.group, []).append(option)
    for group, members in groups.items():
        lines += ["", f"{group} options:", *(_row(o.usage, _with_default(o)) for o in members)]
    if "backbone" in by_name:
        lines += ["", "presets for --backbone, with their parameters at 32,768 tokens:"]
        for preset_name, p in PRESETS.items():
            experts = f", {p.experts} experts" if p.experts else ""
            size = f"{p.parameters() / 1e6:.0f} M"
            lines.append(_row(preset_name, f"{p.depth} layers, width {p.width}{experts}: {size}", 14))
    return "\n".join(lines)


def unknown_option(name: str, command: Command, given: str) -> str:
    """Return the sentence about an option that a command does not have, with the one that was probably meant."""
    known = [o.name for o in command.options if not o.positional]
    meant = _SYNONYMS.get(given)
    close = [meant] if meant in known else get_close_matches(given, known, 1) or [k for k in known if given in k][:1]
    hint = f"did you mean --{close[0]}? " if close else ""
    return f"vwn {name} has no option --{given}; {hint}vwn {name} --help shows all"


def unknown_command(given: str, names: Iterable[str]) -> str:
    """Return the sentence about a command that does not exist."""
    names = list(names)
    close = get_close_matches(given, names, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no command {given!r}; {hint}the commands are {', '.join(names)}"


def _options(config: type, group: str = "other") -> Iterator[Option]:
    texts, hints = _field_texts(config), get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        inner: Any = hints[field.name]
        marks: list[Any] = []
        if get_origin(inner) is Annotated:
            inner, *marks = get_args(inner)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _options(inner, field.name)
            continue
        metavar = next((m.metavar for m in marks if getattr(m, "metavar", None)), None)
        required = field.default is MISSING and field.default_factory is MISSING
        yield Option(
            name=field.name.replace("_", "-"),
            metavar=_metavar(inner) if metavar is None else metavar,
            text=texts.get(field.name, ""),
            default="required" if required else _shown(field.default),
            group=group,
            positional=metavar is not None,
            switch=inner is bool,
        )


def _field_texts(config: type) -> dict[str, str]:
    """Read the strings under the fields of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for line, following in pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = getattr(following.value, "value", None)
                if isinstance(text, str):
                    found[line.target.id] = " ".join(text.replace("`", "").split())  # type: ignore[union-attr]
    return found


def _metavar(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        words = ["" if k is bool else _metavar(k) for k in inner if k is not type(None)]
        return "[{}]".format(*[w for w in words if w]) if "" in words else "|".join(words)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}" if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"{_metavar(inner[0])} ..."
    return {bool: "", int: "INT", float: "FLOAT", str: "TEXT"}.get(kind, kind.__name__.upper())


def _shown(default: Any) -> str:
    if default is False or default in (MISSING, None, ""):  # not 0
        return ""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return "on" if default is True else str(default)


def _with_default(option: Option) -> str:
    said = not option.default or "default" in option.text
    text = option.text if said else f"{option.text} [{option.default}]".strip()
    return text + (f" (--no-{option.name} turns it off)" if option.switch and option.default == "on" else "")


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size().columns))


def _wrap(text: str) -> str:
    return textwrap.fill(text, _width(), break_on_hyphens=False)


def _row(name: str, text: str, indent: int = _INDENT) -> str:
    lines = textwrap.wrap(text, _width() - indent - 2, break_on_hyphens=False) or [""]
    if len(name) >= indent:
        lines.insert(0, "")
    first = f"  {name:{indent}}{lines[0]}".rstrip()
    return "\n".join([first, *(" " * (indent + 2) + line for line in lines[1:])])
