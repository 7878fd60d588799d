"""docs/ppo.md: every function and class that it names is in the file that it links."""

import ast
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1] / "docs"
LINK = re.compile(r"\[`(\w+)`\]\(([\w./]+\.py)\)")


def names_in(path):
    """Return the names of all functions and classes in a file, nested ones too."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_every_link_of_the_ppo_page_names_what_is_there():
    links = LINK.findall((DOCS / "ppo.md").read_text())
    missing = [(name, file) for name, file in links if name not in names_in(DOCS / file)]
    assert len(links) > 40 and not missing


def test_the_ppo_page_sends_its_reader_to_at_most_seven_files():
    links = LINK.findall((DOCS / "ppo.md").read_text())
    assert len({file for _, file in links}) <= 7


def test_a_name_that_is_not_there_is_found():
    assert "no_such_function" not in names_in(DOCS / "../rollout.py")
