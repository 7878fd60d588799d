"""KTO: the response that estimates the KL answers another prompt, however the rows lie."""

import pytest

from data.preferences import with_mismatched
from data.sources import Source
from experiments.contrastive.batches import with_other_prompts
from runtime.errors import UserError


def prompt(text):
    return [{"role": "user", "content": text}]


def judged(*prompts):
    """Return a source of one judged response to each prompt, which names its prompt."""
    rows = [
        {"prompt": prompt(text), "response": f"{text} {i}", "desirable": i % 2 == 0}
        for i, text in enumerate(prompts)
    ]
    return Source("rows", range(len(rows)), rows.__getitem__)


LAYOUTS = {
    "good ones, then bad ones, odd": [*map(str, range(31)), *map(str, range(31))],
    "and even": [*map(str, range(30)), *map(str, range(30))],
    "two prompts of four": ["a"] * 4 + ["b"] * 4,
    "one stranger": ["a"] * 9 + ["b"],
    "alternating": ["a", "b"] * 7,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_mismatched_response_is_to_the_same_prompt(name):
    source = judged(*LAYOUTS[name])
    made = with_mismatched(source)
    for i in range(len(source)):
        mismatched = made[i]["responses"][-1]
        assert mismatched.split()[0] != source[i]["prompt"][0]["content"]
        assert made[i]["ranking"][-1] == 0 and made[i] == made[i]


def test_contrasts_are_between_prompts_that_differ():
    rows = [
        {"prompt": prompt(text), "responses": ["x", "y"], "ranking": [1, 2]}
        for text in ["a", "b", "a", "a", "c", "a", "b", "b", "a"]
    ]
    source = Source("rows", range(len(rows)), rows.__getitem__)
    made = with_other_prompts(source, 3)
    for i in range(len(source)):
        contents = [asked[0]["content"] for asked in made[i]["prompts"]]
        assert contents[0] == rows[i]["prompt"][0]["content"] and len(set(contents)) == 3
    with pytest.raises(UserError, match=r"too few different prompts \(3\)"):
        with_other_prompts(source, 4)[0]


@pytest.mark.parametrize("count", [1, 3])
def test_one_prompt_alone_has_no_other(count):
    with pytest.raises(
        UserError, match=r"rows: too few different prompts.*add rows with other prompts"
    ):
        with_mismatched(judged(*["a"] * count))


def test_a_held_out_split_of_one_prompt_takes_others_from_the_training_split():
    made = with_mismatched(judged("a", "a"), others=judged("b", "c", "a"))
    assert {made[i]["responses"][-1][0] for i in range(2)} <= {"b", "c"}
    with pytest.raises(UserError, match=r"too few different prompts \(1\)"):
        with_mismatched(judged("a", "a"), others=judged("a"))
