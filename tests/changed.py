"""Run the tests that a change touches, the most direct first, until a budget of time is used up.

    python tests/changed.py                              # what differs from main
    python tests/changed.py --against=HEAD --seconds=60  # what is not committed

A test file is touched if it is changed itself, imports a changed module, directly or through
others, or names a changed file in its text. What there was no time for is listed at the end.
"""

import argparse
import ast
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).parents[1]
LEAST = 5.0
"""Seconds that must be left for another file of tests to be started."""
NO_TESTS = 5
"""pytest's exit code where all tests of a file are slow ones, which are not selected."""

Graph = dict[str, set[str]]
"""Python files, by their path from the root, and the files of the repository that each imports."""


def changed_files(root: pathlib.Path, against: str) -> set[str]:
    """Return the files below `root` that differ from the commit `against`, new ones too."""
    differing = lines_of(f"git diff --name-only --relative {against}", root)
    new = lines_of("git ls-files --others --exclude-standard", root)
    return {*differing, *new}


def lines_of(command: str, root: pathlib.Path) -> list[str]:
    """Run `command` in `root`; return the lines that it prints."""
    words = command.split()
    result = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def import_graph(root: pathlib.Path) -> Graph:
    """Read what each Python file that git knows, or could, imports of the others."""
    # Files that are deleted and not yet committed are listed too.
    known = lines_of("git ls-files --cached --others --exclude-standard *.py", root)
    files = [name for name in known if (root / name).exists()]

    # A module by its name. Modules beside the tests are imported without the folder's name.
    by_module = {}
    for name in files:
        module = name.removesuffix(".py").replace("/", ".")
        by_module[module] = name
        by_module.setdefault(module.removeprefix("tests."), name)

    # Other packages are no files of ours.
    graph = {}
    for name in files:
        modules = imported_modules((root / name).read_text())
        graph[name] = {by_module[module] for module in modules if module in by_module}
    return graph


def imported_modules(source: str) -> set[str]:
    """Name all modules that `source` may import, inside of functions too.

    `from a import b` names both `a` and `a.b`, of which the second may be no module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def touched_tests(changed: set[str], graph: Graph, root: pathlib.Path) -> list[str]:
    """Order the test files that `changed` touches: by the steps of imports between them."""
    # The graph turned round: who imports a file.
    importers: Graph = {name: set() for name in graph}
    for name, imported in graph.items():
        for module in imported:
            importers[module].add(name)

    # Breadth first from the changed files, against the direction of imports.
    steps = dict.fromkeys(changed & graph.keys(), 0)
    front = list(steps)
    while front:
        reached = []
        for name in front:
            for importer in importers[name] - steps.keys():
                steps[importer] = steps[name] + 1
                reached.append(importer)
        front = reached

    # A test that names a changed file in its text, as README.md, is as near as one that imports
    # it.
    tests = [name for name in graph if is_test(name)]
    for name in tests:
        if names_one_of(changed - {name}, (root / name).read_text()):
            steps[name] = min(steps.get(name, 1), 1)

    # The nearest first, and by name among equals.
    touched = [(steps[name], name) for name in tests if name in steps]
    return [name for _, name in sorted(touched)]


def names_one_of(files: set[str], text: str) -> bool:
    """Tell whether `text` has the name of one of `files`, without its folder."""
    return any(pathlib.PurePath(path).name in text for path in files)


def is_test(name: str) -> bool:
    return name.startswith("tests/test_") and name.endswith(".py")


def run_within(tests: Iterable[str], seconds: float, root: pathlib.Path) -> tuple[int, list[str]]:
    """Run test files one after another for at most `seconds`.

    Returns pytest's first exit code that is not 0, else 0, and the files without a verdict: those
    not started, and the one that was stopped.
    """
    end = time.monotonic() + seconds
    code = 0
    left_out = []
    for name in tests:
        # Too little time to import JAX and run a test: the rest is only listed.
        remaining = end - time.monotonic()
        if remaining < LEAST:
            left_out.append(name)
            continue
        print(f"{name}: {remaining:.0f} s left", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", name]
        try:
            result = subprocess.run(command, cwd=root, timeout=remaining)
        except subprocess.TimeoutExpired:
            left_out.append(f"{name} (stopped)")
            continue
        if result.returncode != NO_TESTS:
            code = code or result.returncode
    return code, left_out


def main(argv: list[str] | None = None, root: pathlib.Path = ROOT) -> int:
    """Run the command; return its exit code: 0 also where there was no time for some files."""
    # Flags.
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", default="main", help="commit that the files differ from")
    parser.add_argument("--seconds", type=float, default=120, help="budget of time")
    options = parser.parse_args(argv)

    # What is touched, nearest first; then as much of it as there is time for.
    changed = changed_files(root, options.against)
    tests = touched_tests(changed, import_graph(root), root)
    if not tests:
        print(f"no test is touched by what differs from {options.against}")
        return 0
    code, left_out = run_within(tests, options.seconds, root)
    print(f"{len(tests) - len(left_out)} of {len(tests)} touched test files were run to their end")
    if left_out:
        print(f"no time for: {', '.join(left_out)}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
