"""Reading a compiled program: which arrays are copied inside its loops."""

import re

_CALLS = "calls|body|condition|to_apply|true_computation|false_computation"


def computations(text: str) -> dict[str, list[str]]:
    """Instructions of each computation; the entry also under "ENTRY"."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            current = found[start[2]] = []
            if start[1]:
                found["ENTRY"] = current
        else:
            current.append(line.strip())
    return found


def loops(lines: list[str]) -> list[str]:
    """Bodies of the while loops among instructions."""
    return [re.search(r"body=%?([\w.\-]+)", line)[1] for line in lines if " while(" in line]


def reached(found: dict[str, list[str]], name: str) -> set[str]:
    """A computation and all that it calls."""
    seen, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in seen and name in found:
            seen.add(name)
            for line in found[name]:
                waiting += re.findall(
                    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line
                )
                for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                    waiting += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return seen


def copied(found: dict[str, list[str]], names: set[str]) -> set[tuple[str, tuple[int, ...]]]:
    """Type and shape of everything that is copied in some computations."""
    shapes = set()
    for name in names:
        for line in found[name]:
            copy = re.search(r"= (\w+)\[([\d,]*)\]\S* copy\(", line)
            if copy:
                shapes.add((copy[1], tuple(int(d) for d in copy[2].split(",") if d)))
    return shapes
