"""Runs whose updates come to nothing end in a line, with exit code 2."""

import pytest
from running import fails, rows_of

import train_sft
from runtime.errors import UserError
from runtime.updates import MOST_FAULTY, UpdateCheck


def rows(kinds, prefix=""):
    """Yield (step, metrics) of updates by their kind: u taken, s skipped, o left out."""
    counts = {"u": 0, "s": 0, "o": 0}
    for step, kind in enumerate(kinds, start=1):
        counts[kind] += 1
        yield (
            step,
            {
                f"{prefix}updates": float(counts["u"]),
                f"{prefix}skipped": float(counts["s"]),
                f"{prefix}left_out": float(counts["o"]),
            },
        )


def look(kinds, start=0, prefix=""):
    check = UpdateCheck("runs/x", start, start + len(kinds))
    for step, values in rows(kinds, prefix):
        check(start + step, values)


@pytest.mark.parametrize("prefix", ["", "policy/", "value/"])
def test_faults_in_a_row_end_a_run_and_single_ones_do_not(prefix):
    look("u" + "s" * (MOST_FAULTY - 1) + "u" + "s" * (MOST_FAULTY - 1), prefix=prefix)
    with pytest.raises(UserError, match=r"20 updates in a row .* last good step is 3 \(saved: no"):
        look("usu" + "s" * MOST_FAULTY, prefix=prefix)


def test_updates_without_weight_are_no_faults():
    look("u" + "o" * 50)
    look("u" + "so" * (MOST_FAULTY - 1))
    with pytest.raises(UserError, match="20 updates in a row"):
        look("u" + "so" * MOST_FAULTY)


@pytest.mark.parametrize("kinds", ["s" * 5, "o" * 30, "sosos"])
def test_a_run_without_an_update_is_no_success(kinds):
    with pytest.raises(UserError, match="no update was taken"):
        look(kinds)
    look(kinds[:-1] + "u")  # control


def test_a_round_of_nothing_but_faults_counts_all_of_them():
    check = UpdateCheck("runs/x", 0, 9)
    check(1, {"policy/updates": 8.0, "policy/skipped": 0.0})
    check(2, {"policy/updates": 8.0, "policy/skipped": 8.0})
    check(3, {"policy/updates": 8.0, "policy/skipped": 16.0})
    with pytest.raises(UserError, match=r"24 updates in a row .* last good step is 1"):
        check(4, {"policy/updates": 8.0, "policy/skipped": 24.0})


def test_a_resumed_run_counts_from_where_it_starts():
    check = UpdateCheck("runs/x", 100, 102)
    check(101, {"updates": 70.0, "skipped": 30.0})
    check(102, {"updates": 70.0, "skipped": 31.0})


def test_rounds_that_choose_nothing_are_no_run():
    # RAFT's own count of a round's updates, none of which has metrics.
    check = UpdateCheck("runs/x", 0, 2)
    check(1, {"updates": 0.0})
    with pytest.raises(UserError, match="no update was taken"):
        check(2, {"updates": 0.0})
    UpdateCheck("runs/x", 1, 2)(2, {"updates": 0.0})  # the rounds before are not known here


def test_a_run_that_overflows_ends_in_a_line(tmp_path, capsys):
    # The first update is finite; the parameters after it are not of this world.
    flags = ["--model.preset=tiny", "--length=48", "--batch_size=8", "--steps=40"]
    flags += ["--optimizer.lr=1e30", "--optimizer.schedule=constant", "--optimizer.warmup=0"]
    line = fails(train_sft, [*flags, "--eval_every=0", f"--run={tmp_path}/run"], capsys)
    assert "20 updates in a row" in line and "last good step is 1 (saved: none)" in line
    assert rows_of(tmp_path / "run")[-1]["skipped"] == MOST_FAULTY
