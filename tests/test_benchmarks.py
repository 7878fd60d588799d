"""The benchmarks write what they print, and the tables of the READMEs are of their results."""

import importlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from benchmark_sides import broken, dying, stuck, work

from benchmarks import (
    attention,
    command,
    decode,
    hopper,
    parquet,
    pods,
    ppo,
    rows,
    side_by_side,
    train,
)
from kernels import flash
from kernels.attention import chosen

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = sorted((ROOT / "benchmarks" / "gpu").glob("*.sh"))
ON_BARE_MACHINES = 180
"""Seconds that a script for a GPU may take."""
# What a machine that is lent for minutes does not have.
ABSENT = (
    "tyro",
    "grain",
    "array_record",
    "orbax",
    "sentencepiece",
    "tensorboardX",
    "tensorflow_datasets",
    "importlib_resources",
    "tqdm",
    "matplotlib",
    "pytest",
)


def measured(module, *argv):
    """Return what a benchmark's main returns under the flags `argv`."""
    return module.main(command.parse(module.Config, list(map(str, argv))))


# ---- A row ----


def same(checks):
    """All sides must have the same check."""
    assert len(set(checks.values())) == 1, "checks differ"


def row_of(limit=60.0, agree=None, **sides):
    built = {name: rows.Side(*side) for name, side in sides.items()}
    return rows.Row("work", built, {"work": 100}, agree=agree, limit=limit)


def test_a_row_has_its_times_rates_and_ratios():
    row = row_of(ours=(work, (0.02,)), peer=(work, (0.04,)), other=(work, (0.02, 300)))
    result = rows.measure(row, rounds=3, at_least=0.1)
    (line,) = result["lines"]
    assert line["side"] == "ours" and rows.is_whole(result)
    assert 20 <= line["ms"] < 100
    assert line["tokens_per_s"] == pytest.approx(100e3 / line["ms"], rel=0.3)
    # Twice as fast as the first; a third as fast as one that makes 300 tokens in the same time.
    assert line["faster_than"]["peer"][0] == pytest.approx(2, rel=0.45)
    assert line["faster_than"]["other"][0] == pytest.approx(1 / 3, rel=0.45)
    assert len(result["sides"]["peer"]["seconds"]["work"]) == 3
    # Honest ratios: what the library's own matmul does on these cores.
    assert result["matmul_gflops"]["jax"] > 0
    assert result["threads"]["jax"] == len(os.sched_getaffinity(0))


def test_a_row_over_its_limit_says_so_and_the_next_one_runs(tmp_path, capsys):
    every = [
        row_of(limit=4, agree=same, ours=(stuck, ())),
        row_of(limit=30, ours=(work, (0.01,)), peer=(stuck, ()), absent=(broken, ())),
        row_of(limit=60, ours=(dying, ()), peer=(work, (0.01,))),
        row_of(limit=60, agree=same, ours=(work, (0, 1, 1)), peer=(work, (0, 1, 2))),
        row_of(limit=8, ours=(work, (0.3,)), peer=(work, (0.3,))),
    ]
    written = []

    def finish(_):
        path = tmp_path / "limits-cpu.json"
        written.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)

    config = train.Config(rounds=2, seconds=0.1, out=str(tmp_path))
    rows.run_rows("limits", config, every[:4], finish)
    found = json.loads((tmp_path / "limits-cpu.json").read_text())
    late, left_out, dead, other = found["rows"]
    # After every row the file had those before.
    assert written == [0, 1, 2, 3]

    assert late["left_out"]["ours"] == "not ready after 75% of 4 s"
    assert not late.get("lines") and 3 <= late["spent_s"] < 20
    assert left_out["left_out"]["peer"] == "not ready after 75% of 30 s"
    assert left_out["left_out"]["absent"] == "ModuleNotFoundError: No module named 'peer'"
    assert len(left_out["sides"]["ours"]["seconds"]["work"]) == 2 and rows.is_whole(left_out)
    assert dead["left_out"]["ours"] == "its process died (exit code 3)"
    assert dead["lines"][0]["side"] == "peer" and not rows.is_whole(dead)
    assert "checks differ" in other["left_out"]["agreement"] and not rows.is_whole(other)
    # Ours alone is timed then.
    assert other["lines"][0]["ms"] > 0 and other["lines"][0]["faster_than"] == {}
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80

    # What was timed before the limit stays.
    cut = rows.measure(every[4], rounds=100, at_least=0.1)
    assert "of 100" in cut["over_limit"] and cut["spent_s"] < 30


def test_the_processor_is_named(tmp_path):
    about = rows.machine()
    assert about["platform"] == "cpu"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            assert about["cpu"].startswith(line.partition(": ")[2])
    assert about["device"] == about["cpu"]


# ---- Scripts for a machine that is lent for minutes ----


def commands_of(script):
    """Return the commands of a script for a GPU: a benchmark's module and its flags each."""
    found = []
    for line in script.read_text().splitlines():
        words = shlex.split(line, comments=True)
        if "-m" in words:
            at = words.index("-m")
            flags = words[at + 2 : words.index("$@")]
            found.append((importlib.import_module(words[at + 1]), flags))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_for_a_gpu_ends_in_three_minutes(script):
    seconds = 0.0
    for module, flags in commands_of(script):
        seconds += rows.seconds_in_all(module.rows(command.parse(module.Config, flags)))
    assert 0 < seconds < ON_BARE_MACHINES


def test_there_are_four_scripts_for_a_gpu():
    found = {script.stem: [module for module, _ in commands_of(script)] for script in SCRIPTS}
    assert found == {
        "1_attention": [attention],
        "2_hopper": [hopper],
        "3_train": [train],
        "4_decode": [decode, ppo],
    }


BLOCKER = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
TINY = ("--rounds=1", "--seconds=0.01")
TINY_FLAGS = {
    "1_attention": "--implementations library xla_chunked --lengths 16 --tokens 32 --heads 2 "
    "--width 8 --segments 1 --row_limits 1 100",
    "2_hopper": "--implementation xla_chunked --cases 'width 64' --length 16 --tokens 32 "
    "--heads 2 --width 8 --row_limits 100 1 100",
    "3_train": "--model tiny --batch 2 --length 16 --peers --row_limits 100",
    "4_decode": "--model tiny --prompt 8 --new 8 --peers --row_limits 100",
}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=script.stem, marks=pytest.mark.slow if number else ())
        for number, script in enumerate(SCRIPTS)
    ],
)
def test_a_script_runs_where_little_is_installed(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    blocked = subprocess.run(
        [sys.executable, "-c", "import tyro"], env=environment, capture_output=True, text=True
    )
    assert "No module named 'tyro'" in blocked.stderr

    command_line = [str(script), *TINY, *shlex.split(TINY_FLAGS[script.stem]), f"--out={tmp_path}"]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    names = {"1_attention": ["attention"], "2_hopper": ["hopper"], "3_train": ["train"]}
    late = 0
    for name in names.get(script.stem, ["decode", "ppo"]):
        for row in json.loads((tmp_path / f"{name}-cpu.json").read_text())["rows"]:
            if row["limit_s"] == 1:
                # Its limit is too short to start in; the next one runs.
                late += 1
                assert not row["lines"] and "not ready" in next(iter(row["left_out"].values()))
            else:
                assert row["left_out"] == {} and row["lines"][0]["ms"] > 0
    assert late == (" 1 100" in TINY_FLAGS[script.stem])
    assert done.returncode == (1 if late else 0), done.stderr


# ---- The benchmarks ----


def test_the_readmes_table_is_not_written_for_a_typo():
    before = (ROOT / "README.md").stat().st_mtime_ns
    command_line = [sys.executable, "-m", "benchmarks.side_by_side", "--nosuch"]
    assert subprocess.run(command_line, cwd=ROOT, capture_output=True).returncode == 2
    assert (ROOT / "README.md").stat().st_mtime_ns == before


def test_flags_are_read_without_tyro(capsys):
    config = command.parse(decode.Config, ["--batches", "4", "2", "--peers", "--seconds=0.5"])
    assert (config.batches, config.peers, config.seconds) == ((4, 2), (), 0.5)
    assert command.parse(decode.Config, []) == decode.Config()
    with pytest.raises(SystemExit) as stop:
        command.parse(decode.Config, ["--batch=3"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        command.parse(decode.Config, ["--help"])
    assert "Tokens of a prompt. (default: 64)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_benchmark_writes_what_it_prints(tmp_path, capsys):
    flags = ("--model=tiny", "--batch=2", "--length=16", "--peers", "flax", "--rounds=2")
    result = measured(train, *flags, "--seconds=0.1", f"--out={tmp_path}")
    written = json.loads((tmp_path / "train-cpu.json").read_text())
    assert written == json.loads(json.dumps(result))
    (row,) = result["rows"]
    (line,) = row["lines"]
    assert row["left_out"] == {}
    assert line["tokens_per_s"] == pytest.approx(32e3 / line["ms"], rel=0.5)
    assert "mfu" not in line
    assert len(row["sides"]["plumb"]["seconds"]["train step 2x16"]) == 2
    printed = capsys.readouterr().out
    assert f"{line['tokens_per_s']:.0f}" in printed and "flax" in printed
    assert max(map(len, printed.splitlines())) < 80

    # Parameters by hand: 2 layers of q, o 32x4x8 and k, v 32x2x8, three of 32x64; the tied 512x32.
    matrices = 2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 512 * 32
    norms = 5 * 32
    assert row["params"] == matrices + norms
    # Scores of half of 16x16, in 2 layers of 4 heads of width 8.
    assert row["flops"] == 6 * 32 * (row["params"] + 2 * 4 * 8 * 16)

    # Control: other losses are not taken for the same.
    checks = {"plumb": ([6.0, 5.0], 2e-3), "flax": ([6.0, 5.1], 2e-3)}
    with pytest.raises(AssertionError):
        train.same_losses(checks)


def test_a_parquet_file_is_made_and_read_up_to_a_batch(tmp_path):
    result = measured(parquet, "--megabytes=4", f"--folder={tmp_path}", f"--out={tmp_path}")
    assert json.loads((tmp_path / "parquet.json").read_text()) == result
    assert list(tmp_path.iterdir()) == [tmp_path / "parquet.json"]
    # A row takes 2 kB; a part of them is held out.
    assert 1000 < result["rows"] < 4000
    assert 0 < result["opened_s"] < result["first_batch_s"]
    # Of the whole process, which here has run other tests too.
    assert result["peak_mib"] > 50


def test_shares_of_a_chips_peaks():
    line = {"what": "train step", "ms": 100.0}
    on_gpu = {"device": "NVIDIA H200", "rows": [{"lines": [line], "flops": 989e11 / 2}]}
    train.add_mfu(on_gpu)
    assert line["mfu"] == pytest.approx(0.5)
    whole, prefill = {"ms": 1100.0}, {"ms": 100.0}
    on_gpu["rows"] = [{"lines": [whole, prefill], "bytes_per_step": 4.8e9}]
    decode.add_roofline({**on_gpu, "config": {"new": 101}})
    assert whole["ms_per_step"] == pytest.approx(10)
    assert whole["of_roofline"] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_decode_benchmark_counts_its_tokens(tmp_path):
    sizes = ("--batches", 8, 1, "--prompt=8", "--new=16", "--requests=32", "--longest=16")
    result = measured(decode, "--model=tiny", "--peers", "--rounds=2", *sizes, f"--out={tmp_path}")
    full, one, refill, *_ = result["rows"]
    for row, tokens in ((full, 8), (one, 1)):
        whole, prefill = row["lines"]
        assert whole["tokens_per_s"] == pytest.approx(16e3 * tokens / whole["ms"], rel=0.5)
        assert prefill["tokens_per_s"] == pytest.approx(1e3 * tokens / prefill["ms"], rel=0.5)
    assert 2 < refill["sides"]["plumb"]["mean_length"] < 7


@pytest.mark.slow
def test_a_ppo_benchmark_has_responses_of_unequal_length(tmp_path):
    sizes = ("--model=tiny", "--geometric_model=small-64", "--batch=8", "--prompt=8", "--new=8")
    result = measured(ppo, *sizes, "--longest=256", "--peers", *TINY, f"--out={tmp_path}")
    full, geometric = result["rows"]
    assert full["sides"]["plumb"]["mean_length"] == 8
    assert 20 < geometric["sides"]["plumb"]["mean_length"] < 130
    assert [len(row["lines"]) for row in result["rows"]] == [4, 4]


def test_the_readme_has_the_results():
    table = side_by_side.markdown(RESULTS)
    assert f"<!-- benchmarks -->\n{table}\n<!-- end -->\n" in (ROOT / "README.md").read_text()


def test_the_page_of_pods_has_the_results():
    """And its rollouts, of which the rows differ in nothing but the rollout itself."""
    results = json.loads(pods.RESULTS.read_text())
    rollouts = json.loads(pods.ROLLOUT_RESULTS.read_text())
    assert pods.section(results, rollouts) in pods.PAGE.read_text()
    _, _, *rows = pods.rollouts_table(rollouts, results["ppo-8b"])
    assert len(rows) == len(pods.ROLLOUTS_OF_8B)
    beside = []
    for row in rows:
        *_, by_bytes, latency, rollout, iteration = row.strip("| ").split(" | ")
        assert float(by_bytes) + float(latency) == pytest.approx(float(rollout), abs=0.011)
        beside.append(float(iteration) - float(rollout))
    assert beside[0] > 0 and beside == pytest.approx([beside[0]] * len(rows), abs=0.011)


def test_every_result_names_its_processor_and_the_libraries_matmul():
    for name in ("train", "decode", "ppo", "attention"):
        for path in RESULTS.glob(f"{name}-*.json"):
            result = json.loads(path.read_text())
            assert result["cpu"] and result["device"] != "cpu"
            # Older than that these are recorded.
            if result["cpu"] == "not recorded":
                assert result["date"] < "2026-11-23"
                continue
            for row in filter(lambda row: row["lines"], result["rows"]):
                for library in row["threads"]:
                    assert row["threads"][library] >= 1
                    assert library == "ctranslate2" or row["matmul_gflops"][library] > 0


# Of the fastest's time: two that are as fast may change places from run to run.
AS_FAST = 1.15


def test_auto_is_the_fastest_that_was_measured():
    compared = 0
    for path in RESULTS.glob("attention-*.json"):
        result = json.loads(path.read_text())
        itemsize = 4 if result["platform"] == "cpu" else 2
        for length, ms in attention.fastest(result).items():
            name = chosen(result["platform"], length, result["config"]["width"], itemsize)
            assert ms[name] < AS_FAST * min(ms.values()), f"{path.name}, {length} tokens"
            compared += 1
            # Control: the slowest would not pass.
            assert max(ms.values()) > AS_FAST * min(ms.values())
    assert compared


def test_the_counted_inner_loops_are_those_of_the_kernels_as_they_are():
    result = json.loads((RESULTS / "tpu_schedule.json").read_text())
    for row in result["rows"]:
        blocks = flash.blocks_of("tpu", result["length"], row["width"], 16)
        assert row["tile"] == list(getattr(blocks, row["kernel"]))
    assert attention.schedule_table(RESULTS) in (RESULTS / "README.md").read_text()
