"""Documents agree with the code: pages with results, links, flags of commands, files, the tree."""

import dataclasses
import importlib
import pathlib
import re
import typing

import pytest

from experiments.methods import pages

ROOT = pathlib.Path(__file__).parents[1]
READ_BY_USERS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
LINKED = [*READ_BY_USERS, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("experiments/**/README.md"))]

COMMAND = re.compile(r"(?:plan\.py (\w+)|python3? -m ([\w.]+)|([\w/]+)\.py)((?: +\S+)*)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.]*)")
ALONE = re.compile(r"`--([a-z](?:[\w.]*\w)?)(?![\w.*-])")
"""A flag in the text: `--seed`; not `--mesh.*`, which stands for several, nor one with hyphens,
which is another program's."""
OUTSIDE = ("pytest", "venv", "pip", "mypy")
"""Modules that `python -m` runs and that are not ours."""
PLAN_FLAGS = {"topology", "sweep"}
"""Flags that plan.py takes itself; all others are the script's."""
LAUNCHERS = ("gcloud", "xpk", "#SBATCH", "srun", "docker", "$IMAGE", "--signal")
"""Lines with one of these have flags of other programs."""

WITH_COMMANDS = (".", "benchmarks", "collect", "decoding", "rewards", "weights")
"""Folders with modules that have flags."""

REMOVED = (
    *("--keep=", "--discount", "--smoothing", "--centring", "--lm_coefficient", "--carry"),
    *("--dynamic=", "--model.hidden", "--model.head_width", "--model.gemma", "select=passing"),
    *("pairs=extremes", "data.checks", "data.rules", "data/checks.py", "data/rules.py"),
    *("serve_reward.py", "collect_steps.py", "collect_spin.py", "presets.py", "pipeline.py"),
    *("docs/methods.md", "make_judge"),
)
"""Names of flags, modules and files that are gone."""


def name_of(path):
    return path.relative_to(ROOT).as_posix()


# --- the methods' pages


def test_the_pages_are_what_the_script_writes_from_the_results(tmp_path):
    pages.main(pages.Config(out=str(tmp_path)))
    committed = ROOT / "docs" / "methods"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in committed.iterdir()}
    for name in names:
        written = (tmp_path / name).read_text()
        if name.endswith(".svg"):
            # Places depend on the version of matplotlib; what is written there does not.
            assert words_of(written) == words_of((committed / name).read_text())
        else:
            assert written == (committed / name).read_text(), f"run {pages.__name__}"


def words_of(svg):
    return sorted(re.findall(r"<text[^>]*>([^<]+)</text>", svg))


def test_every_measured_method_has_a_page():
    measured = {row["method"] for row in pages.read("results.jsonl")}
    assert measured <= pages.sources().keys()
    assert len(measured) == 31


def test_a_figure_is_small():
    for path in (ROOT / "docs" / "methods").glob("*.svg"):
        assert path.stat().st_size < 30_000, path.name


# --- links and files


def test_the_tests_that_keep_faults_out_are_there():
    named = 0
    for row in (ROOT / "docs" / "faults.md").read_text().splitlines():
        for part in row.split("; "):
            file, *names = re.findall(r"`(\w+)`", part) or [""]
            if file.startswith("test_"):
                functions = (ROOT / "tests" / f"{file}.py").read_text()
                missing = [name for name in names if f"def test_{name}(" not in functions]
                assert names and not missing, row
                named += len(names)
    assert named > 150


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_relative_links_resolve(path):
    broken = [link for link in links_of(path) if not (path.parent / link).exists()]
    assert not broken


def links_of(path):
    """Return the relative links of a document, without their anchors."""
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    return [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](nowhere.md) [c](https://example.org/x.md) [d](#here)")
    assert [link for link in links_of(page) if not (tmp_path / link).exists()] == ["nowhere.md"]


@pytest.mark.parametrize("path", READ_BY_USERS, ids=name_of)
def test_files_that_a_document_names_exist(path):
    named = set(
        re.findall(r"(?<![\w/.<])([a-z_]+(?:/[\w.]+)*\.(?:py|sh|toml))\b", path.read_text())
    )
    of_the_reader = {name for name in named if "mine" in name}
    missing = {name for name in named - of_the_reader if not is_file(name)}
    assert not missing


def is_file(name):
    """Tell whether the repository has `name`, from its root or as a file of some folder."""
    return (ROOT / name).exists() or ("/" not in name and any(ROOT.glob(f"*/**/{name}")))


@pytest.mark.parametrize("path", READ_BY_USERS, ids=name_of)
def test_no_document_has_a_name_that_is_gone(path):
    assert [name for name in REMOVED if has_name(path.read_text(), name)] == []


def has_name(text, name):
    """Tell whether `name` is in `text`, not as the end of a longer one."""
    return re.search(rf"(?<![\w/.]){re.escape(name)}", text) is not None


def test_a_name_that_is_gone_is_seen():
    assert has_name("see `pipeline.py`", "pipeline.py")
    assert not has_name("`tests/test_pipeline.py`", "pipeline.py")


def test_the_tree_of_the_readme_is_that_of_the_root():
    _, tree = (ROOT / "README.md").read_text().split("## The tree")
    told = set(re.findall(r"^    (\w+(?:\.py|/))", tree, re.MULTILINE))
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} | {"docs/", "experiments/"}
    assert told == files | folders


# --- flags


def flags_of(config):
    """Return the dotted names of all flags of a dataclass, those of nested ones too."""
    names = set()
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        names.add(field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            names |= {f"{field.name}.{inner}" for inner in flags_of(hints[field.name])}
    return names


def commands(text):
    """Return a document's commands of ours: (module, flags of it), continued lines joined."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for planned, module, script, rest in COMMAND.findall(line):
            name = planned or module or script.replace("/", ".")
            if name in OUTSIDE or name.startswith("tests"):
                continue
            # An explanation behind the command, or the rest of a shell's line, is not of it.
            own = re.split(r" #|[;|&`]", rest)[0]
            given = set(FLAG.findall(own))
            yield name, given - PLAN_FLAGS if planned else given


def scripts():
    """Return the modules that have flags, of the root and its folders, but experiments."""
    for folder in WITH_COMMANDS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if "class Config:" in path.read_text():
                yield name_of(path).removesuffix(".py").replace("/", ".")


def config_of(module):
    return getattr(importlib.import_module(module), "Config", None)


@pytest.mark.parametrize("path", READ_BY_USERS, ids=name_of)
def test_flags_of_commands_exist(path):
    unknown = []
    for module, given in commands(path.read_text()):
        # A copy that the reader makes has the flags of what is copied.
        module = module.replace("experiments.mine.", "")
        if given:
            known = flags_of(config_of(module)) | {"help"}
            unknown += [f"{module} --{flag}" for flag in sorted(given - known)]
    assert not unknown


def test_a_flag_that_is_no_flag_is_seen():
    text = (
        "    python train_sft.py --lenght=3 --mesh.fsdp=2 \\\n      --model.hidden=1  # --not_this"
    )
    ((module, given),) = commands(text)
    assert given - flags_of(config_of(module)) == {"lenght", "model.hidden"}


@pytest.mark.parametrize("path", READ_BY_USERS, ids=name_of)
def test_flags_in_the_text_are_of_some_script(path):
    known = {"help"} | PLAN_FLAGS | {"read", "write", "dtype"}
    for script in scripts():
        known |= flags_of(config_of(script))
    unknown = set()
    for line in path.read_text().splitlines():
        if not any(word in line for word in LAUNCHERS):
            unknown |= set(ALONE.findall(line)) - known
    assert not unknown


# --- the changelog


def test_bullets_of_the_changelog_are_short():
    bullets = re.findall(r"^- (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert [bullet for bullet in bullets if len(bullet.split()) > 25] == []
