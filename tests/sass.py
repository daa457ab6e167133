"""Reads the machine code of kernels: their instructions, loops, and the path that a loop takes most of the time."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

KINDS = {
    "tensor": r"HMMA|HGMMA|UTC\w*MMA",
    "exp": r"MUFU\.EX2",
    "fp32": r"FADD2?|FMUL2?|FFMA2?|HFMA2|HADD2|HMUL2",
    "shared": r"LDS|STS|LDSM|STSM",
    "global_": r"LDG|STG|LDGSTS",
}
"""Kinds of instructions; all others compute integers and predicates, convert, move and branch."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is the place of the instruction that a branch may jump to.

    `predicated`: whether it is executed only where a predicate holds; `conditional`: whether the next one may follow.
    """

    text: str
    predicated: bool = False
    conditional: bool = True
    target: int | None = None

    @functools.cached_property
    def operation(self) -> str:
        return self.text.split(maxsplit=1)[0]

    def is_a(self, pattern: str) -> bool:
        return _matches(self.operation, pattern)


@functools.cache  # a kernel has thousands of instructions and few operations
def _matches(operation: str, pattern: str) -> bool:
    return re.match(rf"(?:{pattern})\b", operation) is not None


def read(sass: str) -> list[Instruction]:
    """The instructions of one function, as cuobjdump and nvdisasm print them."""
    lines, places = [], {}  # of addresses and labels
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;]+?)\s*;", line):
            places[int(found[1], 16)] = len(lines)
            lines.append((found[2], found[3]))
    instructions = []
    for predicate, text in lines:
        target = re.match(r"BRA\S*\s+(.*?)(?:(0x[0-9a-f]+)|`\((\.L_x_\d+)\))$", text)
        place = target and (int(target[2], 16) if target[2] else target[3])
        conditional = bool(predicate) or target is None or bool(re.search(r"U?P\d|DIV", text))
        instructions.append(Instruction(text, bool(predicate), conditional, places.get(place) if target else None))
    return instructions


def loops(instructions: list[Instruction]) -> list[range]:
    """Every loop, by the instructions from its first to the branch that goes back to it.

    Code that was moved behind the end of the kernel also jumps back to where it came from: that is not a loop. Nor is
    the branch to itself that every kernel ends with.
    """
    backward = (
        range(i.target, end + 1) for end, i in enumerate(instructions) if i.target is not None and i.target < end
    )
    return [loop for loop in backward if not any(instructions[i].is_a("EXIT") for i in loop)]


def count(body: list[Instruction], pattern: str) -> int:
    return sum(instruction.is_a(pattern) for instruction in body)


def common_path(instructions: list[Instruction], loop: range, work: str, exponentials: int) -> list[int]:
    """One turn of `loop`: of the paths with exactly that many exponentials, the one that does the most work, and among
    equals the one with the fewest instructions.

    What a turn seldom does (the mask of a seam, the last keys of a window, a new maximum) is behind branches and is not
    `work`, a pattern of instructions. Inner loops are taken once. Returns the places of the path's instructions.
    """
    # best[i][e]: how the instruction at i is best reached with e exponentials: work, minus the instructions so far; and
    # the one before with its e
    best: list[dict[int, tuple[tuple[int, int], int, int]]] = [{} for _ in range(len(loop) + 1)]
    best[0][0] = (0, 0), -1, 0
    for at, index in enumerate(loop):
        instruction = instructions[index]
        following = [at + 1] if instruction.conditional or at == len(loop) - 1 else []
        if instruction.target is not None and index < instruction.target <= loop[-1]:
            following.append(instruction.target - loop.start)
        does_work, is_exponential = instruction.is_a(work), instruction.is_a(KINDS["exp"])
        for done, ((worked, steps), _, _) in best[at].items():
            now, cost = done + is_exponential, (worked + does_work, steps - 1)
            for place in following if now <= exponentials else ():
                if now not in best[place] or cost > best[place][now][0]:
                    best[place][now] = cost, at, done
    path, at, done = [], len(loop), max(best[-1])
    while at > 0:
        _, at, done = best[at][done]
        path.append(loop.start + at)
    return path[::-1]


def wavefronts(body: list[Instruction]) -> int:
    """Passes through shared memory, 128 bytes each, if no two lanes meet in a bank."""
    total = 0
    for instruction in body:
        if instruction.is_a("LDSM|STSM"):
            total += int(instruction.operation[-1])
        elif instruction.is_a("LDS|STS"):
            total += 4 if ".128" in instruction.operation else 2 if ".64" in instruction.operation else 1
    return total
