"""The built-in arithmetic: problems, demonstrators, checker, records; Python's own sums judge."""

import random
import re

import pytest

from data import records
from data.sources import open_source
from runtime.errors import UserError
from tasks import arithmetic
from tasks.answers import number

EQUATION = re.compile(r"(\d+)([+-]\d)=(\d+)")


def true_values(text):
    """Return every value on the way, by eval of longer and longer beginnings."""
    ends = [m.end() for m in re.finditer(r"\d+", text)]
    return [eval(text[:end]) for end in ends]


def test_problems_are_a_function_of_index_and_seed_and_splits_share_none():
    train = [arithmetic.problem(i) for i in range(3000)]
    assert train == [arithmetic.problem(i) for i in range(3000)]
    assert train != [arithmetic.problem(i, seed=1) for i in range(3000)]  # control
    heldout = {arithmetic.problem(i, split="heldout", seed=s) for i in range(1500) for s in (0, 1)}
    assert not heldout & set(train)
    assert len(set(train)) > 2500
    values = [v for text in train for v in true_values(text)]
    assert min(values) >= 10 and max(values) <= 99
    assert {len(true_values(text)) - 1 for text in train} == {2, 3, 4}


def test_the_best_demonstrator_is_always_right_and_others_err_as_told():
    right = [arithmetic.demonstration(i, quality=1.0) for i in range(500)]
    for row in right:
        steps = row["response"].split("\n")
        assert set(arithmetic.verdicts(row["prompt"], steps)) <= {"positive", "neutral"}
        assert arithmetic.solved(row["prompt"], row["response"])
        assert steps[-1] == f"answer {eval(row['prompt'])}"
    kinds = {"carry": 0, "kept": 0, "slip": 0, "plain": 0}
    for i in range(2000):
        for step in arithmetic.demonstration(i, quality=0.5)["response"].split("\n"):
            if not (parts := EQUATION.fullmatch(step)):
                continue
            value, change, result = map(int, parts.groups())
            error = result - (value + change)
            crosses = (value + change) // 10 != value // 10
            forgotten = -10 if change > 0 else 10
            name = {0: "kept" if crosses else "plain", forgotten: "carry"}.get(error, "slip")
            assert name != "carry" or crosses
            kinds[name] += 1
    assert kinds["carry"] / (kinds["carry"] + kinds["kept"]) == pytest.approx(0.5, abs=0.03)
    assert 0 < kinds["slip"] < 0.05 * sum(kinds.values())


def test_verdicts_against_a_walk_along_python_s_sums():
    """Also steps that no demonstrator writes: moved, repeated, made up, corrected."""
    rng = random.Random(0)
    seen = set()
    for i in range(1500):
        row = arithmetic.demonstration(i, quality=0.6)
        steps = row["response"].split("\n")
        if i % 3 == 0:
            steps = rng.sample(steps, len(steps))
        if i % 5 == 0:
            steps.insert(
                rng.randrange(len(steps)),
                rng.choice(["nonsense", "so 7", "1+1=2", *arithmetic.truth(row["prompt"])]),
            )
        values = true_values(row["prompt"])
        done = 0
        for step, verdict in zip(steps, arithmetic.verdicts(row["prompt"], steps), strict=True):
            expected = "negative"
            parts = EQUATION.fullmatch(step)
            if parts and done < len(values) - 1:
                change = values[done + 1] - values[done]
                if tuple(map(int, parts.groups())) == (values[done], change, values[done + 1]):
                    expected = "positive"
                    done = done + 1
            elif step == f"answer {values[-1]}":
                expected = "positive"
            elif step == f"so {values[done]}":
                expected = "neutral"
            assert verdict == expected, (row, step)
            seen.add((verdict, step.split(" ")[0] if not parts else "sum"))
    assert seen >= {
        ("positive", "sum"),
        ("negative", "sum"),
        ("neutral", "so"),
        ("negative", "so"),
    }


def test_a_right_answer_can_come_of_wrong_steps():
    """A forgotten carry and a forgotten borrow undo one another."""
    steps = ["27+8=25", "25-9=26", "answer 26"]
    assert arithmetic.verdicts("27+8-9", steps) == ["negative", "negative", "positive"]
    assert arithmetic.solved("27+8-9", "\n".join(steps)) and not arithmetic.solved(
        "27+8-9", "answer 25"
    )
    assert arithmetic.until_wrong(arithmetic.verdicts("27+8-9", steps)) == ["negative", None, None]
    assert arithmetic.until_wrong(["positive", "neutral"]) == ["positive", "neutral"]


def test_arithmetic_is_a_source_of_text_chats_prompts_and_steps():
    for schema in ("text", "chat", "prompt", "steps"):
        source = open_source("arithmetic", schema, "train", seed=3)
        assert source[7] == source[7] == records.SCHEMAS[schema](source[7])
        assert source[7] != open_source("arithmetic", schema, "heldout", seed=3)[7]
    source = open_source("arithmetic", "prompt", "heldout")
    assert number(f"so the answer is {eval(source[0]['prompt'][0]['content'])}", source[0]) == 1.0
    assert number("answer 1000", source[0]) == 0.0
    with pytest.raises(
        UserError, match="arithmetic: has no comparison records, only text, chat, prompt, steps"
    ):
        open_source("arithmetic", "comparison", "train")
    with pytest.raises(UserError, match="world: has no steps records"):
        open_source("world", "steps", "train")
