"""Mutants of bytes, of text and of plain values. Each change is noted, so that a finding says how it came about."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 17, 127, 128, 255, 256, 1000, 32767, 32768, 65535, 65536, 10**6, 10**9),
    *(2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, -(10**30)),
    *(0.5, -0.5, 1e-3, 1e-30, 1e-300, 5e-324, 1e30, 1e38, 1e300, -1e300, float("nan"), float("inf"), float("-inf")),
)
"""Where types end, sizes overflow and arithmetic stops."""

WORDS = (
    *(
        "",
        " ",
        "\0",
        "a",
        "0",
        "-1",
        "1e999",
        "nan",
        "null",
        "true",
        "~",
        ".",
        "..",
        "../x",
        "/",
        "%s",
        "%n",
        "{}",
        "[]",
    ),
    *("é", "\u202e", "𝔘", "a\nb", "\r\n", "\t", "'", '"', "\\", "<b>", "[bold]", "=1+1", "x" * 300, "x" * 5000),
)
"""Texts that break parsers, paths, terminals and spreadsheets."""


class Fault(AssertionError):
    """The package did something it must not do."""


class Draw(random.Random):
    """Random numbers of one case, and notes on their use.

    Args:
        seed: determines the numbers.
        tell: called with each note, so that a crash does not lose them.
    """

    def __init__(self, *seed: object, tell: Callable[[str], object] = lambda text: None) -> None:
        super().__init__("/".join(map(str, seed)))  # of a text: the same in every process
        self.notes: list[str] = []
        self.tell = tell

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def some(self) -> int:
        """How many times to mutate: usually once."""
        return self.choice((1, 1, 1, 1, 2, 2, 3, 5))


# --- bytes ---


def mutate_bytes(draw: Draw, data: bytes, other: bytes = b"") -> bytes:
    """`data` with some mutations; splices are taken from `other` and from `data` itself."""
    for _ in range(draw.some()):
        data = draw.choice(_OF_BYTES)(draw, data, draw.choice((data, other or data)))
    return data


def _place(draw: Draw, data: bytes) -> int:
    """An offset; every other time in the first bytes, where headers are."""
    return draw.randrange(max(1, min(len(data), 600) if draw.chance(0.5) else len(data)))


def _flip(draw: Draw, data: bytes, other: bytes) -> bytes:
    if not data:
        return data
    at, bit = _place(draw, data), draw.randrange(8)
    draw.note(f"flip bit {bit} of byte {at}")
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def _truncate(draw: Draw, data: bytes, other: bytes) -> bytes:
    at = _place(draw, data)
    draw.note(f"end after {at} of {len(data)} bytes")
    return data[:at]


def _set(draw: Draw, data: bytes, other: bytes) -> bytes:
    at, value = _place(draw, data), draw.choice((0, 1, 0x0A, 0x20, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))
    length = draw.choice((1, 1, 1, 2, 4, 8, 64))
    draw.note(f"set {length} bytes at {at} to {value:#x}")
    return data[:at] + bytes([value]) * length + data[at + length :]


def _number(draw: Draw, data: bytes, other: bytes) -> bytes:
    at, size, order = _place(draw, data), draw.choice((2, 4, 8)), draw.choice(("little", "big"))
    value = int(draw.choice([n for n in NUMBERS if isinstance(n, int)]))
    draw.note(f"write {value} in {size} bytes ({order} endian) at {at}")
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, order) + data[at + size :]


def _delete(draw: Draw, data: bytes, other: bytes) -> bytes:
    at, length = _place(draw, data), draw.choice((1, 2, 4, 16, 100, 1000))
    draw.note(f"delete {length} bytes at {at}")
    return data[:at] + data[at + length :]


def _splice(draw: Draw, data: bytes, other: bytes) -> bytes:
    at, start, length = _place(draw, data), _place(draw, other), draw.choice((1, 2, 8, 64, 512))
    kept = draw.choice((0, length))
    draw.note(f"put bytes {start} to {start + length} of another file at {at}, in place of {kept}")
    return data[:at] + other[start : start + length] + data[at + kept :]


def _append(draw: Draw, data: bytes, other: bytes) -> bytes:
    draw.note(f"append {len(other)} bytes")
    return data + other


_OF_BYTES = (_flip, _flip, _flip, _set, _set, _number, _truncate, _delete, _splice, _append)


# --- text ---


def mutate_text(draw: Draw, text: str, lines: Sequence[str] = ()) -> str:
    """`text` with some mutations of its numbers, words and lines; `lines` are further lines to insert."""
    for _ in range(draw.some()):
        text = draw.choice(_OF_TEXT)(draw, text, lines)
    return text


def _replace_match(pattern: str, values: Sequence[object], draw: Draw, text: str) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    match, value = draw.choice(found), str(draw.choice(values))
    draw.note(f"{match[0][:40]!r} at {match.start()} becomes {value[:40]!r}")
    return text[: match.start()] + value + text[match.end() :]


def mutate_number(draw: Draw, text: str) -> str:
    """`text` with one of its numbers replaced."""
    return _replace_match(r"-?\d+(\.\d+)?", NUMBERS, draw, text)


def _text_number(draw: Draw, text: str, lines: Sequence[str]) -> str:
    return mutate_number(draw, text)


def _text_word(draw: Draw, text: str, lines: Sequence[str]) -> str:
    return _replace_match(r"\w+", WORDS, draw, text)


def _text_insert(draw: Draw, text: str, lines: Sequence[str]) -> str:
    at, word = draw.randrange(len(text) + 1), draw.choice(WORDS)
    draw.note(f"insert {word[:40]!r} at {at}")
    return text[:at] + word + text[at:]


def _text_lines(draw: Draw, text: str, lines: Sequence[str]) -> str:
    rows = text.splitlines(keepends=True)
    if not rows:
        return text
    a, b, kind = draw.randrange(len(rows)), draw.randrange(len(rows)), draw.choice(("drop", "double", "swap", "move"))
    draw.note(f"{kind} line {a} ({b})")
    if kind == "drop":
        del rows[a]
    elif kind == "double":
        rows.insert(b, rows[a])
    elif kind == "swap":
        rows[a], rows[b] = rows[b], rows[a]
    else:
        rows.insert(b, rows.pop(a))
    return "".join(rows)


def _text_known_line(draw: Draw, text: str, lines: Sequence[str]) -> str:
    if not lines:
        return _text_insert(draw, text, lines)
    rows, line = text.splitlines(keepends=True), draw.choice(lines)
    key = re.match(r"[\w ]*", line)[0]
    same = [i for i, row in enumerate(rows) if key and row.startswith(key)]
    draw.note(f"a line {line!r}")
    if same and draw.chance(0.7):
        rows[same[0]] = line + "\n"
    else:
        rows.insert(draw.randrange(min(1, len(rows)), len(rows) + 1), line + "\n")
    return "".join(rows)


_OF_TEXT = (_text_number, _text_number, _text_word, _text_insert, _text_lines, _text_known_line, _text_known_line)


# --- plain values ---


def mutate_tree(draw: Draw, value: Any, words: Sequence[Any] = ()) -> Any:
    """A copy of nested dictionaries, lists and plain values with some mutations; `words` are more values to insert."""
    value = copy.deepcopy(value)
    for _ in range(draw.some()):
        value = _mutate_node(draw, value, [*NUMBERS, *WORDS, None, True, False, [], {}, *words])
    return value


def _mutate_node(draw: Draw, root: Any, values: Sequence[Any]) -> Any:
    nodes = list(_nodes(root))
    if not nodes:
        draw.note("the whole becomes another value")
        return draw.choice(values)
    holder, key, name = draw.choice(nodes)
    kind = draw.choice(("replace", "replace", "replace", "drop", "wrap", "copy", "rename", "double"))
    if kind == "drop":
        del holder[key]
        draw.note(f"drop {name}")
    elif kind == "wrap":
        depth, shape = draw.choice((1, 1, 2, 50)), draw.choice((lambda v: [v], lambda v: {"a": v}))
        for _ in range(depth):
            holder[key] = shape(holder[key])
        draw.note(f"wrap {name} {depth} times")
    elif kind == "copy":
        source, other, other_name = draw.choice(nodes)
        if other in (source if isinstance(source, dict) else range(len(source))):
            holder[key] = copy.deepcopy(source[other])
            draw.note(f"{name} becomes {other_name}")
    elif kind == "rename" and isinstance(holder, dict):
        new = str(draw.choice(WORDS))
        holder[new] = holder.pop(key)
        draw.note(f"{name} is called {new[:40]!r}")
    elif kind == "double" and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(holder[key])] * draw.choice((1, 1, 100))
        draw.note(f"double {name}")
    else:
        holder[key] = copy.deepcopy(draw.choice(values))
        draw.note(f"{name} becomes {str(holder[key])[:60]!r}")
    return root


def _nodes(value: Any, name: str = ""):
    """Every place in `value`: its container, its key there, and what to call it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key, f"{name}[{key!r}]"[:80]
        yield from _nodes(item, f"{name}[{key!r}]")


def one_of(draw: Draw, options: Sequence[tuple[float, Callable]]) -> Callable:
    """One of the functions in `options`, chosen by weight."""
    weights, functions = zip(*options, strict=True)
    return draw.choices(functions, weights)[0]
