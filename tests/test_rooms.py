"""The house: who may import whom, no circle, and a table of rooms in docs/design.md that is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sinkprune"
FLOORS = (
    {"files", "progress", "version", "_C"},
    {"plans", "targets"},
    {"kernels"},
    {"ops"},
    {"models"},
    {"adapters"},
    {"evidence"},
    {"generation", "planning", "pruning"},
    {"checkpoints", "evaluation"},
    {"streaming"},
    {"commands"},
)
FLAT = {
    "__init__.py",
    "__main__.py",
    "cli.py",
    "plans.py",
    "targets.py",
    "files.py",
    "progress.py",
    "version.py",
}  # modules that belong to no room
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted names of everything under sinkprune/ and kernels/, packages by their own name."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels":
            parts = ("sinkprune", *parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports(path: Path, known: set[str]) -> list[tuple[int, str]]:
    """Every import of ours in a file, wherever it stands: ``(line, module)``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in known else node.module) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "sinkprune"]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_imports_point_down_the_floors_and_rooms_of_one_floor_do_not_know_each_other() -> None:
    known = modules()
    wrong = []
    for module, path in known.items():
        here = room_of(module)
        if here in ("__init__", "__main__", "cli"):  # the public names, and the command line
            continue
        for line, target in imports(path, set(known)):
            there = room_of(target)
            if there in (here, "__init__"):
                continue
            if FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = {
        module: {target for _, target in imports(path, set(known)) if target in known and target != module}
        for module, path in known.items()
    }
    del graph["sinkprune"]  # its names are lazy
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module) :], module])}"
        if module in done or module not in graph:
            return
        for target in sorted(graph[module]):
            visit(target, (*above, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_module_lies_flat_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= FLAT


def test_the_table_of_rooms_in_the_design_is_the_tree() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8").split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\|(.*?)\|", text, re.M)
    assert len(rows) > 10
    named = {place.rstrip("/") for place, _ in rows}
    missing = [place for place in named if not (ROOT / place).exists()]
    assert not missing
    folders = {f"sinkprune/{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    data = {f"sinkprune/{name}" for name in ("assets", "templates") if (PACKAGE / name).exists()}
    files = {f"sinkprune/{path.name}" for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py",)}
    unnamed = (folders | data | files) - named
    assert not unnamed
    for place, holds in rows:
        for file in re.findall(r"`(\w+\.py)`", holds):
            assert (ROOT / place / file).exists(), f"{place} has no {file}"


@pytest.mark.parametrize(
    "folder",
    [
        "sinkprune",
        "kernels",
        "benchmarks",
        "examples",
        "tests",
    ],
)
def test_files_stay_short_enough_to_read(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text("utf-8").splitlines())) > 500
    }
    assert not long


def test_functions_fit_a_page() -> None:
    """At most 80 lines without the docstring."""
    long = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
                continue
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
            lines = node.end_lineno - node.lineno + 1 - docstring
            if lines > 80:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines}")
    assert not long, "\n".join(long)
