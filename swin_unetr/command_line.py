"""From a command line, as people type it, to a dataclass of options; errors say what an option accepts."""

from __future__ import annotations

import difflib
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

EXAMPLES = {int: ("64", "96", "128", "160"), float: ("1.5", "2.0", "2.5", "3.0")}

SEVERAL = (
    "Several values of an option stand after it, as in 96 96 64, or are a list, as in [96,96,64]. Such an option is "
    "given once on a command line, where it replaces what files say."
)


def _path(text: object) -> Path:
    """`pathlib` would turn an empty string into the current folder, which nobody means."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"Got value: {text!r}")
    return Path(text)


register_type(Path, deserializer=_path, type_check=lambda value, kind: isinstance(value, kind))


class Parser(ArgumentParser):
    """A parser whose errors are a `ValueError` without the usage: which option, its value, what is accepted.

    Args:
        kind: dataclass of the options.
    """

    def __init__(self, kind: type, **more: Any) -> None:
        super().__init__(epilog=SEVERAL, **more)
        self.kind = kind
        self.types = dict(leaves(kind))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if match := re.match(r'Parser key "([\w.]+)":\n', message):
            raise ValueError(self._not_accepted(match[1], message)) from ex
        if match := re.search(
            r"(?:Option|Group '(?P<group>[\w.]+)' does not accept option) '(?P<name>[^']+)'", message
        ):
            self.refuse(f"{match['group']}.{match['name']}" if match["group"] else match["name"])
        if match := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise ValueError(f"missing: {', '.join(f'--{name}' for name in match[1].split(', '))}") from ex
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
            raise ValueError(f"got {match[1]!r}, which belongs to no option") from ex
        raise ValueError(message.strip()) from ex

    def refuse(self, name: str) -> NoReturn:
        """Raise an error that there is no option `name`, with those that may be meant."""
        known = [*self.types, *(action.dest for action in self._actions)]
        meant = nearest(name, known)
        hint = f": did you mean {' or '.join(f'--{option}' for option in meant)}?" if meant else ""
        raise ValueError(f"no option --{name}{hint} ({self.prog} --help lists all)")

    def _not_accepted(self, name: str, message: str) -> str:
        came = re.findall(r"(?:Got|Given) value: (.*)", message)
        if name not in self.types or not came:
            return " ".join(re.sub(r'Parser key "([\w.]+)":', r"\1:", message).split())
        return f"{name} is {came[-1] or repr('')}; accepted {form(self.types[name])}"

    def typed(self, argv: Sequence[str]) -> list[str]:
        """`argv` with each option and its words as one, as the parser reads them: ``--roi 64 64 64`` as a list.

        Raises:
            ValueError: there is no such option, it has no value, or an option of several values is given twice: some
                would expect the last to count, others all of them.
        """
        typed: list[str] = []
        several: set[str] = set()
        words = deque(argv)
        while words:
            word = words.popleft()
            option, equals, value = word.partition("=")
            name = option[2:].removesuffix("+")
            if not option.startswith("--") or name not in self.types:
                if option.startswith("--") and not self._takes(name):
                    self.refuse(name)
                typed.append(word)
                continue
            if _origin(self.types[name]) is not None:
                if name in several and not option.endswith("+"):
                    raise ValueError(f"{name} is given twice; accepted is --{name} once, with all its values after it")
                several.add(name)
            given = [value] if equals else []
            while words and not words[0].startswith("--") and words[0] != "-h":
                given.append(words.popleft())
            typed.append(f"{option}={self._text(name, given)}")
        return typed

    def _takes(self, name: str) -> bool:
        """Whether there is an option `name` that is not a field of the dataclass: a group, --config, a class's name."""
        mapping = next((option for option in self.types if name.startswith(f"{option}.")), None)
        return any(f"--{name}" in action.option_strings for action in self._actions) or (
            mapping is not None and _origin(self.types[mapping]) is Mapping
        )

    def _text(self, name: str, given: Sequence[str]) -> str:
        """The words `given` to an option, as the single word that the parser reads."""
        kind = self.types[name]
        if not given:
            if kind is bool:
                return "true"
            raise ValueError(f"{name} has no value; accepted {form(kind)}")
        whole = " ".join(given).strip()
        if kind is bool:
            whole = whole.lower()
        if _origin(kind) is Sequence and not _is_written_out(whole) and not (whole == "null" and _is_optional(kind)):
            return _list(given, _item(kind))
        if _origin(kind) is None and len(given) > 1:
            raise ValueError(f"{name} is {whole}; accepted {form(kind)}")
        return whole if _origin(kind) is not None or kind is bool else given[0]


def leaves(kind: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names and types of the options in a dataclass and the dataclasses in it, such as ``data.folds``."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if not field.init:
            continue
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def made(kind: type, parsed: Namespace, prefix: str = ""):
    """The dataclass `kind` from what a parser returned.

    Raises:
        ValueError: an option's value is not accepted; the message names the option.
    """
    hints = get_type_hints(kind)
    given = {}
    for field in fields(kind):
        if field.init:
            if field.name not in parsed:  # for example, a list in place of a section
                raise ValueError(f"{prefix.removesuffix('.') or 'config'} is incomplete; accepted are options by name")
            name, hint, value = f"{prefix}{field.name}", hints[field.name], parsed[field.name]
            section = is_dataclass(hint)
            if section and not isinstance(value, Namespace):
                raise ValueError(f"{name} is {value!r}; accepted are its options by name")
            if value is None and not section and not _is_optional(hint):
                raise ValueError(f"{name} is null; accepted {form(hint)}")
            given[field.name] = made(hint, value, f"{name}.") if section else value
    try:
        return kind(**given)
    except ValueError as error:
        says = str(error)
        named = re.match(r"\w+", says)
        # If the message begins with the option, make it begin with the option's full name.
        where = prefix if named and named[0] in given else f"{prefix.removesuffix('.')}: "
        raise ValueError(f"{where}{says}" if prefix else says) from error


def nearest(name: str, known: Collection[str]) -> list[str]:
    """The options in `known` that may be meant by `name`: with the same last part, or spelled much like it."""
    name = name.replace("-", "_")
    tail = name.rpartition(".")[2]
    same = [option for option in known if option.rpartition(".")[2] == tail]
    if same:
        return sorted(set(same))
    tails = {option.rpartition(".")[2]: option for option in known}
    close = difflib.get_close_matches(name, known, 1) or [
        tails[found] for found in difflib.get_close_matches(tail, tails, 1)
    ]
    return close


def form(kind: Any) -> str:
    """What an option of type `kind` accepts, in words, with the verb."""
    null = ", or null" if _is_optional(kind) else ""
    kind = _some(kind)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if kind in words:
        return f"is {words[kind]}{null}"
    if get_origin(kind) is Literal:
        return f"are {', '.join(map(str, get_args(kind)))}{null}"
    if _origin(kind) is Mapping:
        return f"are label values by class name, such as '{{spleen: 1, liver: [2, 3]}}'{null}"
    item = _item(kind)
    if get_origin(item) is Literal:
        return f"are one or more of {', '.join(map(str, get_args(item)))}{null}"
    if item in EXAMPLES:
        count = 3 if Ellipsis in get_args(kind) else len(get_args(kind))
        example = EXAMPLES[item][:count]
        number = "whole numbers" if item is int else "numbers"
        of = f"{count} {number}" if Ellipsis not in get_args(kind) else number
        return f"are {of}, such as {' '.join(example)} or [{', '.join(example)}]{null}"
    return f"is one {'path' if item is Path else 'text'} or more{null}"


def _some(kind: Any) -> Any:
    """`kind` without None."""
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part is not NoneType)
    return kind


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def _origin(kind: Any) -> type | None:
    """`Sequence` or `Mapping` for a type of several values, else None."""
    origin = get_origin(_some(kind))
    if not isinstance(origin, type):
        return None
    return Mapping if issubclass(origin, Mapping) else Sequence if issubclass(origin, Sequence) else None


def _item(kind: Any) -> Any:
    return get_args(_some(kind))[0]


def _is_written_out(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _list(given: Sequence[str], item: Any) -> str:
    """Words as a list of `item`: each path is a word; other values may also be separated by commas."""
    if item is Path:
        return json.dumps(list(given))
    if item is str and any("[" in word for word in given):
        return json.dumps(list(given))
    if len(given) == 1:
        given = [given[0].strip().removeprefix("(").removesuffix(")")]
    parts = [part.strip() for word in given for part in word.split(",") if part.strip()]
    if item in (int, float):
        parts = [number for part in parts for number in part.split()]
        return f"[{', '.join(parts)}]"
    return json.dumps(parts)
