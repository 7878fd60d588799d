"""The table of recipes/README.md: what each recipe runs, what it aims at, and if it fits.

    python -m benchmarks.recipes
    python -m benchmarks.recipes v5e256_8b_ppo h100x8_8b_sft

The first writes the table from the recipes' own comments and from compiled plans
(benchmarks/results/recipes.json, pods.json). The second compiles the plans of the named recipes
before, seconds to minutes each; `all` is all of them.
"""

import json
import pathlib
import re
import shlex
import sys

from benchmarks import pods
from runtime import flags
from runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
PAGE = FOLDER / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"
BEGIN = "<!-- written by benchmarks/recipes.py: begin -->"

# --- what a recipe says and does


def recipes() -> dict[str, pathlib.Path]:
    """Return the recipes' files by their names, in the order of the table."""
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.sh"))}
    del paths["until_done"]
    return paths


def fields_of(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return (name, text) of each field of a recipe's comment; the first, `what`, is its title."""
    lines = path.read_text().splitlines()
    fields = [("what", lines[1].removeprefix("# "))]
    for line in lines[2:]:
        if not line.startswith("#"):
            break
        name = line[4:13].strip()
        text = line[14:].strip()
        if name:
            fields.append((name, text))
        elif text:
            # A field that goes on; a backslash is the shell's.
            before, said = fields[-1]
            fields[-1] = (before, f"{said.removesuffix(chr(92)).strip()} {text}")
    return fields


def plans_of(path: pathlib.Path) -> list[str]:
    """Return the arguments of plan.py that a recipe's comment names, one for each command."""
    plans = []
    for name, text in fields_of(path):
        if name == "plan":
            plans.append(text.removeprefix(".venv/bin/python plan.py "))
    return plans


# --- the table


def compiled_plans() -> dict[frozenset[str], str]:
    """Return what plan.py printed, by its arguments in any order."""
    printed = {}
    for name, text in json.loads(pods.RESULTS.read_text()).items():
        printed[frozenset(shlex.split(pods.CASES[name]))] = text
    for plan, text in read_results().items():
        printed[frozenset(shlex.split(plan))] = text
    return printed


def read_results() -> dict[str, str]:
    """Return the plans that this file has compiled: arguments -> what plan.py printed."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def verdict(plan: str, printed: dict[frozenset[str], str]) -> str:
    """Return a plan's verdict and the least time of a step, with who compiled it."""
    text = printed.get(frozenset(shlex.split(plan)))
    if text is None:
        return "not yet compiled"
    said = text.splitlines()[-1]
    step = re.search(r"^a step: (\S+ s) at least", text, re.MULTILINE)
    if step:
        said += f"; a step takes {step[1]} at least"
    if text.startswith("note: the CPU's compiler"):
        said += " (the CPU's compiler)"
    return said


def section() -> str:
    """Return the part of the page that this file writes."""
    printed = compiled_plans()
    rows = [["recipe", "hardware", "published number", "plan"]]
    for name, path in recipes().items():
        fields = dict(fields_of(path))
        verdicts = []
        for plan in plans_of(path):
            script = plan.split()[0]
            verdicts.append(f"`{script}` {verdict(plan, printed)}")
        link = f"[{name}]({path.name})"
        rows.append([link, fields["hardware"], fields["aims at"], "; ".join(verdicts)])
    return "\n".join([BEGIN, *pods.table(rows), pods.END])


def write_page() -> None:
    """Write the table into recipes/README.md, in place of the one that it has."""
    page = PAGE.read_text("utf-8")
    PAGE.write_text(pods.with_section(page, BEGIN, section()), "utf-8")


def main(names: list[str]) -> None:
    """Compile the plans of the named recipes, then write the page; raise UserError for others."""
    known = recipes()
    for name in names:
        if name not in known and name != "all":
            raise UserError(f"{name}: unknown; choose of all, {', '.join(known)}")
    chosen = list(known) if "all" in names else names

    # What is compiled already is left out of `all`.
    ready = compiled_plans() if "all" in names else {}
    for name in chosen:
        for plan in plans_of(known[name]):
            if frozenset(shlex.split(plan)) in ready:
                continue
            text = pods.printed(shlex.split(plan))
            print(f"{name}: {text.splitlines()[-1]}", flush=True)
            # Read anew: another process may have compiled others meanwhile.
            results = read_results() | {plan: text}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page()


if __name__ == "__main__":
    flags.ending_in_one_line(lambda: main(sys.argv[1:]))
