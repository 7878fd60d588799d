"""The benchmarks write what they print, and the tables of the READMEs are of their results."""

import json
import pathlib
import subprocess
import sys

import pytest
from running import run

from benchmarks import attention, decode, ppo, rollout, side_by_side, train
from kernels import flash

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TINY = ("--peer=False", "--model.preset=tiny", "--rounds=2")


def test_the_readmes_table_is_not_written_for_a_typo():
    before = (ROOT / "README.md").stat().st_mtime_ns
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--nosuch"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 2
    assert (ROOT / "README.md").stat().st_mtime_ns == before


def test_a_training_benchmark_writes_what_it_prints(tmp_path, capsys):
    run(train, *TINY, "--batch=2", "--length=16", f"--out={tmp_path}")
    (row,) = json.loads((tmp_path / "train-cpu.json").read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert row["tokens"] == 32
    assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"])
    assert "mfu" not in row
    assert len(row["seconds"]["plumb"]) == 2
    assert f"{row['tokens_per_s']:.0f}" in printed[-1]
    assert max(map(len, printed)) < 80

    # Parameters by hand: 2 layers of q, o 32x4x8 and k, v 32x2x8, three of 32x64; the tied 512x32.
    matrices = 2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 512 * 32
    norms = 5 * 32
    assert row["params"] == matrices + norms
    # Scores of half of 16x16, in 2 layers of 4 heads of width 8.
    assert row["flops"] == 6 * 32 * (row["params"] + 2 * 4 * 8 * 16)


@pytest.mark.slow
def test_a_decode_benchmark_counts_its_tokens(tmp_path):
    sizes = ("--batches", "8", "1", "--prompt=8", "--new=16", "--requests=32", "--limit=16")
    run(decode, *TINY, *sizes, f"--out={tmp_path}")
    rows = json.loads((tmp_path / "decode-cpu.json").read_text())["rows"]
    assert [row["tokens"] for row in rows[:4]] == [128, 8, 16, 1]
    assert 2 < rows[4]["mean_length"] < 7


@pytest.mark.slow
def test_a_rollout_benchmark_times_stages_beside_one_loop(tmp_path):
    sizes = ("--batches", "8", "4", "--prompt=8", "--limit=64", f"--out={tmp_path}")
    run(rollout, "--model.preset=tiny", "--rounds=2", *sizes)
    ending, fewer, full = json.loads((tmp_path / "rollout-cpu.json").read_text())["rows"]
    assert full["tokens"] == 8 * 64 and full["mean_length"] == 64
    assert 1 < ending["mean_length"] < 64 and fewer["tokens"] < 4 * 64
    assert list(ending["faster_than"]) == ["one stage"]


@pytest.mark.slow
def test_a_ppo_benchmark_runs(tmp_path):
    sizes = ("--batch_size=8", "--max_prompt=8", "--max_new_tokens=8")
    run(ppo, *TINY, *sizes, f"--out={tmp_path}")
    assert len(json.loads((tmp_path / "ppo-cpu.json").read_text())["rows"]) == 4


def test_the_readme_has_the_results():
    table = side_by_side.markdown(RESULTS)
    assert f"<!-- benchmarks -->\n{table}\n<!-- end -->\n" in (ROOT / "README.md").read_text()


def test_the_counted_inner_loops_are_those_of_the_kernels_as_they_are():
    result = json.loads((RESULTS / "tpu_schedule.json").read_text())
    for row in result["rows"]:
        blocks = flash.blocks_of("tpu", result["length"], row["width"], 16)
        assert row["tile"] == list(getattr(blocks, row["kernel"]))
    assert attention.schedule_table(RESULTS) in (RESULTS / "README.md").read_text()
