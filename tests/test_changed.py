"""Which tests a change touches, in which order, and what a budget of time leaves out."""

import subprocess

import changed
import pytest

FILES = {
    "maths.py": "",
    "model.py": "import maths\n",
    "train.py": "def main():\n    from model import Model\n",
    "data/tokens.py": "",
    "data/files.py": "from data import tokens\n",
    "tests/helper.py": "import train\n",
    "tests/test_maths.py": "import maths\n\n\ndef test_one():\n    assert True\n",
    "tests/test_model.py": "import model\n\n\ndef test_two():\n    assert False\n",
    "tests/test_train.py": "import helper\n",
    "tests/test_files.py": "import data.files\n",
    "tests/test_readme.py": 'PATH = "README.md"\n',
    "README.md": "",
}


def git(root, *words):
    named = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *named, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """Make a repository of FILES, committed on branch main."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def touched(root, *names):
    return changed.touched_tests(set(names), changed.import_graph(root), root)


def test_tests_are_ordered_by_the_steps_to_what_is_changed(repository):
    near, middle, far = "tests/test_maths.py", "tests/test_model.py", "tests/test_train.py"
    assert touched(repository, "maths.py") == [near, middle, far]
    # Inside of a function, and through a helper beside the tests.
    assert touched(repository, "train.py") == [far]


def test_a_module_named_behind_from_is_followed(repository):
    assert touched(repository, "data/tokens.py") == ["tests/test_files.py"]


def test_a_changed_test_comes_before_those_that_import(repository):
    order = touched(repository, "maths.py", "tests/test_train.py")
    assert order[0] == "tests/test_train.py"


def test_a_file_that_is_no_module_touches_what_names_it(repository):
    assert touched(repository, "README.md") == ["tests/test_readme.py"]
    assert touched(repository, "LICENSE") == []


def test_changes_are_those_of_the_work_tree_and_new_files(repository):
    assert changed.changed_files(repository, "main") == set()
    (repository / "model.py").write_text("import maths  # changed\n")
    (repository / "new.py").write_text("")
    assert changed.changed_files(repository, "main") == {"model.py", "new.py"}


def test_a_failing_test_is_the_exit_code_and_the_rest_is_run(repository):
    tests = ["tests/test_model.py", "tests/test_maths.py"]
    code, left_out = changed.run_within(tests, 60, repository)
    assert (code, left_out) == (1, [])


def test_what_there_is_no_time_for_is_told(repository, capsys):
    (repository / "maths.py").write_text("# changed\n")
    assert changed.main(["--seconds=0"], repository) == 0
    printed = capsys.readouterr().out
    assert "0 of 3 touched" in printed
    assert "no time for: tests/test_maths.py" in printed


def test_nothing_changed_runs_nothing(repository, capsys):
    assert changed.main([], repository) == 0
    assert "no test is touched" in capsys.readouterr().out
