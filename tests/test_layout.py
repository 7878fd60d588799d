"""The floors of the code: every module imports from below, and no imports run in a circle."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Bottom up. Folders are named as folders; a module of the root by its name.
FLOORS = (
    ("runtime",),
    ("sharding", "tasks"),
    ("data", "kernels", "rope", "layers", "model_config"),
    ("model",),
    ("objectives", "sampling", "lora"),
    ("train_step", "slots"),
    ("train_state",),
    ("responses", "weights"),
    ("rollout", "rewards"),
    ("evaluation", "planning"),
    ("training_run",),
    ("train_*", "generate", "evaluate", "plan", "serve"),
    ("collect", "decoding"),
    ("experiments", "benchmarks", "docs"),
    ("tests",),
)
SCRIPTS = next(number for number, names in enumerate(FLOORS) if "train_*" in names)
"""The floor of the scripts."""
MOST_AT_THE_ROOT = 24
"""Python files."""


def modules_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the project's modules by dotted name; folders that begin with a dot are not its."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            found[".".join(parts)] = path
    return found


def floor_of(module: str) -> int:
    """Return the floor that a module is on, 0 the lowest; raise LookupError for one on none."""
    place = module.split(".")[0]
    for number, names in enumerate(FLOORS):
        if place in names:
            return number
    if place.startswith("train_"):
        return SCRIPTS
    raise LookupError(f"{module}: on no floor; name it in tests/test_layout.py and DESIGN")


def imported(source: str, modules: dict[str, pathlib.Path]) -> set[str]:
    """Return which of `modules` a file's text imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from data import sources` imports a module, `from data.sources import x` a name.
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names & modules.keys()


def arrows_of(modules: dict[str, pathlib.Path]) -> dict[str, set[str]]:
    """Return which of `modules` each of them imports."""
    return {name: imported(path.read_text(), modules) for name, path in modules.items()}


def not_from_below(arrows: dict[str, set[str]]) -> list[str]:
    """List the imports from above and from the side, but for those inside a folder.

    So no script imports a script.
    """
    faults = []
    for module, others in arrows.items():
        for other in sorted(others):
            is_inside = module.split(".")[0] == other.split(".")[0]
            if not is_inside and floor_of(other) >= floor_of(module):
                faults.append(f"{module} imports {other}")
    return faults


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Return a circle of imports, [] where there is none."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(arrows[module]):
            found = search(other, [*path, module])
            if found:
                return found
        finished.add(module)
        return []

    for module in arrows:
        found = search(module, [])
        if found:
            return found
    return []


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    return arrows_of(modules_of(ROOT))


def test_every_module_imports_from_below(arrows):
    assert not_from_below(arrows) == []


def test_no_imports_run_in_a_circle(arrows):
    assert cycle(arrows) == []


def test_the_root_can_be_taken_in_at_a_glance():
    assert len(list(ROOT.glob("*.py"))) <= MOST_AT_THE_ROOT


def test_planted_faults_are_found(arrows):
    """Controls: an import from above, of a script by a script, and a circle inside a function."""
    assert "import model" not in (ROOT / "sharding.py").read_text()
    modules = modules_of(ROOT)
    inside = "def f():\n    from model import Params\n    import train_sft\n"
    assert imported(inside, modules) == {"model", "train_sft"}
    planted = {**arrows, "sharding": {*arrows["sharding"], "model"}}
    assert not_from_below(planted) == ["sharding imports model"]
    assert cycle(planted)[0] == cycle(planted)[-1]
    assert not_from_below({"train_lm": {"train_sft"}}) == ["train_lm imports train_sft"]
    with pytest.raises(LookupError, match="utils"):
        floor_of("utils")
