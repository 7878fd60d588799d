"""The table of planted faults is up to date; `make mutants` plants them."""

import pytest
from mutants import FAULTS, ROOT, Fault, planted


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.file)
def test_every_fault_can_be_planted(fault):
    planted(fault, ROOT)


def test_mistakes_of_an_entry_are_told():
    known = FAULTS[0]
    for changes, message in (
        ({"right": "no such text"}, "stands there 0 times"),
        ({"right": "import"}, "times, not once"),
        ({"wrong": known.right}, "changes nothing"),
        ({"test": "test_measures.py::test_of_nothing"}, "no test"),
    ):
        with pytest.raises(ValueError, match=message):
            planted(Fault(**{**known._asdict(), **changes}), ROOT)


def test_there_are_faults_of_every_part_and_none_twice():
    assert len({(fault.file, fault.right, fault.wrong) for fault in FAULTS}) == len(FAULTS) >= 45
    parts = {fault.file.split("/")[0] for fault in FAULTS}
    assert {"evaluation", "collect", "rewards", "decoding", "runtime", "experiments"} <= parts
