"""Flags as a user meets them: each is described in --help, and an old name is told the new one."""

import ast
import pathlib
import signal

import pytest
from running import fails

import train_ppo
import train_sft
from runtime import flags

ROOT = pathlib.Path(__file__).parents[1]
TREES = (".", "collect", "decoding", "rewards", "weights", "runtime", "kernels")
"""Folders with scripts of the root, or with a part of their configs."""


def undescribed(source: str) -> list[str]:
    """List the fields, as Class.field, of classes named ...Config without a docstring."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        following = [*node.body[1:], None]
        for field, after in zip(node.body, following, strict=True):
            is_described = (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            )
            if isinstance(field, ast.AnnAssign) and not is_described:
                faults.append(f"{node.name}.{ast.unparse(field.target)}")
    return faults


def test_every_flag_is_described():
    # Without a docstring --help shows the comment above a field, which is of a whole section.
    paths = list(ROOT.glob("experiments/*/*.py"))
    for folder in TREES:
        paths += (ROOT / folder).glob("*.py")
    faults = {path.name: undescribed(path.read_text()) for path in paths}
    assert {name: fields for name, fields in faults.items() if fields} == {}


def test_a_field_without_a_docstring_is_seen():
    source = 'class Config:\n    # Run\n    seed: int = 0\n    n: int = 1\n    """Rows."""\n'
    assert undescribed(source) == ["Config.seed"]


@pytest.mark.parametrize(
    ("flag", "now"),
    [
        ("--keep=3", "--keep: renamed to --keep_checkpoints"),
        ("--discount=0.9", "--discount: renamed to --gamma"),
        ("--model.hidden=8", "--model.hidden: renamed to --model.mlp_width"),
        ("--model.gemma", "--model.scale_embedding, --model.zero_centered_norm"),
    ],
)
def test_an_old_name_is_told_the_new_one(flag, now, capsys):
    assert now in fails(train_ppo, [flag], capsys)


def test_an_old_name_is_told_only_where_the_new_one_is_a_flag(capsys):
    line = fails(train_sft, ["--discount=0.9"], capsys)
    assert "--discount" in line and "renamed" not in line


def test_help_is_80_columns_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        flags.parse(train_ppo.Config, ["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_help_leaves_the_process_its_signals(capsys):
    """A process left with SIGPIPE's default ends without a word at the next pipe that closes."""
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(SystemExit):
        flags.parse(train_ppo.Config, ["--help"])
    assert signal.getsignal(signal.SIGPIPE) == before != signal.SIG_DFL
