"""Rows in the layouts that people publish: each is read as meant, or refused by field and reason.

What would change what is trained on is honoured or refused, never left out in silence.
"""

import json

import pytest

from data.fields import FieldError, changes_training
from data.records import SCHEMAS, unread_fields
from data.tokenizer import Tokenizer

NAMES = {"s": "system", "u": "user", "a": "assistant", "-": "assistant"}


def turns(text):
    """Return the messages of "u:asked a:said -:not trained on", contents without spaces."""
    found = []
    for part in text.split(" "):
        who, content = part.split(":", 1)
        found.append({"role": NAMES[who], "content": content})
        if who == "-":
            found[-1]["weight"] = 0
    return found


def said(role, content, **keys):
    return {"role": role, "content": content, **keys}


ASKED = said("user", "q")
TOLD = said("assistant", "a")
BAD = said("assistant", "b")
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
HH = "\n\nHuman: q\n\nAssistant: "


def said_by(who, content):
    return {"from": who, "value": content}


def chat(*messages, **fields):
    return {"messages": list(messages), **fields}


CHAT = [
    # Contents and keys of messages.
    (chat(said("developer", "s"), ASKED, TOLD), "s:s u:q a:a"),
    (chat(said("system", ""), ASKED, TOLD), "u:q a:a"),
    (chat(said("user", [{"type": "text", "text": "q"}]), TOLD), "u:q a:a"),
    (chat(said("user", ["q", {"text": "r"}]), TOLD), "u:q\nr a:a"),
    ({"messages": json.dumps([ASKED, TOLD])}, "u:q a:a"),
    (chat({**ASKED, "name": None, "from": None}, {**TOLD, "weight": None}), "u:q a:a"),
    (chat(said("system", "s"), TOLD), "s:s a:a"),
    (chat(ASKED, ASKED, TOLD), "u:q u:q a:a"),
    (chat(TOLD, ASKED, TOLD), "a:a u:q a:a"),
    # Turns that are not trained on, and what follows the last one that is.
    (chat(ASKED, {**BAD, "weight": 0}, ASKED, {**TOLD, "weight": 1}), "u:q -:b u:q a:a"),
    (chat(ASKED, {**BAD, "train": False}, ASKED, TOLD), "u:q -:b u:q a:a"),
    (chat(ASKED, {**BAD, "loss": False}, ASKED, TOLD), "u:q -:b u:q a:a"),
    (chat(ASKED, {**BAD, "masked": True}, ASKED, TOLD), "u:q -:b u:q a:a"),
    (chat(ASKED, TOLD, ASKED, {**BAD, "weight": 0.0}), "u:q a:a"),
    (chat({**ASKED, "weight": 0}, TOLD), "u:q a:a"),
    # ShareGPT, and other names of a conversation.
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "u:q a:a",
    ),
    ({"conversations": [ASKED, TOLD], "system": "s"}, "s:s u:q a:a"),
    ({"conversation": [ASKED, TOLD], "prompt": None}, "u:q a:a"),
    # A request and its answer, under other names.
    ({"prompt": [ASKED], "completion": [TOLD], "messages": None}, "u:q a:a"),
    ({"prompt": "q", "completion": [ASKED, TOLD]}, "u:q a:a"),
    ({"instruction": "i", "input": None, "output": "a"}, "u:i a:a"),
    ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, "u:i\n\nc a:a"),
    ({"system_prompt": "s", "question": "q", "response": "a"}, "s:s u:q a:a"),
    ({"problem": "q", "solution": "a", "level": "5"}, "u:q a:a"),
    ({"query": "q", "response": "a", "type": "GSM"}, "u:q a:a"),
    ({"inputs": "q", "targets": "a"}, "u:q a:a"),
    ({"question": "q", "answer": 4, "train_on_input": False}, "u:q a:4"),
    ({"prompt": HH, "response": "a", "chosen": None, "rejected": None}, "u:q a:a"),
    ({"instruction": "i", "output": "a", "history": [["q", "b"]]}, "u:q a:b u:i a:a"),
    # Fields that change nothing.
    ({"prompt": "q", "response": "a", "weight": 1, "train": True, "tools": []}, "u:q a:a"),
    (
        {"prompt": "q", "response": "a", "image_id": 3, "num_tools": 2, "mask": None},
        "u:q a:a",
    ),
    # A comparison's best response.
    ({"chosen": HH + "a", "rejected": HH + "b"}, "u:q a:a"),
]


@pytest.mark.parametrize(("row", "wanted"), CHAT)
def test_conversations_are_read(row, wanted):
    found = SCHEMAS["chat"](row)
    assert found == {"messages": turns(wanted)}
    # Adapting again changes nothing.
    assert SCHEMAS["chat"](found) == found


def test_tools_become_text_that_is_not_trained_on():
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    wanted = [
        said("system", 's\n\n<tools>\n{"name": "f"}\n</tools>'),
        ASKED,
        said("assistant", call, weight=0),
        said("user", "<tool_response>\n3\n</tool_response>"),
        TOLD,
    ]
    by_openai = [
        said("system", "s"),
        ASKED,
        said("assistant", None, tool_calls=[CALL]),
        said("tool", "3", tool_call_id="1"),
        TOLD,
    ]
    by_function = [*by_openai[:2], said("assistant", "", function_call=CALL["function"])]
    by_sharegpt = [
        said_by("human", "q"),
        said_by("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        said_by("observation", "3"),
        said_by("gpt", "a"),
    ]
    tools = [{"name": "f"}]
    for row in (
        chat(*by_openai, tools=tools),
        chat(*by_function, said("function", "3"), TOLD, tools=json.dumps(tools)),
        {"conversations": by_sharegpt, "system": "s", "tools": tools},
    ):
        found = SCHEMAS["chat"](row)["messages"]
        assert found == wanted
        assert SCHEMAS["chat"]({"messages": found})["messages"] == wanted

    # A call that says so itself is trained on.
    trained = chat(ASKED, said("assistant", "so", tool_calls=[CALL], weight=1))
    assert SCHEMAS["chat"](trained) == {"messages": [ASKED, said("assistant", f"so\n{call}")]}


def test_a_turn_of_weight_0_has_no_loss(tmp_path):
    tokenizer = Tokenizer.train(["q a b" * 9], tmp_path, 300)
    record = SCHEMAS["chat"](chat(ASKED, {**BAD, "weight": 0}, ASKED, TOLD))
    tokens, mask = tokenizer.chat(record["messages"])
    learnt = [token for token, counts in zip(tokens, mask, strict=True) if counts]
    assert learnt == [*tokenizer.encode("a"), tokenizer.eos]
    # Control: with its weight the turn is learnt too, and its tokens are there either way.
    with_it, whole = tokenizer.chat(turns("u:q a:b u:q a:a"))
    assert with_it == tokens and sum(whole) == 2 * len(learnt)


PAIR = {"prompt": turns("u:q"), "responses": ["a", "b"], "ranking": [1, 2]}
OTHERS = [
    ("comparison", {"prompt": [ASKED], "chosen": [TOLD], "rejected": [BAD]}, PAIR),
    ("comparison", {"prompt": "q", "chosen": TOLD, "rejected": BAD}, PAIR),
    ("comparison", {"prompt": "q", "chosen": [ASKED, TOLD], "rejected": [ASKED, BAD]}, PAIR),
    ("comparison", {"prompt": "q", "chosen": HH + "a", "rejected": HH + "b"}, PAIR),
    ("comparison", {"prompt": HH, "chosen": "a", "rejected": "b"}, PAIR),
    ("comparison", {"question": "q", "chosen": "a", "rejected": "b", "system": ""}, PAIR),
    ("comparison", {"messages": [ASKED], "chosen": TOLD, "rejected": BAD}, PAIR),
    (
        "comparison",
        {"conversations": [ASKED], "chosen": json.dumps([TOLD]), "rejected": json.dumps([BAD])},
        PAIR,
    ),
    (
        "comparison",
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {**PAIR, "prompt": turns("s:s u:q")},
    ),
    (
        "comparison",
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "a"},
        {"prompt": turns("u:q\n\ni"), "responses": ["a", "a"], "ranking": [1, 1]},
    ),
    (
        "unpaired",
        {"prompt": [ASKED], "completion": [TOLD], "label": True},
        {"prompt": turns("u:q"), "response": "a", "desirable": True},
    ),
    (
        "unpaired",
        chat(ASKED, TOLD, label=False),
        {"prompt": turns("u:q"), "response": "a", "desirable": False},
    ),
    ("prompt", {"prompt": "q", "response": ""}, {"prompt": turns("u:q")}),
    ("prompt", {"prompt": "q", "answer": 42}, {"prompt": turns("u:q"), "answer": "42"}),
    ("prompt", {"prompt": "q", "solution": "4"}, {"prompt": turns("u:q"), "answer": "4"}),
    ("prompt", {"prompt": "q", "ground_truth": -1.5}, {"prompt": turns("u:q"), "answer": "-1.5"}),
    (
        "prompt",
        {"prompt": [ASKED], "reward_model": {"style": "rule", "ground_truth": "4"}},
        {"prompt": turns("u:q"), "answer": "4"},
    ),
    (
        "prompt",
        {"problem": "q", "solution": "so 4", "answer": "4"},
        {"prompt": turns("u:q"), "answer": "4"},
    ),
    ("prompt", {"prompt": "q", "completion": "a", "label": False}, {"prompt": turns("u:q")}),
    (
        "prompt",
        {"instruction": "q", "input": "i", "output": "", "text": "all of it"},
        {"prompt": turns("u:q\n\ni")},
    ),
    ("prompt", chat(ASKED, {**BAD, "weight": 0}, ASKED), {"prompt": turns("u:q -:b u:q")}),
    (
        "steps",
        {"prompt": "q", "completions": ["a\nb", "c", "d"], "labels": [True, False, None]},
        {
            "prompt": turns("u:q"),
            "steps": ["a b", "c", "d"],
            "labels": ["positive", "negative", None],
        },
    ),
    (
        "steps",
        {"input": "q Step 1: a ки\nStep 2: b ки", "label": "q Step 1: a +\nStep 2: b -"},
        {
            "prompt": turns("u:q"),
            "steps": ["Step 1: a", "Step 2: b"],
            "labels": ["positive", "negative"],
        },
    ),
    (
        "steps",
        {
            "question": {"problem": "q"},
            "label": {
                "steps": [
                    {"completions": [{"text": "a", "rating": 1.0}], "chosen_completion": 0.0},
                    {"completions": [{"text": "b", "rating": True}], "chosen_completion": 0},
                    {"completions": [], "human_completion": "c", "chosen_completion": None},
                ]
            },
        },
        {"prompt": turns("u:q"), "steps": ["a", "b", "c"], "labels": ["positive"] * 3},
    ),
]


@pytest.mark.parametrize(("schema", "row", "wanted"), OTHERS)
def test_other_rows_are_read(schema, row, wanted):
    found = SCHEMAS[schema](row)
    assert found == wanted
    assert SCHEMAS[schema](found) == found


def prm(**stage):
    whole = {"completions": [], "chosen_completion": None, **stage}
    return {"question": {"problem": "q"}, "label": {"steps": [whole]}}


REFUSED = [
    # Conversations that nobody could train on.
    ("chat", chat(TOLD), "messages"),
    ("chat", chat(TOLD, TOLD), "messages"),
    ("chat", chat(ASKED, {**TOLD, "weight": 0}), "messages: no assistant's turn is trained on"),
    ("chat", chat(ASKED, said("assistant", None, tool_calls=[CALL])), "messages: no assistant"),
    ("chat", chat(said("system", ""), TOLD), "messages"),
    ("chat", chat(ASKED, BAD | {"content": ""}, ASKED, TOLD), "messages[1].content: is empty"),
    ("chat", chat(said("user", "\0\0"), TOLD), "messages[0].content: is empty"),
    ("chat", chat(said("User", "q"), TOLD), "messages[0].role"),
    ("chat", chat(said(["user"], "q"), TOLD), "messages[0].role"),
    ("chat", {"conversations": [{"from": "bing", "value": "q"}]}, "conversations[0].from"),
    ("chat", {"messages": "[{'role': 'user', 'content': 'q'}]"}, "messages: must be a list"),
    ("prompt", {"prompt": []}, "prompt"),
    ("prompt", {"prompt": [said("system", "s")]}, "prompt: the last turn must be the user's"),
    ("prompt", chat(said("system", "s"), TOLD), "messages: must answer a user's turn"),
    # Keys of a message that would change what is trained on.
    ("chat", chat(ASKED, {**TOLD, "weight": 0.5}), "messages[1].weight"),
    ("chat", chat(ASKED, {**TOLD, "train": "false"}), "messages[1].train"),
    ("chat", chat(ASKED, {**TOLD, "weight": 1, "train": False}), "messages[1]"),
    ("chat", chat({**ASKED, "weight": 1}, TOLD), "messages[0]"),
    ("chat", chat(ASKED, {**TOLD, "loss_mask": [0, 1]}), "messages[1].loss_mask"),
    ("chat", chat(ASKED, {**TOLD, "sampleWeight": 2}), "messages[1].sampleWeight"),
    ("chat", chat(ASKED, {**TOLD, "is_trainable": False}), "messages[1].is_trainable"),
    ("chat", chat(ASKED, {**TOLD, "reasoning_content": "r"}), "messages[1].reasoning_content"),
    ("chat", chat(ASKED, {**TOLD, "thinking": "r"}), "messages[1].thinking"),
    ("chat", chat(ASKED, said("assistant", None, refusal="no")), "messages[1].refusal"),
    ("chat", chat(ASKED, {**TOLD, "prefix": True}), "messages[1].prefix"),
    ("chat", chat({**ASKED, "images": ["x.png"]}, TOLD), "messages[0].images"),
    ("chat", chat({**ASKED, "tool_calls": [CALL]}, TOLD), "messages[0]"),
    ("chat", chat(ASKED, {**TOLD, "tool_calls": "f()"}), "messages[1].tool_calls"),
    ("chat", chat(said("user", [{"type": "image_url", "image_url": "x"}]), TOLD), "messages[0]"),
    ("chat", chat(said("user", [{"type": "text", "text": 3}]), TOLD), "messages[0].content[0]"),
    # Fields of a row that would.
    ("chat", chat(ASKED, TOLD, weight=0), "weight"),
    ("chat", chat(ASKED, TOLD, train=False), "train"),
    ("chat", chat(said("system", "s"), ASKED, TOLD, system="t"), "system"),
    ("chat", chat(ASKED, TOLD, system=3), "system"),
    ("chat", chat(ASKED, TOLD, tools="f"), "tools"),
    ("chat", chat(ASKED, TOLD, history="earlier"), "history"),
    ("chat", chat(ASKED, TOLD, images=["x.png"]), "images"),
    ("chat", {"question": "q", "answer": "a", "context": "c"}, "context"),
    ("chat", {"question": "q", "answer": "a", "train_on_input": True}, "train_on_input"),
    ("chat", {"question": "q", "response": 4}, "response: must be a string"),
    ("comparison", {"prompt": "q", "chosen": "a", "rejected": "b", "is_tie": True}, "is_tie"),
    ("chat", {"question": "q", "answer": "a", "choices": ["a", "b"]}, "choices"),
    ("chat", {"prompt": "q", "response": "a", "input": "i"}, "input"),
    ("chat", {"prompt": "q", "response": "a", "reasoning": "r"}, "reasoning"),
    ("chat", {"prompt": "q", "completion": "a", "label": False}, "label"),
    ("chat", {"instruction": "i", "instances": [{"output": "a"}] * 2}, "instances: must be one"),
    ("chat", {"instruction": "i", "output": "", "input": ""}, "output: is empty"),
    ("text", {"text": "t", "weight": 0}, "weight"),
    ("text", chat(ASKED, {**BAD, "weight": 0}, ASKED, TOLD), "messages[1]"),
    # Pairs whose sides have other prompts, and numbers that nobody can hold.
    ("comparison", {"prompt": "p", "chosen": [ASKED, TOLD], "rejected": [ASKED, BAD]}, "chosen"),
    ("comparison", {"prompt": "q", "chosen": [TOLD], "rejected": [TOLD, ASKED, BAD]}, "rejected"),
    ("comparison", {"prompt": "q", "chosen": [{**TOLD, "weight": 0}], "rejected": "b"}, "chosen"),
    (
        "comparison",
        {"prompt": "q", "chosen": "\r\nHuman: q\r\nAssistant: a", "rejected": "b"},
        "ch",
    ),
    ("comparison", {**PAIR, "margin": 1e300}, "margin"),
    ("comparison", {**PAIR, "margin": 10**400}, "margin"),
    ("comparison", {**PAIR, "margin": float("nan")}, "margin"),
    ("comparison", {**PAIR, "ranking": [1, 10**30]}, "ranking"),
    ("comparison", {**PAIR, "weight": 0.5}, "weight"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": "true"}, "label"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 1}, "label"),
    ("prompt", {"prompt": "q", "answer": True}, "answer"),
    ("prompt", {"prompt": "q", "answer": float("inf")}, "answer"),
    ("prompt", {"prompt": "q", "reward_model": {"ground_truth": {"x": 1}}}, "reward_model"),
    ("steps", {"prompt": "q", "steps": ["a"], "labels": [[1]]}, "labels[0]"),
    ("steps", {"prompt": "q", "completions": ["a"], "labels": [True, False]}, "labels"),
    ("steps", {"prompt": "q", "completions": ["a"], "labels": [-1]}, "labels[0]"),
    ("steps", {"input": "q Step 1: a", "label": "q Step 1: a ?"}, "label"),
    ("steps", {"question": {"problem": "q"}, "label": {"steps": 5}}, "label.steps"),
    ("steps", prm(completions=[None], chosen_completion=0), "label.steps[0].completions[0]"),
    ("steps", prm(completions=[{"text": None}], chosen_completion=0), "label.steps[0]"),
    ("steps", prm(completions=[{"text": "a", "rating": [1]}]), "label.steps[0]"),
    ("steps", prm(completions=[{"text": "a", "rating": 0.5}]), "label.steps[0]"),
    ("steps", prm(completions=[{"text": "a", "rating": 1}], chosen_completion=True), "label"),
    ("steps", prm(human_completion=3), "label.steps[0].human_completion"),
]


@pytest.mark.parametrize(("schema", "row", "reason"), REFUSED)
def test_what_cannot_be_meant_is_refused_by_field(schema, row, reason):
    with pytest.raises(FieldError) as fault:
        SCHEMAS[schema](row)
    assert str(fault.value).startswith(reason) and "\n" not in str(fault.value)
    assert len(str(fault.value)) < 250


def test_names_that_change_training_are_told_from_facts():
    for name in ("weight", "loss_mask", "train_on_turn", "toolCalls", "reasoning_text", "hint"):
        assert changes_training(name, 3), name
    for name in ("id", "system_id", "source", "reasoning_tokens", "lang", "idx", "imagery", "3"):
        assert not changes_training(name, 3), name
    # Null and empty say nothing.
    assert not any(changes_training("tools", empty) for empty in (None, "", [], {}))


def test_fields_that_nothing_reads_are_named():
    row = chat({**ASKED, "lang": "en"}, TOLD, id=3, tools=[], url=None)
    assert unread_fields(row, "chat") == {"id", "messages[].lang"}
    assert unread_fields(row, "text") == {"id", "messages[].lang"}
    assert not unread_fields({"prompt": "q", "answer": "a", "margin": None}, "prompt")
