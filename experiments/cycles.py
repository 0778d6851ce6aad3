"""How many cycles does XLA's compiler for TPUs expect of each operation?

    python experiments/cycles.py program.txt --mhz 940

reads it from the text of an optimised program, which `aot.py --program program.txt` keeps. It is an estimate,
by which the compiler chooses; no chip has confirmed it. A loop counts as often as it runs, where the program
says how often that is, and else once.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.command_line import Parser, described
from support.files import InputError, program


class Operation(NamedTuple):
    """An operation of a compiled program, and what the compiler expects of it in a step."""

    cycles: int
    name: str
    kind: str  # convolution, copy, reduction, or other
    phase: str  # augmentation, forward, backward, update, or other
    source: str  # the operation that it was compiled from


PHASES = {
    "/augment/": "augmentation",
    "/transpose(": "backward",
    "/gradient/": "forward",
    "/update/": "update",
}
COPIES = {"copy", "transpose", "bitcast", "reshape", "parameter", "tuple", "copy-start", "copy-done"}


def computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of an optimised program, the main one under the name ENTRY."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(?:(ENTRY) )?(%[\w.-]+) .*\{$", line):
            lines = found.setdefault(head[1] or head[2], [])
        elif " = " in line:
            lines.append(line)
    return found


def opcode(line: str) -> str:
    """What an instruction does: the first word before a bracket that is not part of a type."""
    return re.search(r"[\])}] ([a-z][\w-]*)\(", line.partition(" = ")[2])[1]


def operations(text: str) -> list[Operation]:
    """The operations of an optimised program that have an estimate of the compiler, loops multiplied out."""
    parts, found = computations(text), []

    def times(condition: str) -> int:
        """How often a loop runs that counts from 0: the only whole number in its condition."""
        numbers = set(re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(parts.get(condition, []))))
        return int(numbers.pop()) if len(numbers) == 1 else 1

    def add(part: str, count: int) -> None:
        for line in parts[part]:
            if loop := re.search(r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)", line):
                add(loop[2], count * times(loop[1]))
            if not (cycles := re.search(r'"estimated_cycles":"(\d+)"', line)):
                continue
            inner = re.search(r"calls=(%[\w.-]+)", line)
            codes = {opcode(x) for x in parts[inner[1]]} if inner else {opcode(line)}
            kind = "convolution" if "convolution" in codes else "copy" if codes <= COPIES else "other"
            kind = "reduction" if kind == "other" and codes & {"reduce", "reduce-window"} else kind
            source = (re.search(r'op_name="([^"]*)"', line) or ["", ""])[1]
            phase = next((name for mark, name in PHASES.items() if mark in source), "other")
            name = line.split(" = ")[0].split()[-1]
            found.append(Operation(int(cycles[1]) * count, name, kind, phase, source))

    add("ENTRY", 1)
    return found


def show_cycles(found: list[Operation], mhz: float | None) -> None:
    """Prints the compiler's estimate of a step, by phase and kind, and the dearest operations."""
    total = sum(one.cycles for one in found)
    at = f", {total / mhz / 1e3:.1f} ms at {mhz:.0f} MHz" if mhz else ""
    print(f"the compiler's estimate of a step: {total / 1e6:.1f} million cycles{at} (not a measurement)")
    for field in ("phase", "kind"):
        sums = Counter()
        for one in found:
            sums[getattr(one, field)] += one.cycles
        shown = (
            f"{name} {cycles / 1e6:.1f} ({100 * cycles / total:.0f} %)" for name, cycles in sums.most_common()
        )
        print(f"by {field}, million cycles: {', '.join(shown)}")
    print("the dearest operations:")
    for one in sorted(found, reverse=True)[:10]:
        print(f"    {one.cycles / 1e6:8.2f}  {one.kind:12s}{one.phase:13s}{one.name}  {one.source}")


def main() -> None:
    parser = Parser(**described(__doc__))
    parser.add_argument("program", type=Path, metavar="FILE", help="The text of an optimised program.")
    parser.add_argument("--mhz", type=float, help="The chip's clock, for the time in ms.")
    args = parser.parse_args()
    with program():
        try:
            found = operations(args.program.read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{args.program}: not the text of an optimised program ({error})") from error
        if not found:
            raise InputError(f"{args.program}: has no estimates; is it of a TPU?")
        show_cycles(found, args.mhz)


if __name__ == "__main__":
    main()
