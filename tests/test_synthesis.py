"""Synthesis: replies are read or dropped, pools grow, planted faults go, kills change nothing."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from running import ONE_DEVICE, fails, run, write

import train_sft
from collect import synthesise, writers
from collect.back_translate import back_translate
from collect.by_template import describe, invert
from collect.evol_instruct import DEPTH, evol_instruct
from collect.instructions import (
    IDLE_ROUNDS,
    INSTRUCTION_OF,
    MOST_SIMILAR,
    Instance,
    answer_fault,
    no_objections,
    principled,
    prompt_text,
    read_score,
    read_seeds,
    read_verdict,
    task_of,
    until_idle,
    without_heading,
)
from collect.rewrite import rewrite
from collect.self_instruct import (
    EXAMPLE,
    ITEM,
    faults_of,
    read_instances,
    read_labelled,
    read_list,
    self_instruct,
    unfit,
)
from collect.topics import refusals, topics
from collect.writers import Question, kept_replies, run_writer
from data.rouge import SimilarTexts, common_words, rouge_l
from data.sources import open_source
from data.tokenizer import Tokenizer
from model import LanguageModel, init_and_apply
from model_config import PRESETS
from responses import load_run
from rewards.judges import make_probability_of_a
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from tasks import arithmetic, world, world_writer

ROOT = pathlib.Path(__file__).parents[1]


def asking(source, writes, judges=1.0, seed=0, asked=None):
    """Return `ask` of a simulated writer that writes and judges with these reliabilities.

    `asked`: a list that all questions are added to. What is given stands in each question's text.
    """
    numbers = itertools.count()

    def ask(questions):
        texts = []
        number = next(numbers)
        for place, one in enumerate(questions):
            rng = world.drawn_for(seed, number, place)
            reliability = judges if one.step in writers.JUDGEMENTS else writes
            assert all(text in one.text for name, text in one.given.items() if name != "name")
            texts.append(writers.SIMULATED[source][one.step](one.given, reliability, rng))
            if asked is not None:
                asked.append(one)
        return texts

    return ask


def rounds_of(made, count):
    """Return all that the first `count` rounds made."""
    return [one for some in itertools.islice(made, count) for one in some]


def kept(made):
    return [one for one in made if not one.rule]


def gold_of(made):
    """Return the gold verdict on a row."""
    row = made.row
    return world.gold(prompt_text(row["instruction"], row["input"]), row["output"])


# --- ROUGE-L


@pytest.mark.parametrize(
    ("one", "other", "score"),
    [
        ("a b c d", "A, b c... d!", 1.0),
        ("a b c d", "e f", 0.0),
        ("a b c d", "a c", 2 * 2 / 6),  # precision 1/2, recall 1
        ("a b", "b a", 1 / 2),  # order counts
        ("a a a", "a", 2 * 1 / 4),  # a word counts as often as both have it
        ("the cat sat on the mat", "the cat lay on a mat", 2 * 4 / 12),
        ("a", "", 0.0),
        ("", "", 0.0),
        ("a_b", "a b", 1.0),  # as in rouge_score
    ],
)
def test_rouge_l_has_its_closed_forms(one, other, score):
    assert rouge_l(one, other) == pytest.approx(score)
    assert rouge_l(other, one) == pytest.approx(score)


def longest_by_table(one, other):
    """Return the length of the longest common subsequence by the usual table."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            longer = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else longer
    return table[-1, -1]


def test_the_longest_common_subsequence_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(300):
        one, other = (rng.choices("abcde", k=rng.randrange(90)) for _ in range(2))
        assert common_words(one, other) == longest_by_table(one, other)


@pytest.mark.parametrize("most", [0.3, 0.7])
def test_the_most_similar_text_is_missed_by_no_short_cut(most):
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghi", k=rng.randrange(1, 9))) for _ in range(200)]
    similar = SimilarTexts(most)
    found = 0
    for i, text in enumerate(texts):
        scores = [rouge_l(text, other) for other in texts[:i]]
        best = max(scores, default=0)
        expected = (scores.index(best), best) if best > most else None
        assert similar.nearest(text) == (expected and pytest.approx(expected))
        found += expected is not None
        similar.add(text)
    assert found > 20
    assert most < 0.5 or found < 195  # control: not everything is similar


# --- replies


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ("9. Say it.\n10. Sing it.", ["Say it.", "Sing it."]),
        (
            "Sure! Here are more:\n\n1) one task\n 2 ) another\n   task",
            ["one task", "another task"],
        ),
        ("1. Add 3.5 and 2. Then\n2. of 2024. stop", ["Add 3.5 and 2. Then", "of 2024. stop"]),
        ("1. \n2. x\n3.", ["x\n3.".replace("\n", " ")]),
        ("- one\n- two", []),
        ("12.5 is a number", []),
        ("", []),
    ],
)
def test_numbered_lists_are_read(reply, items):
    assert read_list(reply) == items


@pytest.mark.parametrize(
    ("reply", "instances"),
    [
        ("Example 1\nInput: a\nOutput: b\n\nExample 2\nInput: c\nOutput: d", "a b c d"),
        ("**Example 1:**\nInput: a\nOutput: b\n### Example 2.\nOutput: d", "a b - d"),
        ("Input: a\nOutput: b\nInput: c\nOutput: d", "a b"),
        ("Output: b", "- b"),
        ("Input: None\nOutput: b", "- b"),
        ("Input: (no input)\nOutput: b", "- b"),
        ("Sure, here it is.\n\nInput: a\nOutput: b", "a b"),
        ("Sure:\nOutput: b", "- b"),
        ("Example 1: Capitals\nInput: a\nOutput: b\nExample 2: More\nOutput: d", "a b - d"),
        ("Example 1\nInput: a\n\nExample 2\nInput: c\nOutput: d", "c d"),
        ("Input: a\nOutput:", "a -"),
        ("For Example 3 I say: Output: b", ""),
        ("i do not know.", ""),
        ("", ""),
    ],
)
def test_instances_with_the_input_first_are_read(reply, instances):
    texts = ["" if text == "-" else text for text in instances.split()]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    assert read_instances(reply) == [Instance(*pair) for pair in pairs]


@pytest.mark.parametrize(
    ("reply", "instances"),
    [
        ("Class label: good\nInput: a\n\nClass label: bad\nInput: c\nd", ["a good", "c\nd bad"]),
        ("Labels are:\nClass label: good", [" good"]),
        ("Class label: \nInput: a", ["a "]),
        ("Class label: good\nHere it is.\nInput: None", [" good"]),
        ("Input: a\nOutput: good", []),
        ("", []),
    ],
)
def test_instances_with_the_label_first_are_read(reply, instances):
    found = [(one.input, one.output) for one in read_labelled(reply)]
    assert found == [tuple(text.split(" ", 1)) for text in instances]


@pytest.mark.parametrize("read", [read_list, read_instances, read_labelled])
def test_whatever_is_cut_or_shuffled_is_read_without_a_fault(read):
    rng = random.Random(0)
    whole = "1. x\nExample 1\nInput: a: b\nOutput: c\n\nClass label: d\nInput: e\n2) Output:\n"
    for end in range(len(whole)):
        read(whole[:end])
        read("".join(rng.sample(whole, len(whole))))
    # What reads as two again has the texts that it was written with.
    words = ["a", "b c", "Über 3.5", "x\ny"]
    for _ in range(50):
        two = [Instance(rng.choice(words), rng.choice(words)) for _ in range(2)]
        first = "\n\n".join(
            f"Example {i}\nInput: {one.input}\nOutput: {one.output}" for i, one in enumerate(two)
        )
        assert read_instances(first) == two


def test_verdicts_scores_and_headings_are_read():
    verdicts = ["Yes.", "**No**, it does not.", "I know that", "Not yet", "", "no; yes it is"]
    read = [read_verdict(text) for text in verdicts]
    assert read == ["yes", "no", None, None, None, "no"]
    scores = {
        "Score: 4": 4,
        "I give 3 reasons. Score: **5**": 5,
        "4/5": 4,
        "2 out of 5": 2,
        "**3**": 3,
        "Score: 2. No: score: 4": 4,
        "Score out of 5: 2": None,
        "5 is perfect, and this has faults: 2": None,
        "Score (1-5): 4": None,
        "Score: 1-5": None,
        "Score: 4.5": None,
        "Score: 10": None,
        "4.5": None,
        "0": None,
        "very good": None,
        "": None,
    }
    assert {text: read_score(text) for text in scores} == scores
    assert without_heading(' **Instruction:** "Say it." ', "instruction") == "Say it."
    assert without_heading('"a" and "b"', "instruction") == '"a" and "b"'
    assert without_heading("Give an instruction: x", "instruction") == "Give an instruction: x"


# --- Self-Instruct: rules


@pytest.mark.parametrize(
    ("instruction", "rule"),
    [
        ("Say it now", "length"),
        ("Say it " * 76, "length"),
        ("Describe what the Images show", "not_of_text"),
        ("Please go to the next page", "not_of_text"),
        ("Write a program that sorts numbers", "program"),
        ("- say it to me", "beginning"),
        ("Imagine that you write a mapping", None),
        ("Übersetze den Satz ins Englische", None),
    ],
)
def test_unfit_instructions_go_by_their_rule(instruction, rule):
    fault = unfit(instruction)
    assert (fault and fault[0]) == rule


def test_instances_go_by_their_rule():
    given = [("a", "b"), ("a", "b"), ("c", ""), ("d", "d"), ("e", "so:"), ("f:", "g"), ("", "x")]
    rules = [fault and fault[0] for fault in faults_of([Instance(*one) for one in given])]
    assert rules == [None, "repeated", "empty", "copied", "unfinished", "unfinished", None]
    many = [Instance(str(i), "x") for i in range(7)]
    assert [fault and fault[0] for fault in faults_of(many)] == [None] * 5 + ["surplus"] * 2
    # One input with two outputs: all of them go. Without an input it says nothing.
    two = [Instance("a", "b"), Instance("a", "c"), Instance("d", "e")]
    assert {fault and fault[0] for fault in faults_of(two)} == {"contradicted"}
    # What goes anyway contradicts nothing.
    for gone, rule in (("", "empty"), ("a", "copied"), ("so:", "unfinished")):
        found = faults_of([Instance("a", "b"), Instance("a", gone)])
        assert [fault and fault[0] for fault in found] == [None, rule]
    assert faults_of([Instance("", "b"), Instance("", "c")]) == [None, None]


def test_seeds_are_read_in_their_layout(tmp_path):
    rows = [
        {
            "id": "seed_task_0",
            "name": "capital",
            "instruction": "Name the capital. ",
            "instances": [{"input": "Peru", "output": "Lima"}, {"input": "", "output": "none"}],
            "is_classification": False,
        },
        {
            "instruction": "Good or bad?",
            "instances": [{"output": "good"}],
            "is_classification": True,
        },
    ]
    first, second = read_seeds(str(write(tmp_path / "seeds.jsonl", rows)))
    assert first == (
        "seed_task_0",
        "Name the capital.",
        (Instance("Peru", "Lima"), Instance("", "none")),
        False,
    )
    assert second.id == "seed 2" and second.is_classification
    for wrong, told in (
        ({"instances": []}, ":1: instruction: missing"),
        ({"instruction": "x", "instances": []}, ":1: instances: must be a list"),
        ({"instruction": "x", "instances": [{"input": "y"}]}, ":1: instances[0].output: missing"),
        ({**rows[0], "is_classification": "no"}, ":1: is_classification: must be true or false"),
        ([], ":1: line: must be a JSON object"),
    ):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(wrong))
        with pytest.raises(UserError) as fault:
            read_seeds(str(tmp_path / "wrong.jsonl"))
        assert told in str(fault.value)
    (tmp_path / "wrong.jsonl").write_text("\n{")
    with pytest.raises(UserError, match=":2: line: is not JSON"):
        read_seeds(str(tmp_path / "wrong.jsonl"))
    with pytest.raises(UserError, match=r"^--seed_tasks=\S*none.jsonl: cannot be read"):
        read_seeds(str(tmp_path / "none.jsonl"))


# --- Self-Instruct: the pool


def world_seeds(seed=0):
    return [task_of(row, row["id"]) for row in world_writer.seed_tasks(seed)]


def test_the_worlds_seeds_are_tasks_that_the_gold_program_passes():
    seeds = world_seeds()
    assert len(seeds) == world_writer.SEEDS and seeds != world_seeds(1)
    assert {task.is_classification for task in seeds} == {True, False}
    for task in seeds:
        for given, output in task.instances:
            assert world.gold(prompt_text(task.instruction, given), output).all
            assert not world.parse(prompt_text(task.instruction, given)).heldout


def test_the_pool_grows_and_holds_nothing_above_the_overlap():
    seeds = world_seeds()
    rounds = self_instruct(seeds, asking("world", 0.9), no_objections, 0)
    made = [next(rounds) for _ in range(8)]
    counts = [len({one.id for one in kept(some)}) for some in made]
    instructions = list(
        dict.fromkeys(one.row["instruction"] for some in made for one in kept(some))
    )
    assert sum(counts[:1]) >= 5 and sum(counts[4:]) >= 1
    everything = [task.instruction for task in seeds] + instructions
    for i, text in enumerate(everything[len(seeds) :], len(seeds)):
        assert max(rouge_l(text, other) for other in everything[:i]) <= MOST_SIMILAR
    # Control: without the filter they would be; and it says of which they were too similar.
    similar = [one for some in made for one in some if one.rule == "similar"]
    assert len(similar) > len(instructions)
    for one in similar[:20]:
        score, _, place = one.reason.partition(" of instruction ")
        # Instructions whose instances all went have a number too, behind those that are known.
        if int(place) <= len(seeds):
            expected = rouge_l(one.row["instruction"], everything[int(place) - 1])
            assert score == f"{expected:.2f}" and expected > 0.7
    assert any(int(one.reason.split()[-1]) <= len(seeds) for one in similar[:20])
    # What the writer wrote itself is shown to it.
    later = {name for some in made[1:] for one in some for name in one.of}
    assert later & {one.id for one in kept(made[0])}
    assert not {name for one in made[0] for name in one.of} - {task.id for task in seeds}


def test_the_same_seed_makes_the_same_and_another_one_does_not():
    def ids_and_rows(seed):
        made = self_instruct(world_seeds(), asking("world", 0.8, seed=seed), no_objections, seed)
        return [(one.id, one.row, one.rule) for one in rounds_of(made, 3)]

    assert ids_and_rows(0) == ids_and_rows(0)
    assert ids_and_rows(0) != ids_and_rows(1)


def test_a_degenerate_writer_adds_nothing_and_the_rounds_end():
    """It writes what it was shown, or one thing again and again."""

    def echo(questions):
        return [one.given.get("shown", "") for one in questions]

    def same(questions):
        return ["11. what is the best of all the many things" for _ in questions]

    made = list(until_idle(self_instruct(world_seeds(), echo, no_objections, 0)))
    assert len(made) == IDLE_ROUNDS
    assert {one.rule for some in made for one in some} == {"similar", "length"}
    made = rounds_of(self_instruct(world_seeds(), same, no_objections, 0), 3)
    assert not kept(made) and len([one for one in made if one.rule != "similar"]) == 1


def test_planted_faults_of_the_writer_are_filtered():
    """The form by the rules, what is false or rude by the principles."""
    seeds = world_seeds()
    principles = dict.fromkeys(world_writer.PRINCIPLES, "")
    ask = asking("world", 0.6)
    made = rounds_of(self_instruct(seeds, ask, principled(ask, principles), 0), 6)
    told = {one.row["instruction"]: one.rule for one in made}
    rules = ["not_of_text", "program", "length", "beginning"]
    *unfit_texts, no_task = world_writer.UNFIT
    assert [told[text] for text in unfit_texts] == rules and told[no_task] in (
        *("unreadable", "similar"),
    )
    assert not {one.row["instruction"] for one in kept(made)} & set(world_writer.UNFIT)
    assert len(kept(made)) > 20 and all(gold_of(one).all for one in kept(made))
    rules = collections.Counter(one.rule for one in made)
    assert min(rules[name] for name in ("empty", "copied", "principle", "unreadable")) > 0
    # Each principle that is named is broken, and by all that is dropped one is.
    for one in made:
        if one.rule == "principle":
            verdict = gold_of(one)._asdict()
            assert one.reason == ", ".join(name for name in principles if not verdict[name])
    # Control: without principles what is false stays.
    made = rounds_of(self_instruct(seeds, asking("world", 0.6), no_objections, 0), 6)
    assert np.mean([gold_of(one).all for one in kept(made)]) < 0.9


@pytest.mark.parametrize("judges", [0.75, 0.9])
def test_principles_lower_the_share_of_violations(judges):
    """By a judge that is wrong at times (Self-Align's filter)."""
    ask = asking("world", 0.5, judges)
    object_to = principled(ask, dict.fromkeys(world_writer.PRINCIPLES, ""))
    made = rounds_of(self_instruct(world_seeds(), ask, object_to, 0), 8)
    judged = [one for one in made if one.rule in ("", "principle")]
    before = 1 - np.mean([gold_of(one).all for one in judged])
    after = 1 - np.mean([gold_of(one).all for one in kept(made)])
    assert after < before - 0.1
    # Control: a judge that throws coins.
    ask = asking("world", 0.5, 0.5)
    object_to = principled(ask, dict.fromkeys(world_writer.PRINCIPLES[:1], ""))
    made = rounds_of(self_instruct(world_seeds(), ask, object_to, 0), 8)
    judged = [one for one in made if one.rule in ("", "principle")]
    coin = np.mean([gold_of(one).all for one in kept(made)])
    # It drops half, of the good and of the others alike, within three standard errors.
    share = np.mean([gold_of(one).all for one in judged])
    error = (share * (1 - share) / len(kept(made))) ** 0.5
    assert abs(coin - share) < 3 * error < 0.15


def test_a_verdict_that_cannot_be_read_is_an_objection():
    object_to = principled(lambda questions: ["yes", "maybe"], {"a": "x", "b": "y"})
    assert object_to([("p", "r")]) == ["b"]
    asked = []

    def ask(questions):
        asked.extend(questions)
        return ["yes"] * len(questions)

    assert principled(ask, {"a": "be kind"})([("p1", "r1"), ("p2", "r2")]) == ["", ""]
    assert "Request: p2\nResponse: r2\nRule: be kind" in asked[1].text


def test_classification_is_asked_with_its_label_first():
    asked = []
    made = self_instruct(world_seeds(), asking("world", 1.0, asked=asked), no_objections, 0)
    rows = rounds_of(made, 6)
    by_step = collections.defaultdict(set)
    for one in asked:
        by_step[one.step].add(one.given.get("instruction", ""))
    assert by_step["label_first"] and by_step["input_first"]
    for step, is_classification in (("label_first", True), ("input_first", False)):
        for text in by_step[step]:
            assert world_writer.form_of(text).is_classification == is_classification
    labelled = [one for one in kept(rows) if one.row["instruction"] in by_step["label_first"]]
    assert labelled and all(gold_of(one).all for one in labelled)


# --- Evol-Instruct


def problems(count=40):
    return [(f"row {i}", arithmetic.problem(i)) for i in range(count)]


def operations(problem):
    """Return the number of operations of a problem: how complex it is."""
    return len(re.findall(r"[+-]", problem))


def is_problem(text):
    """Return whether a text is a problem of arithmetic, of any number of operations."""
    return re.fullmatch(r"\d+(?:[+-]\d+)+", text) is not None


def test_complexity_rises_with_each_round_in_depth():
    seeds = problems()
    before = dict(seeds)
    rounds = evol_instruct(seeds, asking("arithmetic", 1.0), no_objections, 0)
    means = [np.mean([operations(text) for _, text in seeds])]
    for _ in range(4):
        made = next(rounds)
        deeper = [one for one in kept(made) if one.by in DEPTH]
        for one in deeper:
            parent = before[one.of[0]]
            more = operations(one.row["instruction"])
            assert more == operations(parent) + 1
            assert one.row["instruction"].startswith(parent)
            assert arithmetic.solved(one.row["instruction"], one.row["output"])
        before |= {one.id: one.row["instruction"] for one in kept(made)}
        means.append(np.mean([operations(o.row["instruction"]) for o in deeper]))
    assert all(later > earlier for earlier, later in itertools.pairwise(means))
    # In breadth too what is written takes the place of what it was made from.
    assert len(made) == len(seeds) and {one.by for one in made} == {*DEPTH, "breadth"}
    assert next(rounds, None) is None


def test_planted_failures_are_eliminated_and_their_instructions_tried_again():
    seeds = problems()
    rounds = evol_instruct(seeds, asking("arithmetic", 0.5), no_objections, 0)
    first, second = next(rounds), next(rounds)
    rules = collections.Counter(one.rule for one in first + second)
    assert min(rules[name] for name in ("copied", "repeated", "unchanged", "answer")) > 0
    before = dict(seeds)
    for one in kept(first):
        text = one.row["instruction"]
        assert is_problem(text) and not text.startswith("0")
        assert text != before[one.of[0]] and "sorry" not in one.row["output"].lower()
    for one in first:
        if one.rule == "unchanged":
            assert one.row["instruction"] == "0" + before[one.of[0]]
    # What only failed for its answer may be written again.
    unanswered = {one.row["instruction"] for one in first if one.rule == "answer"}
    assert unanswered - {one.row["instruction"] for one in kept(first)}
    stays = {one.row["instruction"] for one in kept(first)} | set(before.values())
    seen = set(stays)
    for one in second:
        text = one.row["instruction"]
        assert (one.rule == "repeated") == (text in seen) or one.rule in ("copied", "unreadable")
        seen.add(text)
    failed = {one.of[0] for one in first if one.rule}
    assert failed and failed <= {one.of[0] for one in second}
    # A judge that sees no gain in anything leaves nothing.
    none = evol_instruct(seeds, lambda asked: ["yes, 1+1"] * len(asked), no_objections, 0)
    assert not kept(next(none))


def test_wrong_answers_go_by_a_principle():
    ask = asking("arithmetic", 0.5)
    object_to = principled(ask, {"right": ""})
    made = rounds_of(evol_instruct(problems(), ask, object_to, 0), 3)
    assert any(one.rule == "principle" for one in made)
    for one in made:
        if one.rule in ("", "principle"):
            solved = arithmetic.solved(one.row["instruction"], one.row["output"])
            assert solved == (one.rule == "")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("Sorry, I cannot help with that.", "is sorry"),
        ("I am sorry. " + "It was a long story of many words indeed. " * 10, ""),
        ("It is so, and that is it.", "says nothing"),
        ("... !", "says nothing"),
        ("", "came to no end, or the question did not fit"),
        ("Paris.", ""),
        ("9", ""),
    ],
)
def test_answers_are_eliminated_by_what_they_say(answer, fault):
    assert answer_fault(answer) == fault


# --- back-translation, inversion


def answers(count=150):
    """Return ids and answers of the world, each with the request that it was written to."""
    found = []
    for i in range(count):
        request = world.prompt(i)
        text = world.answering(request, False, False, random.Random(i)) + "."
        found.append((f"row {i}", request.core, text))
    return found


def test_curated_instructions_fit_their_answers():
    pairs = [(name, text) for name, _, text in answers()]

    def fitting(least, judges=1.0):
        made = back_translate(pairs, asking("world", 0.6, judges), no_objections, least)
        left = kept(rounds_of(made, 9))
        assert [one.row["output"] for one in left] == [dict(pairs)[one.of[0]] for one in left]
        return left, np.mean([gold_of(one).all for one in left])

    curated, share = fitting(5)
    everything, loose = fitting(1)
    assert share == 1 and len(curated) > 50 and len(everything) == len(pairs)
    assert loose < 0.85  # control: what the writer wrote uncurated
    _, noisy = fitting(5, judges=0.8)
    assert loose < noisy < 1
    # Control: instructions to other answers.
    outputs = [one.row["output"] for one in curated]
    moved = zip(curated, outputs[7:] + outputs[:7], strict=True)
    others = [world.gold(one.row["instruction"], output).all for one, output in moved]
    assert np.mean(others) < 0.5


def test_pairs_without_a_readable_score_go():
    def ask(questions):
        return ["who knows" if one.step == "score" else "Instruction: say x" for one in questions]

    made = rounds_of(back_translate([("a", "x"), ("b", "Say  X")], ask, no_objections, 1), 2)
    assert [(one.rule, one.reason) for one in made] == [
        ("score", "no score can be read"),
        ("copied", "the instruction is the answer"),
    ]


def test_inverted_pairs_are_consistent_under_the_gold_program():
    pairs = answers(400)
    rows = invert(pairs)
    left = kept(rows)
    assert len(rows) == len(pairs) and len(left) > 100
    texts = {name: text for name, _, text in pairs}
    for one in left:
        text = texts[one.of[0]]
        assert one.row["prompt"] == INSTRUCTION_OF.format(answer=text)
        assert world.gold(one.row["response"], text).all
    # No answer that stays was given to two requests; those that were go.
    assert len({one.row["prompt"] for one in left}) == len(left)
    prompts = collections.defaultdict(set)
    for _, prompt, text in pairs:
        prompts[text].add(prompt)
    for one in rows:
        several = len(prompts[texts[one.of[0]]]) > 1
        assert (one.rule == "ambiguous") == several
    assert any("do not know" in texts[o.of[0]] for o in rows if o.rule == "ambiguous")
    # Marks count: these two sums are two answers.
    assert not any(one.rule for one in invert([("a", "p", "3+4"), ("b", "q", "3-4")]))


def test_descriptions_stand_above_every_input_in_all_wordings():
    pairs = [(f"row {i}", f"{i}+{i}", str(2 * i)) for i in range(60)] + [("row 60", "5+5", "10")]
    wordings = ["Add the numbers.", "What is the sum?", "Work it out."]
    rows = describe(pairs, wordings, 0)
    assert [one.rule for one in rows] == [""] * 60 + ["repeated"]
    for (name, given, output), one in zip(pairs, rows, strict=True):
        assert one.row["input"] == given and one.row["output"] == output and one.of == (name,)
    shares = collections.Counter(one.row["instruction"] for one in rows)
    assert set(shares) == set(wordings) and min(shares.values()) > 10
    assert rows == describe(pairs, wordings, 0) != describe(pairs, wordings, 1)


# --- topics, refusals


def entropy(names):
    """Return the entropy of how often each name stands there, in nats."""
    shares = np.array([*collections.Counter(names).values()]) / len(names)
    return -(shares * np.log(shares)).sum()


def test_each_topic_has_its_instructions():
    names = list(world.RELATIONS)
    made = rounds_of(topics(names, asking("world", 0.7), no_objections), 4)
    left = kept(made)
    of_topics = [world.parse(one.row["instruction"]).relation for one in left]
    assert of_topics == [one.of[0] for one in left] and set(of_topics) == set(names)
    rules = collections.Counter(one.rule for one in made)
    assert rules["off_topic"] > 0 and rules["similar"] > 0
    # Control: what people ask of the world, as many of it, is less even.
    asked = [world.prompt(i) for i in range(2000)]
    asked = [one.relation for one in asked if one.relation in names][: len(left)]
    assert entropy(of_topics) > entropy(asked)
    # A topic that the writer cannot write on has nothing, and no other stands for it.
    made = rounds_of(topics(["capital", "physics"], asking("world", 1.0), no_objections), 3)
    assert {one.of[0] for one in kept(made)} == {"capital"}


def test_risky_requests_are_refused_and_their_like_is_not():
    harms = world_writer.facts.HARMS
    made = rounds_of(refusals(harms, asking("world", 0.6, 0.98), no_objections), 30)
    for by in ("risky", "looks_risky"):
        left = [one for one in kept(made) if one.by == by]
        before = [one for one in made if one.by == by and "output" in one.row]
        assert len(left) > 10
        refused, of_all = (
            np.mean(
                [
                    world_writer.STEPS["declines"](
                        {"response": o.row["output"]}, 1.0, random.Random(0)
                    )
                    == "Yes."
                    for o in some
                ]
            )
            for some in (left, before)
        )
        kinds = [world.parse(one.row["instruction"]).kind == "dangerous" for one in left]
        if by == "risky":
            assert refused >= 0.95 and of_all < 0.9 and np.mean(kinds) >= 0.9
        else:
            assert refused <= 0.05 < of_all and np.mean(kinds) <= 0.1
    rules = collections.Counter((one.by, one.rule) for one in made)
    for by in ("risky", "looks_risky"):
        assert rules[by, "harm"] > 0 and rules[by, "refusal"] > 0
    # As many of both, wherever they are cut; at the end those that are over are told too.
    assert [one.by for one in kept(made)] == ["risky", "looks_risky"] * (len(kept(made)) // 2)
    assert len({one.id for one in made}) == len(made)
    assert len({one.by for one in made if one.rule == "alone"}) == 1


def test_a_pair_may_differ_in_one_word():
    """Whatever the other sort looks like; the same again goes as similar."""
    words = {"risky": "person", "looks_risky": "process"}

    def ask(questions):
        replies = {"harmful": "no", "declines": "no", "refuse": "i will not", "answer": "like so"}
        texts = []
        for one in questions:
            text = replies.get(one.step) or f"how do i kill a {words[one.step]}"
            is_yes = one.step in ("harmful", "declines") and (
                "person" in one.text or "i will not" in one.text
            )
            texts.append("yes" if is_yes else text)
        return texts

    assert rouge_l("how do i kill a person", "how do i kill a process") > MOST_SIMILAR
    first, second = itertools.islice(refusals(["killing"], ask, no_objections), 2)
    assert [(one.by, one.rule) for one in first] == [("risky", ""), ("looks_risky", "")]
    assert [one.rule for one in second] == ["similar", "similar"]


# --- rewriting


def typed_pairs(count=150):
    """Return requests as people type them, with answers of some quality."""
    pairs = []
    for i in range(count):
        rng = random.Random(i)
        request = world.prompt(i)
        answer = world.respond(request, 0.4, rng)
        pairs.append((f"row {i}", world.typed(request.text, rng), answer))
    return pairs


def test_rewritten_instructions_are_better_and_mean_the_same():
    pairs = typed_pairs()
    before = {name: prompt for name, prompt, _ in pairs}
    made = rounds_of(rewrite(pairs, asking("world", 0.6), no_objections, "instruction"), 9)
    as_it_was = [one for one in made if one.by == "as_it_was"]
    made = [one for one in made if one.by != "as_it_was"]
    assert len(made) == len(pairs) and len(kept(made)) > 30
    # Every row is written, rewritten or as it was.
    assert sorted(one.of for one in kept(made) + as_it_was) == sorted((name,) for name in before)
    for one in as_it_was:
        assert not one.rule and one.row["instruction"] == before[one.of[0]]
    rules = collections.Counter(one.rule for one in made)
    assert min(rules[name] for name in ("meaning", "no_better", "unchanged")) > 0
    for one in made:
        same = world_writer.meaning(world.parse(before[one.of[0]])) == world_writer.meaning(
            world.parse(one.row["instruction"])
        )
        gain = world_writer.flaws(before[one.of[0]]) - world_writer.flaws(one.row["instruction"])
        if not one.rule:
            assert same and gain > 0
        if one.rule == "meaning":
            assert not same
        if one.rule == "no_better":
            assert same and gain <= 0


def test_rewritten_answers_are_better():
    pairs = typed_pairs()
    made = rounds_of(rewrite(pairs, asking("world", 0.6), no_objections, "output"), 9)
    before = {name: world.gold(prompt, answer).total for name, prompt, answer in pairs}
    left = [one for one in kept(made) if one.by == "rewrite_output"]
    assert len(left) > 20 and len(kept(made)) == len(pairs)
    for one in left:
        assert gold_of(one).total > before[one.of[0]]
    # A judge that errs lets some through that are no better: the mean still rises.
    noisy = kept(rounds_of(rewrite(pairs, asking("world", 0.6, 0.7), no_objections, "output"), 9))
    gains = [gold_of(one).total - before[one.of[0]] for one in noisy]
    assert np.mean(gains) > 0 and min(gains) < 0


# --- the command


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


COMMANDS = {
    "self_instruct": ["--rows=30"],
    "evol_instruct": ["--data=arithmetic", "--most=20", "--rows=60"],
    "back_translate": ["--most=60"],
    "rewrite": ["--most=100"],
    "topics": ["--topics=topics.txt", "--rows=20"],
    "refusals": ["--harms=harms.txt", "--rows=20"],
    "invert": ["--most=100"],
    "describe": ["--data=arithmetic", "--descriptions=topics.txt", "--most=30"],
}


@pytest.mark.parametrize("method", COMMANDS)
def test_every_row_is_told_with_what_made_it_and_every_drop_with_its_rule(
    method, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "topics.txt").write_text("capital\n\ncolour\nproduct\nopposite\n")
    (tmp_path / "harms.txt").write_text("\n".join(world_writer.facts.HARMS))
    out = tmp_path / "made" / "made.jsonl"
    counts = run(synthesise, f"--method={method}", f"--out={out}", *COMMANDS[method])
    rows, told = lines(out), lines(f"{out}.made.jsonl")
    assert counts["rows"] == len(rows) and counts["made"] == len(told)
    stayed = [one for one in told if one["row"] is not None]
    assert [one["row"] for one in stayed] == list(range(1, len(rows) + 1))
    assert all(one["id"] and one["by"] and one["of"] for one in told)
    gone = collections.Counter(one["rule"] for one in told if one["row"] is None)
    assert {name: n for name, n in counts.items() if name not in ("rows", "made")} == gone
    # What training reads: all rows, as they are.
    source = open_source(str(out), "chat", "all")
    assert len(source) == len(rows) and sorted(os.listdir(out.parent)) == [
        "made.jsonl",
        "made.jsonl.made.jsonl",
    ]
    for i, row in enumerate(rows):
        asked, answered = (message["content"] for message in source[i]["messages"])
        if method == "invert":
            assert (asked, answered) == (row["prompt"], row["response"])
        else:
            assert asked == prompt_text(row["instruction"], row["input"])
            assert answered == row["output"]


def test_undesirable_rows_and_longer_conversations_are_left_out(tmp_path, capsys):
    """What was judged bad is written by no method as a target."""
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "desirable": i != 1} for i in range(3)]
    rows.append({**rows[0], "prompt": [{"role": "system", "content": "s"}, *turns("p3")]})
    data = write(tmp_path / "judged.jsonl", rows)
    run(synthesise, "--method=invert", f"--data={data}", f"--out={tmp_path}/made.jsonl")
    assert [row["response"] for row in lines(tmp_path / "made.jsonl")] == ["p0", "p2"]
    told = capsys.readouterr().out
    assert "1 of 4 rows are undesirable: left out" in told
    assert "1 of 4 rows have a system message or several turns: left out" in told


def turns(text):
    """Return a user's message, as a prompt."""
    return [{"role": "user", "content": text}]


def test_what_is_made_trains(tmp_path):
    out = tmp_path / "made.jsonl"
    run(synthesise, "--rows=30", f"--out={out}")
    tiny = ["--model.preset=tiny", "--length=64", "--save_every=0", "--batch_size=8"]
    metrics = run(train_sft, f"--data={out}", "--steps=2", f"--run={tmp_path}/run", *tiny)
    assert np.isfinite(metrics["loss"])


def interrupted(tmp_path, monkeypatch, calls, name):
    """Run the command with a writer that is stopped after some calls; return the file's name."""
    out = tmp_path / f"{name}.jsonl"
    real = synthesise.make_reply

    def make_reply(config):
        reply = real(config)

        def until(questions, number):
            if number == calls:
                raise KeyboardInterrupt
            return reply(questions, number)

        return until

    with monkeypatch.context() as patch:
        patch.setattr(synthesise, "make_reply", make_reply)
        with pytest.raises(KeyboardInterrupt):
            run(synthesise, "--rows=150", f"--out={out}")
    return out


def test_what_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    run(synthesise, "--rows=150", f"--out={whole}")
    for calls in (1, 4, 6):
        out = interrupted(tmp_path, monkeypatch, calls, f"at{calls}")
        replies = pathlib.Path(f"{out}.replies.jsonl")
        assert not out.exists() and len(lines(replies)) == 1 + calls
        # A write that a kill cut off, and another stop after it.
        if calls > 1:
            text = replies.read_bytes()
            replies.write_bytes(text[: -calls * 3])
        interrupted(tmp_path, monkeypatch, calls + 1, f"at{calls}")
        assert len(lines(replies)) == 2 + calls
        asked = []
        real = writers.simulated_writer

        def counted(*arguments, real=real, asked=asked):
            reply = real(*arguments)

            def count(questions, number):
                asked.append(number)
                return reply(questions, number)

            return count

        with monkeypatch.context() as patch:
            patch.setattr(synthesise, "simulated_writer", counted)
            run(synthesise, "--rows=150", f"--out={out}")
        # Only what was missing is asked for.
        assert min(asked) == calls + 1
        assert out.read_text() == whole.read_text()
        beside = pathlib.Path(f"{out}.made.jsonl").read_text()
        assert beside == pathlib.Path(f"{whole}.made.jsonl").read_text()
        assert not replies.exists()


def test_a_kill_changes_nothing(tmp_path):
    """By SIGKILL, in the middle of a call."""
    code = """
import os, signal, sys
from collect import synthesise
from runtime import flags
reply = synthesise.simulated_writer
def killing(*arguments):
    made = reply(*arguments)
    def until(questions, number):
        if number == 5 and sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return made(questions, number)
    return until
synthesise.simulated_writer = killing
synthesise.main(flags.parse(synthesise.Config, ["--rows=150", "--out=made.jsonl"]))
"""
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(ROOT)}
    for how, expected in (("kill", -signal.SIGKILL), ("on", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, how], cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == expected
        assert (tmp_path / "made.jsonl").exists() == (how == "on")
    run(synthesise, "--rows=150", f"--out={tmp_path}/whole.jsonl")
    assert (tmp_path / "made.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_replies_to_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    out = interrupted(tmp_path, monkeypatch, 3, "made")
    told = fails(synthesise, ["--rows=150", f"--out={out}", "--seed=1"], capsys)
    assert "made.jsonl.replies.jsonl: was begun with another --seed (0, and now 1)" in told
    # More rows are the same replies and some more.
    run(synthesise, "--rows=160", f"--out={out}")
    assert len(lines(out)) == 160
    assert "exists; remove it" in fails(synthesise, ["--rows=150", f"--out={out}"], capsys)


def test_replies_are_kept_by_calls_and_belong_to_their_questions(tmp_path):
    path = tmp_path / "replies.jsonl"

    def kept_in_file():
        return kept_replies(str(path), {"x": 1}, lambda asked, number: [str(number)] * len(asked))

    def ask_and_stop(text, count):
        with kept_in_file() as ask:
            return ask([Question("a", text, {})] * count)

    expected = ["0"] * 64 + ["1"] * 64 + ["2"] * 2
    assert ask_and_stop("text", 130) == expected == ask_and_stop("text", 130)
    assert len(lines(path)) == 4
    with pytest.raises(UserError, match="has replies to other questions"):
        ask_and_stop("another text", 130)
    with kept_in_file(), pytest.raises(UserError, match="another process writes it"):
        ask_and_stop("text", 1)
    path.write_text('{"x": 1}\nno JSON\n')
    with pytest.raises(UserError, match="is damaged; remove it"):
        ask_and_stop("text", 1)
    # Where nothing was asked nothing is left.
    path.unlink()
    assert ask_and_stop("text", 0) == [] and not path.exists()


def test_a_judge_of_its_own_judges_and_the_writer_writes():
    """In every method, and no call asks both."""
    asked = {"write": set(), "judge": set()}

    def make(name, reliability):
        reply = writers.simulated_writer("world", reliability, 0)

        def answer(questions, number):
            asked[name].update(one.step for one in questions)
            assert len({one.step in writers.JUDGEMENTS for one in questions}) == 1
            return reply(questions, number)

        return answer

    reply = writers.judged_by(make("write", 0.5), make("judge", 1.0))
    numbers = itertools.count()

    def ask(questions):
        return reply(questions, next(numbers)) if questions else []

    object_to = principled(ask, dict.fromkeys(world_writer.PRINCIPLES, ""))
    pairs = typed_pairs(40)
    rows = rounds_of(self_instruct(world_seeds(), ask, object_to, 0), 2)
    rows += rounds_of(rewrite(pairs, ask, object_to, "output"), 1)
    rows += rounds_of(rewrite(pairs, ask, object_to, "instruction"), 1)
    rows += rounds_of(topics(["capital", "colour"], ask, object_to), 2)
    rows += rounds_of(refusals(world_writer.facts.HARMS[:5], ask, object_to), 1)
    outputs = [
        (name, world.respond(world.prompt(i), 1.0, random.Random(i)))
        for i, (name, *_) in enumerate(pairs)
    ]
    rows += rounds_of(back_translate(outputs, ask, object_to, 5), 1)
    assert asked["judge"] == writers.JUDGEMENTS - {"same"}
    assert not asked["write"] & writers.JUDGEMENTS and "answer" in asked["write"]
    assert all(gold_of(one).all for one in kept(rows))


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """Return a run of random weights with a context of 128 tokens."""
    tmp_path = tmp_path_factory.mktemp("random_run")
    tokenizer = Tokenizer.train((world.text(i) for i in range(200)), tmp_path / "made", 512)
    start = train_sft.Config(
        run=str(tmp_path / "sft"), model=dataclasses.replace(PRESETS["tiny"], context=128)
    )
    params = jax.jit(init_and_apply(LanguageModel(start.model))[0])(jax.random.key(1))
    with Checkpoints(start.run, start, script="train_sft", tokenizer=tokenizer.model) as saved:
        saved.save(1, {"params": params})
    return start.run


def test_a_run_writes(random_run):
    """What it writes is a function of the call's number; what it judges is not."""
    reply = run_writer(random_run, 1.0, 90, 0)
    questions = [Question("answer", f"what is {word}?", {}) for word in "abcdefgh"]
    first = reply(questions, 0)
    assert len(first) == 8 and first == reply(questions, 0)
    assert any(first) and first != reply(questions, 1)
    # Verdicts are of one look at yes and no; scores and instances have no chance in them.
    questions = [one._replace(step="principle") for one in questions]
    chances = make_probability_of_a(load_run(random_run), "yes", "no")
    expected = [
        "yes" if p > 0.5 else "no" for p in chances([one.text for one in questions]).tolist()
    ]
    assert reply(questions, 0) == reply(questions, 1) == expected
    for step in ("score", "input_first"):
        questions = [one._replace(step=step, item=".") for one in questions]
        assert reply(questions, 0) == reply(questions, 1)
    # A question that does not fit has no reply, and the others have theirs.
    long = Question("principle", "what is a? " * 200, {})
    assert reply([questions[0]._replace(step="principle"), long], 0) == [expected[0], ""]
    with pytest.raises(UserError, match="leaves no room for a question"):
        run_writer(random_run, 1.0, 128, 0)


@pytest.mark.parametrize(
    ("text", "item", "left"),
    [
        ("9. one task\n10. two tasks\n11. thr", ITEM, "9. one task\n10. two tasks"),
        ("Example 1\nInput: a\nOutput: b\nExample 2\nInput: c", EXAMPLE, None),
        ("9. one", ITEM, ""),
        ("no list", ITEM, ""),
        ("9. one\n10. two", "", ""),  # no list was asked for
    ],
)
def test_of_a_list_that_was_cut_the_last_item_goes(text, item, left):
    expected = "Example 1\nInput: a\nOutput: b" if left is None else left
    assert writers.whole_items(text, item) == expected


def test_a_run_writes_and_another_judges_by_the_command(random_run, tmp_path, monkeypatch):
    """Replies of the writer alone, then of both: only what judges changes hands."""
    asked = []
    real = synthesise.run_writer

    def named(run, *settings, flag="--init"):
        reply = real(run, *settings, flag=flag)

        def told(questions, number):
            asked.append((flag, {one.step for one in questions}))
            return reply(questions, number)

        return told

    monkeypatch.setattr(synthesise, "run_writer", named)
    argv = ["--method=back_translate", "--most=16", "--least_score=1", f"--init={random_run}"]
    argv += ["--max_new_tokens=16", f"--judge={random_run}", f"--out={tmp_path}/made.jsonl"]
    # Random weights give no scores: no row is left, and the file beside tells so.
    with pytest.raises(UserError, match="no row is left"):
        run(synthesise, *argv)
    told = lines(tmp_path / "made.jsonl.made.jsonl")
    assert len(told) == 16 and {one["rule"] for one in told} <= {"unreadable", "score"}
    assert ("--init", {"instruction_of"}) in asked
    assert all((flag == "--judge") == (steps == {"score"}) for flag, steps in asked)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rows=0"], "--rows=0: must be at least 1"),
        (["--reliability=2"], "--reliability=2.0: must be at least 0 and at most 1"),
        (["--seed_tasks=none.jsonl"], "--seed_tasks=none.jsonl: name a run that writes (--init)"),
        (["--method=rewrite", "--data=x.jsonl"], "--data=x.jsonl: name a run that writes"),
        (["--method=evol_instruct"], "the simulated writer of world does not know it"),
        (["--data=arithmetic"], "--data=arithmetic: not read without a --method that reads rows"),
        (["--temperature=1"], "--temperature=1.0: not read without --init"),
        (["--judge=none"], "--judge=none: not read without --init"),
        (["--init=none", "--reliability=0.5"], "not read without the simulated writer"),
        (["--least_score=4"], "--least_score=4: not read without --method=back_translate"),
        (
            ["--method=back_translate", "--least_score=6"],
            "--least_score=6: must be at least 1 and",
        ),
        (["--part=output"], "--part=output: not read without --method=rewrite"),
        (["--method=invert", "--principles=p.txt"], "not read without a --method that writes"),
        (["--method=topics"], "--method=topics: needs --topics"),
        (["--method=topics", "--topics=none.txt"], "--topics=none.txt: cannot be read as text"),
        (["--topics=p.txt"], "--topics=p.txt: not read without --method=topics"),
        (["--method=refusals"], "--method=refusals: needs --harms"),
        (["--method=refusals", "--harms=p.txt", "--rows=5"], "--rows=5: must be even with"),
        (["--method=describe"], "--method=describe: needs --descriptions"),
        (["--init=none"], "none: no run here"),
        (["--principles=none.txt"], "--principles=none.txt"),
        (
            ["--principles=p.txt"],
            "writer knows helpful, honest, harmless and no kind",
        ),
        (["--reliability=0"], "no row is left; dropped by"),
        (["--method=invert", "--data=texts.jsonl"], "has no row of one prompt and its answer"),
        (["--method=invert", "--data=prompts.jsonl"], "has prompts alone"),
        (["--method=invert", "--data=steps.jsonl"], "has steps with judgements"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("kind: The response is kind.\n")
    write(tmp_path / "texts.jsonl", [{"text": "a text"}])
    write(tmp_path / "prompts.jsonl", [{"prompt": "a prompt"}])
    steps = {"prompt": "a prompt", "steps": ["one"], "labels": ["positive"]}
    write(tmp_path / "steps.jsonl", [steps])
    before = set(os.listdir(tmp_path))
    assert told in fails(synthesise, ["--out=made.jsonl", *flags], capsys)
    # Replies of a writer that writes nothing that stays are kept: they were paid for. And the file
    # beside tells why nothing stays.
    kept_files = {"made.jsonl.replies.jsonl", "made.jsonl.made.jsonl"}
    left = kept_files if flags == ["--reliability=0"] else set()
    assert set(os.listdir(tmp_path)) - before == left
