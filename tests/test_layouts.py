"""Small files as people bring them: each is read, or refused in one line; and docs/data.md's rows.

What they must give was laid down before the readers were written; rows of public data sets and of
public bug reports are their models.
"""

import json
import pathlib
import re

import pytest

from data.fields import FieldError
from data.formats import whole
from data.preparing import rows_and_records
from data.records import LAYOUTS, SCHEMAS, layout_of, without_nulls
from data.trees import best_path, ranked_replies
from runtime.errors import UserError

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "data.md"


def said(role, content, **keys):
    return {"role": role, "content": content, **keys}


def records_of(path, schema):
    def stop(fault):
        raise UserError(fault)

    return [record for _, record in rows_and_records([whole(path)], schema, stop, stop)]


def talk(*contents):
    return [said(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages, **fields):
    return {"messages": list(messages), **fields}


def pair(prompt, chosen="a", rejected="b", rank=2):
    return {"prompt": talk(prompt), "responses": [chosen, rejected], "ranking": [1, rank]}


def hh(prompt, response, end="\n"):
    return f"{end}{end}Human: {prompt}{end}{end}Assistant: {response}"


def solved(*labels):
    texts = ["good"] if len(labels) == 1 else ["a", "b"]
    return {"prompt": talk("p"), "steps": texts, "labels": list(labels)}


def prm(*completions, **more):
    stage = {"completions": list(completions), "chosen_completion": 0, **more}
    return lines({"question": {"problem": "p"}, "label": {"steps": [stage]}})


QA = chat(*talk("q", "a"))
PLAIN = lines(QA)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = said("assistant", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', weight=0)
TOLD = said("user", "<tool_response>\n3\n</tool_response>")
HUMAN = {"text": "good", "rating": None, "source": "human", "flagged": False}

# By schema: (case, file, the first record or the beginning of the refusal).
CASES = {
    "chat": [
        (
            "a JSON array instead of lines",
            json.dumps([QA, QA]).encode(),
            "1: line: must be",
        ),
        (
            "Alpaca with empty output",
            lines({"instruction": "a", "input": "", "output": ""}),
            "1: output: is empty",
        ),
        (
            "Alpaca with input null",
            lines({"instruction": "a", "input": None, "output": "y"}),
            chat(*talk("a", "y")),
        ),
        (
            "content null beside calls of tools",
            lines(
                chat(
                    said("user", "w?"),
                    said("assistant", None, tool_calls=[CALL]),
                    said("tool", "3", tool_call_id="1"),
                    said("assistant", "3"),
                )
            ),
            chat(said("user", "w?"), CALLED, TOLD, said("assistant", "3")),
        ),
        ("blank lines and lines of spaces", PLAIN + b"\n  \n" + PLAIN, QA),
        ("a byte order mark", b"\xef\xbb\xbf" + PLAIN, QA),
        ("content a number", lines(chat(*talk(5, "a"))), "1: messages[0].content: must be a str"),
        (
            "content as parts",
            lines(chat(*talk([{"type": "text", "text": "q"}], [{"type": "text", "text": "a"}]))),
            QA,
        ),
        ("CRLF", PLAIN.replace(b"\n", b"\r\n"), QA),
        (
            "a developer's role",
            lines(chat(said("developer", "d"), *talk("q", "a"))),
            chat(said("system", "d"), *talk("q", "a")),
        ),
        (
            "a key twice",
            b'{"prompt": "first", "prompt": "second", "response": "x"}\n',
            "1: prompt: stands twice",
        ),
        (
            "an empty assistant's turn in the middle",
            lines(chat(*talk("q", "", "r", "a"))),
            "1: messages[1].content: is empty",
        ),
        ("ends with the user", lines(chat(*talk("q", "a", "r"))), "1: messages: the last turn"),
        ("an escaped NUL", lines(chat(*talk("a\0b", "x"))), chat(*talk("a\0b", "x"))),
        ("indented", json.dumps(QA, indent=1).encode(), "1: line: is not JSON"),
        (
            "Latin-1",
            b'{"messages": [{"content": "caf\xe9"}]}\n',
            "1: line: is not UTF-8",
        ),
        ("half a surrogate in a key", lines({"\ud83d": 1, **QA}), QA),
        ("messages as JSON text", lines({"messages": json.dumps(QA["messages"])}), QA),
        ("no newline at the end", PLAIN.rstrip(), QA),
        ("NULs of a crashed writer", PLAIN + b"\0" * 64, "2: line: holds NULs alone"),
        ("5,000 digits", b'{"id": ' + b"9" * 5000 + b"}\n", "1: line: holds a number of too many"),
        (
            "spaces around texts",
            lines({"prompt": "p ", "response": " r"}),
            chat(*talk("p ", " r")),
        ),
        ("a role in capitals", lines(chat(said("User", "q"))), "1: messages[0].role: must be"),
        (
            "ShareGPT",
            lines(
                {
                    "conversations": [
                        {"from": "human", "value": "q"},
                        {"from": "gpt", "value": "a"},
                    ]
                }
            ),
            QA,
        ),
        (
            "a system's turn in the middle",
            lines(chat(*talk("q"), said("system", "s"), said("assistant", "a"))),
            "1: messages[1].role: must be",
        ),
        (
            "a system's turn alone",
            lines(chat(said("system", "s"), said("assistant", "a"))),
            chat(said("system", "s"), said("assistant", "a")),
        ),
        (
            "a column of tools",
            lines(chat(*talk("q", "a"), tools=[{"name": "f"}])),
            chat(said("system", '<tools>\n{"name": "f"}\n</tools>'), *talk("q", "a")),
        ),
        ("a line cut off", PLAIN + PLAIN[:50], "2: line: is not JSON"),
        (
            "two users in a row",
            lines(chat(said("user", "p"), *talk("q", "a"))),
            chat(said("user", "p"), *talk("q", "a")),
        ),
        ("UTF-16", PLAIN.decode().encode("utf-16"), "1: line: is not UTF-8"),
        (
            "a turn of weight 0",
            lines(
                chat(
                    *talk("q"),
                    said("assistant", "bad", weight=0),
                    said("user", "again"),
                    said("assistant", "good", weight=1),
                )
            ),
            chat(*talk("q"), said("assistant", "bad", weight=0), *talk("again", "good")),
        ),
        # Two names for one thing.
        (
            "two answers",
            lines({"question": "q", "answer": "a", "response": "b"}),
            "1: response: differs from answer; keep one",
        ),
        ("two answers alike", lines({"question": "q", "answer": "a", "response": "a"}), QA),
        ("two answers, one empty", lines({"question": "q", "answer": "a", "response": ""}), QA),
        (
            "two conversations",
            lines({"messages": talk("q", "a"), "conversations": talk("q", "b")}),
            "1: conversations: differs from messages; keep one",
        ),
        (
            "a row that is not trained on",
            lines({**QA, "train": False}),
            "1: train: is False",
        ),
        ("a row of half a weight", lines({**QA, "weight": 0.5}), "1: weight: is not read here"),
        ("a row of weight 1", lines({**QA, "weight": 1, "train": True}), QA),
        ("a row of weight 0", lines({**QA, "weight": 0}), "1: weight: is 0: the row is"),
    ],
    "comparison": [
        (
            "HH with CRLF",
            lines({"chosen": hh("q", "x", "\r\n"), "rejected": hh("q", "y", "\r\n")}),
            "1: chosen: must be a transcript",
        ),
        (
            "HH with two prompts",
            lines({"chosen": hh("a", "x"), "rejected": hh("b", "y")}),
            "1: rejected: must be the conversation of chosen",
        ),
        (
            "HH with Human: quoted",
            lines({"chosen": hh("q\nHuman: hi", "x"), "rejected": hh("q\nHuman: hi", "y")}),
            pair("q\nHuman: hi", "x", "y"),
        ),
        (
            "a margin that is no number",
            b'{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}\n',
            "1: margin: must be a number",
        ),
        (
            "Orca's pairs",
            lines({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}),
            {**pair("q"), "prompt": [said("system", "s"), *talk("q")]},
        ),
        (
            "ranks with a point",
            lines({"prompt": "q", "responses": ["a", "b"], "ranking": [1.0, 2.0]}),
            "1: ranking: must be 2 whole numbers",
        ),
        (
            "ranks from 0",
            lines({"prompt": "q", "responses": ["a", "b"], "ranking": [0, 1]}),
            "1: ranking: must be 2 whole numbers",
        ),
        (
            "ranks with gaps",
            lines({"prompt": "q", "responses": ["a", "b", "c"], "ranking": [1, 3, 3]}),
            {"prompt": talk("q"), "responses": ["a", "b", "c"], "ranking": [1, 3, 3]},
        ),
        (
            "TRL's turns",
            lines(
                {
                    "prompt": talk("q"),
                    "chosen": [said("assistant", "a")],
                    "rejected": [said("assistant", "b")],
                }
            ),
            pair("q"),
        ),
        (
            "UltraFeedback, equal sides",
            lines({"prompt": "q", "chosen": talk("q", "a"), "rejected": talk("q", "a")}),
            pair("q", "a", "a", rank=1),
        ),
        (
            "an arena's conversations that part early",
            lines(
                {
                    "conversation_a": talk("q", "a", "r", "a"),
                    "conversation_b": talk("q", "b", "r", "b"),
                    "winner": "model_a",
                }
            ),
            "1: conversation_b: must be the conversation of conversation_a",
        ),
        (
            "an arena's unknown winner",
            lines({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "both"}),
            "1: winner: must be 0, 1, or one of model_a, model_b",
        ),
        (
            "PKU, the second is better",
            lines({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}),
            {"prompt": talk("q"), "responses": ["a", "b"], "ranking": [2, 1]},
        ),
        (
            "PKU, a third is better",
            lines({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}),
            "1: better_response_id: must be 0, 1",
        ),
        (
            "an article's summaries, the second is chosen",
            lines(
                {
                    "info": {"article": "It rained.", "post": None},
                    "summaries": [{"text": "Dry."}, {"text": "Wet."}],
                    "choice": 1,
                }
            ),
            {
                "prompt": talk("It rained.\n\nTL;DR:"),
                "responses": ["Dry.", "Wet."],
                "ranking": [2, 1],
            },
        ),
        (
            "summaries of nothing",
            lines({"info": {"id": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}),
            "1: info.article: must be a string",
        ),
        (
            "a summary alone",
            lines({"info": {"article": "x"}, "summaries": [{"text": "a"}], "choice": 0}),
            "1: summaries: must be a list of two",
        ),
        (
            "SHP, B is better",
            lines({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}),
            {"prompt": talk("q"), "responses": ["a", "b"], "ranking": [2, 1]},
        ),
        (
            "UltraFeedback without a score",
            lines({"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]}),
            "1: completions[0].overall_score: must be a number",
        ),
        (
            "an input that no prompt has",
            lines({"prompt": "q", "input": "i", "chosen": "a", "rejected": "b"}),
            "1: input: is not read here",
        ),
    ],
    "prompt": [
        (
            "an empty response",
            lines({"prompt": "q", "response": ""}),
            {"prompt": talk("q")},
        ),
        (
            "verl",
            lines(
                {
                    "data_source": "gsm8k",
                    "prompt": talk("q"),
                    "reward_model": {"style": "rule", "ground_truth": "4"},
                }
            ),
            {"prompt": talk("q"), "answer": "4"},
        ),
        (
            "two requests",
            lines({"prompt": "q", "question": "r"}),
            "1: question: differs from prompt; keep one",
        ),
        (
            "SHP",
            lines({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}),
            {"prompt": talk("q"), "answer": "a"},
        ),
    ],
    "steps": [
        (
            "a label that is a list",
            lines({"prompt": "p", "steps": ["a"], "labels": [[1]]}),
            "1: labels[0]: must be positive",
        ),
        ("PRM800K, null for a completion", prm(None), "1: label.steps[0].completions[0]: must be"),
        ("PRM800K, null for a text", prm({"text": None, "rating": 1}), "1: label.steps[0]: must"),
        (
            "PRM800K, a human's step",
            prm({"text": "bad", "rating": -1}, human_completion=HUMAN, chosen_completion=None),
            solved("positive"),
        ),
        (
            "PRM800K, a human's text",
            prm(human_completion="good", chosen_completion=None),
            solved("positive"),
        ),
        (
            "PRM800K, a rating that is a list",
            prm({"text": "a", "rating": [1]}),
            "1: label.steps[0]: rating must be",
        ),
        ("PRM800K, a rating of true", prm({"text": "good", "rating": True}), solved("positive")),
        (
            "TRL's steps",
            lines({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}),
            solved("positive", "negative"),
        ),
    ],
    "unpaired": [
        (
            "TRL's turns",
            lines(
                {
                    "prompt": talk("q"),
                    "completion": [said("assistant", "x")],
                    "label": True,
                }
            ),
            {"prompt": talk("q"), "response": "x", "desirable": True},
        ),
        (
            "a label that is a text",
            lines({"prompt": "q", "completion": "x", "label": "true"}),
            "1: label: must be true or false",
        ),
    ],
}


@pytest.mark.parametrize(
    ("schema", "content", "wanted"),
    [
        pytest.param(schema, content, wanted, id=f"{schema}: {name}")
        for schema, cases in CASES.items()
        for name, content, wanted in cases
    ],
)
def test_a_file_is_read_or_refused(tmp_path, schema, content, wanted):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    if isinstance(wanted, dict):
        assert records_of(path, schema)[0] == wanted
        # Adapting again changes nothing.
        assert SCHEMAS[schema](wanted) == wanted
        return
    with pytest.raises(UserError) as fault:
        records_of(path, schema)
    assert str(fault.value).startswith(f"{path}:{wanted}") and "\n" not in str(fault.value)


def test_an_array_of_the_same_rows_is_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([QA, QA]))
    assert records_of(path, "chat") == [QA, QA]


# ---- The examples of docs/data.md ----


def examples(text):
    """Return (schema, row, record) of each example of the page."""
    found = []
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        schema = section.split("\n", 1)[0]
        for row, record in re.findall(r"^```text\n(.*)\n=> (.*)\n```$", section, re.MULTILINE):
            found.append((schema, json.loads(row), json.loads(record)))
    return found


@pytest.mark.parametrize(("schema", "row", "record"), examples(PAGE.read_text()))
def test_an_example_of_the_page_is_read_so(schema, row, record):
    assert SCHEMAS[schema](row) == record


def test_the_page_has_an_example_of_each_way_to_read_a_row():
    """Every reader of every schema, by the layout that the page's rows are read by."""
    shown = set()
    for schema, row, _ in examples(PAGE.read_text()):
        fields = without_nulls(row)
        if schema == "text" and "text" not in fields:
            continue
        shown.add((schema, layout_of(fields, schema).read.__name__))
    # A layout that another one's page shows, of the same fields, is not shown twice.
    all_readers = {
        (schema, layout.read.__name__) for schema, layouts in LAYOUTS.items() for layout in layouts
    }
    assert all_readers - shown <= {
        ("comparison", "read_pair_after_messages"),
        ("prompt", "read_prompt_of_chat"),
    }


# ---- Trees ----


def node(role, text, *replies, **keys):
    return {"role": role, "text": text, "replies": list(replies), **keys}


def test_the_best_replies_of_a_tree_are_a_conversation():
    tree = node(
        "prompter",
        "q",
        node("assistant", "second", rank=1),
        node(
            "assistant",
            "first",
            node("prompter", "gone", node("assistant", "x"), deleted=True),
            node("prompter", "more", node("assistant", "late"), node("assistant", "best", rank=0)),
            rank=0,
        ),
        node("assistant", "unranked", node("prompter", "and?")),
    )
    contents = [message["content"] for message in best_path(tree, "prompt")]
    assert contents == ["q", "first", "more", "best"]
    prompt, responses, ranks = ranked_replies(tree, "prompt")
    assert (prompt, responses, ranks) == (talk("q"), ["second", "first"], [2, 1])
    # A conversation ends with an answer.
    tree["replies"] = [node("assistant", "a", node("prompter", "no answer"))]
    assert best_path(tree, "prompt") == talk("q", "a")


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (node("prompter", "q"), "prompt.replies: holds no answer"),
        (node("prompter", "q", node("bot", "a")), "prompt.replies[0].role: must be"),
        (node("prompter", "q", node("assistant", " ")), "prompt.replies[0].text: is empty"),
        (node("prompter", "q", node("assistant", "a", rank="0")), "prompt.replies[0].rank: must"),
        ({**node("prompter", "q"), "replies": ["a"]}, "prompt.replies: must be a list"),
    ],
)
def test_a_broken_tree_is_named_by_its_place(tree, reason):
    with pytest.raises(FieldError) as fault:
        best_path(tree, "prompt")
    assert str(fault.value).startswith(reason)


def test_replies_without_ranks_are_no_comparison():
    tree = node("prompter", "q", node("assistant", "a", rank=0), node("assistant", "b"))
    with pytest.raises(FieldError, match=r"prompt\.replies: must be two or more with ranks"):
        ranked_replies(tree, "prompt")
