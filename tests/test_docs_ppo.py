"""docs/ppo.md: its links lead to what they name, and its defaults are the script's."""

import dataclasses
import re

import pytest

import train_ppo
from docs.anchors import PAGE, anchored, lines_of, linked

DEFAULT = re.compile(r"`--([a-z_.]+)=([^`]+)`")


def test_every_link_leads_to_the_lines_of_what_it_names():
    page = PAGE.read_text()
    assert page == anchored(page, PAGE.parent), "run: python docs/anchors.py"


def test_the_page_is_read_in_few_files_and_lines():
    files = linked(PAGE.read_text(), PAGE.parent)
    assert sum(len(names) for names in files.values()) > 40
    assert len(files) <= 7
    assert sum(lines_of(ranges) for ranges in files.values()) <= 1100


def test_the_defaults_of_the_page_are_those_of_the_script():
    _, _, section = PAGE.read_text().partition("\n## Defaults\n")
    section, _, _ = section.partition("\n## ")
    named = DEFAULT.findall(section)
    wrong = [(flag, value) for flag, value in named if default_of(flag) != value]
    assert len(named) > 25 and not wrong


def test_the_optimizers_differ_in_their_learning_rate_alone():
    config = train_ppo.Config()
    same_rate = dataclasses.replace(config.value_optimizer, lr=config.optimizer.lr)
    assert same_rate == config.optimizer


def default_of(flag):
    """Return the default of a flag of train_ppo.py, as it is written on the command line."""
    value = train_ppo.Config()
    for field in flag.split("."):
        value = getattr(value, field)
    return ",".join(value) if isinstance(value, tuple) else str(value)


# --- what the checks see


@pytest.fixture
def folder(tmp_path):
    """Make a folder with a page's file beside it: two functions of two and four lines."""
    (tmp_path / "docs").mkdir()
    code = "def one():\n    pass\n\n\n@cache\ndef two():\n    x = 1\n    return x\n"
    (tmp_path / "code.py").write_text(code)
    return tmp_path / "docs"


def test_a_stale_range_and_count_are_set(folder):
    page = "7 lines in 3 files [`two`](../code.py) and [`one`](../code.py#L7-L9)"
    fresh = "6 lines in 1 files [`two`](../code.py#L5-L8) and [`one`](../code.py#L1-L2)"
    assert anchored(page, folder) == fresh


def test_a_name_that_is_not_there_is_told(folder):
    with pytest.raises(KeyError, match=r"code\.py has no function or class three"):
        anchored("[`three`](../code.py)", folder)
