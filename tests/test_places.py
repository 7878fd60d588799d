"""Where commands write: never over files of others, never in place of what is no file."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from running import fails, run, write

import evaluate
from collect import clean, select
from decoding import rerank, step_beam
from decoding.report import RESULT
from evaluation.alignment import STAGES
from experiments import curves
from experiments.data_sampling import verdicts
from experiments.feedback import measure as feedback
from experiments.raft_first import measure as raft_first
from experiments.shared_trunk import measure as shared_trunk
from runtime.errors import UserError
from runtime.writes import atomic_text

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [{"prompt": f"say {i}", "response": f"{i}!"} for i in range(9)]
CLEAN = ["--data=rows.jsonl", "--rules=exact"]
SELECT = ["--data=rows.jsonl", "--k=3"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "rows.jsonl", ROWS)


# What lies there, the command that would write to it, and what the line says.
TAKEN = {
    "out.jsonl.dropped.jsonl": (clean, [*CLEAN, "--out=out.jsonl"], "exists; remove it"),
    "out.jsonl.scores.jsonl": (select, [*SELECT, "--out=out.jsonl"], "exists; remove it"),
    "search.json": (step_beam, ["--out=search.json"], "is not of this command"),
    "rerank.json": (rerank, ["--out=rerank.json"], "is not of this command"),
    "found.jsonl": (
        step_beam,
        ["--solutions=found.jsonl"],
        "exists; remove it or name another place",
    ),
    "all/summary.json": (evaluate, ["--run=all"], "is not of this command"),
    "all/report.html": (evaluate, ["--run=all"], "is not of this command"),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("content", ["mine\n", '{"mine": 1}\n'])
def test_a_file_of_others_is_left_as_it_is(name, content, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    script, argv, told = TAKEN[name]
    line = fails(script, argv, capsys)
    assert f"{name}: exists" in line and told in line
    assert path.read_text() == content
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "names", "script", "flag"),
    [
        ("search.json", RESULT, step_beam, "--out=search.json"),
        ("rerank.json", RESULT, rerank, "--out=rerank.json"),
        ("all/summary.json", STAGES, evaluate, "--run=all"),
    ],
)
def test_a_result_of_the_same_command_may_be_replaced(name, names, script, flag, tmp_path, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict.fromkeys(names)))
    # It goes on to the runs, which are not there.
    assert "no run here" in fails(script, [flag, "--data=world"], capsys)


@pytest.mark.parametrize("solutions", ["both", "./both", "link/both"])
def test_two_files_have_two_places(solutions, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path)
    line = fails(step_beam, ["--out=both", f"--solutions={solutions}"], capsys)
    assert "--out=both: names the file of --solutions too" in line


def test_a_place_that_cannot_be_written_is_told_before_the_search(capsys):
    # There is no run to search with either.
    line = fails(step_beam, ["--solutions=rows.jsonl/found.jsonl"], capsys)
    assert "rows.jsonl/found.jsonl: not saved" in line


def test_an_empty_summary_does_not_give_a_report_away(tmp_path, capsys):
    (tmp_path / "summary.json").touch()
    (tmp_path / "report.html").write_text("mine")
    line = fails(evaluate, [f"--run={tmp_path}"], capsys)
    assert "report.html: exists, and is not of this command" in line


@pytest.mark.parametrize(("ends", "code"), [(75, 75), (143, 143), (-15, 143), (-9, 137)])
def test_codes_that_a_restart_goes_by_are_passed_on(ends, code, monkeypatch):
    ended = subprocess.CompletedProcess([], ends)
    monkeypatch.setattr(shared_trunk.subprocess, "run", lambda *args, **named: ended)
    with pytest.raises(SystemExit) as stop:
        run(shared_trunk)
    assert stop.value.code == code


def test_another_code_of_a_run_is_one_line(monkeypatch, capsys):
    ended = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(shared_trunk.subprocess, "run", lambda *args, **named: ended)
    assert "train_ppo.py ended with code 1" in fails(shared_trunk, ["--out=new.jsonl"], capsys)


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("name", ["pipe", "folder", "", "n" * 300])
def test_what_is_no_file_is_not_replaced_by_one(name, anew, tmp_path):
    """As /dev/null would be, whose name is often given."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as fault, atomic_text(name, anew) as file:
        file.write("x")
    assert "\n" not in str(fault.value)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "pipe").is_fifo()


EXPERIMENTS = {
    "curves: no run": (curves, ["--runs=none"], "none/metrics.jsonl: missing"),
    "curves: damaged rows alone": (curves, ["--runs=damaged", "--metric=loss"], "it has no rows"),
    "curves: nulls alone": (
        curves,
        ["--runs=nulls", "--metric=loss"],
        "has no finite loss; it has step",
    ),
    "curves: no figure": (curves, ["--out=rows.jsonl"], "--out=rows.jsonl: must end in .svg"),
    "raft_first: no run": (raft_first, ["--run=none"], "none/from_sft: has no metrics of gold"),
    "feedback: not of the world": (feedback, ["--file=pairs.jsonl"], "not a prompt of the"),
    "feedback: no reliability": (feedback, ["--reliabilities=2"], "--reliabilities=2.0: must"),
    "shared_trunk: no seeds": (shared_trunk, ["--seeds"], "--seeds: name at least one"),
    "verdicts: no file": (verdicts, ["--results=none"], "none: no such file"),
    "verdicts: no marks": (verdicts, ["--readme=rows.jsonl"], "--readme=rows.jsonl: lacks the"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_mistakes_in_experiments_are_one_line_too(name, tmp_path, capsys):
    for folder, line in (("damaged", '{"step": 1, "lo'), ("nulls", '{"step": 1, "loss": null}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.jsonl").write_text(line + "\n")
    write(tmp_path / "pairs.jsonl", [{"prompt": "1+1", "chosen": "2", "rejected": "3"}] * 9)
    before = (tmp_path / "rows.jsonl").read_bytes()
    script, argv, told = EXPERIMENTS[name]
    assert told in fails(script, argv, capsys)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


WRITES = """
import sys
from runtime.writes import atomic_text
with atomic_text(sys.argv[1]) as file:
    file.write("caf\\u00e9 \\u2019 half \\ud800")
"""


# In an empty folder: pages of studies, all of which have characters beyond ASCII.
WRITES_PAGES = """
import pathlib, shutil
from experiments.data_sampling import verdicts
from experiments.methods import pages, table
shutil.copy(table.HERE / "README.md", "verdicts.md")
with open("verdicts.md", "ab") as file:
    file.write(f"{verdicts.FIRST}{verdicts.LAST}".encode())
verdicts.main(verdicts.Config(readme="verdicts.md", figure="curves.png"))
pages.main(pages.Config(out="pages"))
shutil.copytree(table.HERE, "methods")
table.HERE = pathlib.Path("methods").resolve()
table.main()
"""


def in_c_locale(program, *argv):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, **plain, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, *argv], env=environment, check=True)


@pytest.mark.slow
def test_pages_of_studies_are_utf_8_in_every_locale(tmp_path):
    in_c_locale(WRITES_PAGES)
    for page in ("verdicts.md", "pages/README.md", "pages/dpo.md", "methods/README.md"):
        content = (tmp_path / page).read_bytes()
        assert not content.isascii() and content.decode()


def test_files_are_utf_8_in_every_locale(tmp_path):
    in_c_locale(WRITES, str(tmp_path / "text"))
    assert (tmp_path / "text").read_bytes().decode() == "café ’ half \\ud800"
