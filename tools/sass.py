"""The machine code (SASS) of CUDA kernels as nvdisasm prints it: instructions, blocks, loops, and a way through a loop.

What a kernel costs per round of its inner loop can be read from its machine code, without a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

KERNEL = re.compile(r"^\.text\.(\w+):$")
LABEL = re.compile(r"^(\.L_\w+):$")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_\w+)\)")
REGISTER = re.compile(r"\bR(\d+)((?:\.64)?)")
ENDS = ("EXIT", "RET", "KILL", "BRX", "JMP")


class Instruction(NamedTuple):
    guard: str  # the predicate under which it runs, "" for always
    name: str  # "LDG.E.128"
    operands: str

    @property
    def target(self) -> str | None:
        """The label that it may go to."""
        if self.name.split(".")[0] != "BRA":
            return None
        found = TARGET.search(self.operands)
        return found[1] if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name.split(".")[0] in ENDS:
            return bool(self.guard)
        return self.target is None or bool(self.guard) or not self.operands.startswith("`(")

    @property
    def is_load_16(self) -> bool:
        return self.name.startswith("LDG") and ".128" in self.name

    @property
    def loaded(self) -> set[int]:
        """The registers that a load of 16 bytes writes."""
        return {int(REGISTER.match(self.operands)[1]) + i for i in range(4)} if self.is_load_16 else set()

    @property
    def mentioned(self) -> set[int]:
        """All registers that it reads or writes; pairs only where they are written as such."""
        return {int(number) + i for number, wide in REGISTER.findall(self.operands) for i in range(2 if wide else 1)}


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


Work = Callable[[Block], tuple[int, ...]]
Loop = tuple[int, frozenset[int]]  # its head, and all of its blocks


class Kernel:
    def __init__(self, name: str, lines: Iterable[str]):
        self.name = name
        self.blocks = [Block()]
        labels: dict[str, int] = {}
        for line in lines:
            if label := LABEL.match(line):
                self._open_block()
                labels[label[1]] = len(self.blocks) - 1
            elif found := INSTRUCTION.match(line):
                self.blocks[-1].instructions.append(Instruction(found[1] or "", found[2], found[3]))
                last = self.blocks[-1].instructions[-1]
                if last.target or not last.goes_on:
                    self._open_block()
        for i, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else None
            if (last is None or last.goes_on) and i + 1 < len(self.blocks):
                block.successors.append(i + 1)
            if last is not None and last.target in labels:
                block.successors.append(labels[last.target])

    def _open_block(self) -> None:
        if self.blocks[-1].instructions:
            self.blocks.append(Block())

    @cached_property
    def back_edges(self) -> set[tuple[int, int]]:
        """Edges to a block that is on the way to where they start, (end, head) of a loop."""
        found, state = set(), [0] * len(self.blocks)  # 0: not seen, 1: on the way, 2: done
        stack = [(0, iter(self.blocks[0].successors))]
        state[0] = 1
        while stack:
            block, successors = stack[-1]
            for successor in successors:
                if state[successor] == 1:
                    found.add((block, successor))
                elif state[successor] == 0:
                    state[successor] = 1
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                state[block] = 2
                stack.pop()
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Head and blocks of every loop, inner loops before those around them."""
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for i, block in enumerate(self.blocks):
            for successor in block.successors:
                predecessors[successor].append(i)
        bodies: dict[int, set[int]] = {}
        for end, head in self.back_edges:
            body = bodies.setdefault(head, {head})
            waiting = [end]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += predecessors[block]
        return sorted(((head, frozenset(body)) for head, body in bodies.items()), key=lambda loop: len(loop[1]))

    def inner_loop(self, name: str) -> Loop:
        """The innermost loop that has instructions of this name.

        Raises:
            LookupError: no loop has any.
        """
        for head, body in self.loops:
            if any(i.name.startswith(name) for block in body for i in self.blocks[block].instructions):
                return head, body
        raise LookupError(f"no loop of {self.name} has {name}")

    def way_through(self, loop: Loop, work: Work, wanted: tuple[int, ...]) -> list[int]:
        """The blocks of one round of a loop: the shortest way from its head back to it that does the work wanted.

        Of a loop within it one round is taken, and of the retries of a wait none. Shortest is what has the fewest
        instructions; `wanted` are least amounts of what `work` gives for a block.

        Raises:
            LookupError: no way does so much.
        """
        head, body = loop
        best: dict[int, dict[tuple[int, ...], tuple[int, int | None, tuple[int, ...]]]] = {}  # by block, by work done
        for block in self._behind_their_successors(loop):
            own, length = work(self.blocks[block]), len(self.blocks[block].instructions)
            ways = best[block] = {}
            for successor in self.blocks[block].successors:
                if successor == head:
                    onward = {(0,) * len(wanted): (0, None, ())}
                else:
                    onward = {} if (block, successor) in self.back_edges else best.get(successor, {})
                for rest, (instructions, _, _) in onward.items():
                    done = tuple(min(a + b, most) for a, b, most in zip(own, rest, wanted, strict=True))
                    if done not in ways or instructions + length < ways[done][0]:
                        ways[done] = (instructions + length, None if successor == head else successor, rest)
        if wanted not in best[head]:
            raise LookupError(f"no way through the loop of {self.name} does {wanted}")
        taken, block, done = [], head, wanted
        while block is not None:
            taken.append(block)
            _, block, done = best[block][done]
        return taken

    def _behind_their_successors(self, loop: Loop) -> list[int]:
        head, body = loop
        order, seen, waiting = [], set(), [(head, False)]
        while waiting:
            block, done = waiting.pop()
            if done:
                order.append(block)
            elif block not in seen:
                seen.add(block)
                forward = (s for s in self.blocks[block].successors if s in body and (block, s) not in self.back_edges)
                waiting += [(block, True), *((successor, False) for successor in forward)]
        return order

    def loads_in_flight(self) -> int:
        """The most loads of 16 bytes that are under way before the first of them is used.

        Code is taken as it lies, a branch forward as not taken; behind one without a condition nothing is under way.
        """
        most, under_way = 0, []
        for instruction in (i for block in self.blocks for i in block.instructions):
            used = [i for i, load in enumerate(under_way) if load & (instruction.mentioned | instruction.loaded)]
            if used:
                under_way = under_way[used[-1] + 1 :]  # loads come back in order
            if instruction.is_load_16:
                under_way.append(instruction.loaded)
                most = max(most, len(under_way))
            if not instruction.goes_on:
                under_way = []
        return most


def read_kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a listing of `nvdisasm -c`, by their mangled names."""
    kernels, name, lines = {}, None, []
    for line in [*text.splitlines(), ".text.end:"]:
        if found := KERNEL.match(line):
            if name is not None:
                kernels[name] = Kernel(name, lines)
            name, lines = found[1], []
        else:
            lines.append(line)
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, without namespaces and parameters; as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    result = subprocess.run(["c++filt", *names], stdout=subprocess.PIPE, text=True, check=True)
    noise = r"haste::cuda::(hopper::)?|\(anonymous namespace\)::|^void "
    readable = [without_parameters(re.sub(noise, "", name)) for name in result.stdout.splitlines()]
    return dict(zip(names, readable, strict=True))


def without_parameters(function: str) -> str:
    """Cuts at the first parenthesis that is not within template arguments."""
    depth = 0
    for i, character in enumerate(function):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return function[:i]
    return function
