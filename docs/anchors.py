"""Set the line ranges of docs/ppo.md's links, its table of files, and its count of lines.

    python docs/anchors.py

A link there names a function or a class, [`gae`](../objectives/policy.py#L1-L9); its range is
taken from the file. Run this again when code has moved; tests/test_docs_ppo.py tells when.
"""

import ast
import pathlib
import re

PAGE = pathlib.Path(__file__).parent / "ppo.md"

LINK = re.compile(r"\[`(\w+)`\]\((\.\./[\w/]+\.py)(?:#L\d+-L\d+)?\)")
COUNT = re.compile(r"[\d,]+ lines in \d+ files")
TABLE = re.compile(r"(?<=<!-- files -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = "| file | linked | lines |\n|---|---|---|\n"

Ranges = dict[str, tuple[int, int]]
"""{name: (first line, last line)} of a file's functions and classes, both included, from 1."""


def loop_of(main: ast.FunctionDef) -> ast.For | None:
    """Find a script's loop over its steps, `for step in run.steps()`, in its `main`."""
    for node in ast.walk(main):
        if isinstance(node, ast.For) and ast.unparse(node.iter).endswith(".steps()"):
            return node
    return None


def ranges_of(path: pathlib.Path) -> Ranges:
    """Find the lines of a file's top-level functions and classes, decorators included.

    Those of a script's `main` are its loop's: what stands before is done once.
    """
    ranges: Ranges = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        # Decorators come before the line of `def`.
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            loop = loop_of(node)
            first = loop.lineno if loop is not None else first
        last = node.end_lineno
        assert last is not None
        ranges[node.name] = (first, last)
    return ranges


def linked(text: str, folder: pathlib.Path) -> dict[str, Ranges]:
    """Collect the ranges of what the links of a page in `folder` name, by file.

    Raises KeyError for a name that is not in its file.
    """
    # All names of each file, and those of them that the page links to.
    known: dict[str, Ranges] = {}
    files: dict[str, Ranges] = {}
    for name, file in LINK.findall(text):
        # Each file is read once.
        if file not in known:
            known[file] = ranges_of(folder / file)
            files[file] = {}
        if name not in known[file]:
            raise KeyError(f"{file} has no function or class {name} at its top level")
        files[file][name] = known[file][name]
    return files


def lines_of(ranges: Ranges) -> int:
    """Count the lines of the ranges."""
    total = 0
    for first, last in ranges.values():
        total += last - first + 1
    return total


def table(files: dict[str, Ranges]) -> str:
    """Write a row for each file, the longest first: its linked names in order, and their lines."""
    # Sorted by the count, which is then left out.
    rows = []
    for file, ranges in files.items():
        in_order = sorted(ranges, key=ranges.__getitem__)
        names = ", ".join(f"`{name}`" for name in in_order)
        shown = file.removeprefix("../")
        count = lines_of(ranges)
        rows.append((count, f"| [{shown}]({file}) | {names} | {count} |\n"))
    rows.sort(reverse=True)
    return HEAD + "".join(row for _, row in rows)


def anchored(text: str, folder: pathlib.Path) -> str:
    """Return a page of `folder` with its ranges, table and count as its linked files are now."""
    files = linked(text, folder)

    def link(match: re.Match[str]) -> str:
        name, file = match.groups()
        first, last = files[file][name]
        return f"[`{name}`]({file}#L{first}-L{last})"

    # The links, then the count, then the table between its two marks.
    text = LINK.sub(link, text)
    total = sum(map(lines_of, files.values()))
    text = COUNT.sub(f"{total:,} lines in {len(files)} files", text)
    return TABLE.sub(lambda _: table(files), text)


if __name__ == "__main__":
    PAGE.write_text(anchored(PAGE.read_text("utf-8"), PAGE.parent), "utf-8")
