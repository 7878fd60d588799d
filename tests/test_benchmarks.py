import json
import pathlib
import subprocess
import sys

import pytest
from running import run

from kernels import flash

ROOT = pathlib.Path(__file__).parents[1]
TINY = ("--peer=False", "--model.preset=tiny", "--rounds=2")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_readmes_table_is_not_written_for_a_typo():
    before = (ROOT / "README.md").stat().st_mtime_ns
    command = [sys.executable, str(ROOT / "benchmarks" / "side_by_side.py"), "--nosuch"]
    assert subprocess.run(command, capture_output=True).returncode == 2
    assert (ROOT / "README.md").stat().st_mtime_ns == before


def test_a_training_benchmark_writes_what_it_prints(benchmarks, tmp_path, capsys):
    import train

    run(train, *TINY, "--batch=2", "--length=16", f"--out={tmp_path}")
    result = json.loads((tmp_path / "train-cpu.json").read_text())
    (row,), printed = result["rows"], capsys.readouterr().out.splitlines()
    assert (
        row["tokens"] == 32
        and row["tokens_per_s"] == pytest.approx(32e3 / row["ms"])
        and "mfu" not in row
    )
    # By hand: 2 layers of q, o 32x4x8 and k, v 32x2x8, three of 32x64, and the tied 512x32; scores of half of 16x16.
    matrices = 2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 512 * 32
    norms = 5 * 32
    assert row["params"] == matrices + norms and row["flops"] == 6 * 32 * (
        row["params"] + 2 * 4 * 8 * 16
    )
    assert len(row["seconds"]["plumb"]) == 2 and f"{row['tokens_per_s']:.0f}" in printed[-1]
    assert max(map(len, printed)) < 80


@pytest.mark.slow
def test_decode_and_ppo_benchmarks_run(benchmarks, tmp_path):
    import decode
    import ppo

    sizes = ("--batches", "8", "1", "--prompt=8", "--new=16", "--requests=32", "--limit=16")
    run(decode, *TINY, *sizes, f"--out={tmp_path}")
    rows = json.loads((tmp_path / "decode-cpu.json").read_text())["rows"]
    assert [row["tokens"] for row in rows[:4]] == [128, 8, 16, 1] and 2 < rows[4][
        "mean_length"
    ] < 7
    run(ppo, *TINY, "--batch_size=8", "--max_prompt=8", "--max_new_tokens=8", f"--out={tmp_path}")
    assert len(json.loads((tmp_path / "ppo-cpu.json").read_text())["rows"]) == 4


def test_the_readme_has_the_results(benchmarks):
    import side_by_side

    table = side_by_side.markdown(ROOT / "benchmarks" / "results")
    assert f"<!-- benchmarks -->\n{table}\n<!-- end -->\n" in (ROOT / "README.md").read_text()


def test_the_counted_inner_loops_are_those_of_the_kernels_as_they_are(benchmarks):
    import attention

    folder = ROOT / "benchmarks" / "results"
    result = json.loads((folder / "tpu_schedule.json").read_text())
    for row in result["rows"]:
        assert row["tile"] == list(
            getattr(flash.blocks_of("tpu", result["length"], row["width"], 16), row["kernel"])
        )
    assert attention.schedule_table(folder) in (folder / "README.md").read_text()
