"""Conversations as people publish them, read as messages: one form of turn for all of them.

Read are OpenAI's {"role", "content"}, ShareGPT's {"from", "value"}, contents in parts of text,
lists written as JSON text, and HH's transcripts. Tools become text, as Hermes and Qwen write it:
<tools>, <tool_call> and <tool_response>.
"""

import json
import re
from typing import Any, Literal

from data.fields import OFF, ON, FieldError, Row, is_empty, refuse_unread, shown, switch, text_of

Message = dict[str, Any]
"""One turn: {"role": one of Role, "content": text}; an assistant's turn that is not trained on
has "weight": 0 too."""
Role = Literal["system", "user", "assistant"]
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Speakers' names in messages, and whose turn each one's is; a tool's is written as a user's."""
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""The same where the key is "from"."""
MESSAGE_KEYS = frozenset(
    ("role", "content", "from", "value", "tool_calls", "tool_call_id", "function_call", *ON, *OFF)
)
"""Keys of a message that are read, or say nothing that the order of turns does not."""


def turn(role: Role, content: str) -> Message:
    """Return one turn that is trained on where it is the assistant's."""
    return {"role": role, "content": content}


def is_trained(message: Message) -> bool:
    """Return whether a turn is the assistant's and is trained on."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


# ---- Lists of messages ----


def messages_of(value: Any, field: str) -> list[Message]:
    """Read a list of one or more messages, or one message alone; a first empty system's is none.

    Keys of a message that nothing reads are left out, but refused where they would change what is
    trained on.
    """
    if isinstance(value, str):
        value = from_json(value, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise FieldError(field, "must be a list of one or more messages")
    turns = []
    for i, message in enumerate(value):
        place = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise FieldError(place, "must be an object with role and content")
        # Writers of tables fill the keys of other rows with nulls.
        message = {key: item for key, item in message.items() if item is not None}
        speaker = _speaker(message)
        # A system's turn may only come first.
        if speaker is None or (speaker == "system" and i > 0):
            raise FieldError(
                f"{place}.{'from' if 'from' in message else 'role'}",
                "must be user, assistant or tool; the first may be system",
            )
        read = _turn_of(message, speaker, place)
        if read is not None:
            turns.append(read)
    if not turns:
        raise FieldError(field, "must be a list of one or more messages")
    return turns


def _speaker(message: Row) -> str | None:
    """Return whose turn a message is: a value of SPEAKERS or SHAREGPT; None for any other."""
    names = SHAREGPT if "from" in message else SPEAKERS
    said = message.get("from" if "from" in message else "role")
    return names.get(said) if isinstance(said, str) else None


def _turn_of(message: Row, speaker: str, place: str) -> Message | None:
    """Read one message of `speaker`; None for a system's turn that says nothing."""
    key = "value" if "from" in message else "content"
    refuse_unread(message, MESSAGE_KEYS, f"{place}.")
    said = message.get(key)
    if speaker == "system" and is_empty(said):
        return None
    calls = _calls(message, place)
    trained = switch(message, place)

    # What is no assistant's is never trained on.
    if speaker in ("system", "user", "tool"):
        if trained or calls:
            raise FieldError(place, "weight and tool_calls are for assistant's turns; remove them")
        content = _content(said, f"{place}.{key}")
        if speaker == "tool":
            return turn("user", f"<tool_response>\n{content}\n</tool_response>")
        return turn("system" if speaker == "system" else "user", content)

    # A turn that calls tools is context, unless it says itself that it is trained on.
    parts = [] if calls and is_empty(said) else [_content(said, f"{place}.{key}")]
    if speaker == "call":
        parts = [_tagged("tool_call", parts[0])]
    content = "\n".join([*parts, *calls])
    read = turn("assistant", text_of(content, place))
    if trained is False or (trained is None and (calls or speaker == "call")):
        read["weight"] = 0
    return read


def _content(value: Any, field: str) -> str:
    """Read a content: a string, or a list of parts of text, which are put one below the other."""
    if not isinstance(value, list):
        return text_of(value, field)
    texts = []
    for i, part in enumerate(value):
        place = f"{field}[{i}]"
        said = part
        if isinstance(part, dict):
            if part.get("type", "text") != "text" or "text" not in part:
                raise FieldError(place, "must be a part of text; others are not read")
            said = part["text"]
        if not isinstance(said, str):
            raise FieldError(place, "must be a part of text, {'type': 'text', 'text': ...}")
        texts.append(said)
    return text_of("\n".join(texts), field)


def from_json(value: str, field: str) -> Any:
    """Read a list or an object that was written as JSON text, as exports of tables do."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise FieldError(
            field, f"must be a list, or one written as JSON, not {shown(value)}"
        ) from None


def is_messages_text(value: Any) -> bool:
    """Return whether a string is a list of messages that some program wrote as text."""
    if not isinstance(value, str) or not re.fullmatch(r"\s*\[\s*\{.*\}\s*\]\s*", value, re.DOTALL):
        return False
    return bool(re.search(r"""["'](role|from)["']\s*:""", value))


# ---- Tools ----


def _tagged(tag: str, content: str) -> str:
    return f"<{tag}>\n{content}\n</{tag}>"


def _calls(message: Row, place: str) -> list[str]:
    """Return a message's calls of tools, each as text."""
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [message["function_call"]]
    if not isinstance(calls, list):
        raise FieldError(f"{place}.tool_calls", "must be a list of objects")
    texts = []
    for call in calls:
        # OpenAI's have the call in `function`, and its arguments as JSON text.
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise FieldError(f"{place}.tool_calls", "must be objects with a name and arguments")
        function = dict(function)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function["arguments"] = _parsed(arguments)
        texts.append(_tagged("tool_call", json.dumps(function, ensure_ascii=False)))
    return texts


def _parsed(text: str) -> Any:
    """Return the value of JSON text, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tools_text(value: Any, field: str) -> str:
    """Return the tools that a row offers as the text that tells of them; none is no text."""
    tools = from_json(value, field) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise FieldError(field, "must be a list of tools")
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return text_of(_tagged("tools", "\n".join(lines)), field) if lines else ""


# ---- Prompts and whole conversations ----


def prompt_of(value: Any, field: str) -> list[Message]:
    """Read a prompt as messages that end with the user's; a string is one user's turn.

    A string that is HH's transcript up to "Assistant:" is read as its turns.
    """
    if isinstance(value, str) and not is_messages_text(value):
        if is_transcript(value):
            opened = re.sub(r"\n\nAssistant:\s*$", "", value)
            return _ending_with_user(transcript(opened, field), field)
        return [turn("user", text_of(value, field))]
    return _ending_with_user(messages_of(value, field), field)


def _ending_with_user(turns: list[Message], field: str) -> list[Message]:
    if turns[-1]["role"] != "user":
        raise FieldError(field, "the last turn must be the user's")
    return turns


def conversation_of(value: Any, field: str) -> list[Message]:
    """Read a whole conversation that ends with the assistant: messages, or a transcript of HH."""
    if isinstance(value, str) and not is_messages_text(value):
        turns = transcript(value, field)
    else:
        turns = messages_of(value, field)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise FieldError(field, "must end with an assistant's turn that follows another's")
    return turns


def continued(prompt: list[Message], value: Any, field: str) -> list[Message]:
    """Return the whole conversation of a prompt and what answers it, `value`.

    That is the answer's text, the turns after the prompt, or the whole conversation, which must
    then hold the prompt.
    """
    is_text = not isinstance(value, list | dict) and not is_messages_text(value)
    if is_text and not (isinstance(value, str) and is_transcript(value)):
        return [*prompt, turn("assistant", text_of(value, field))]
    turns = transcript(value, field) if is_text else messages_of(value, field)
    if turns[-1]["role"] != "assistant":
        raise FieldError(field, "must end with an assistant's turn")
    if turns[0]["role"] == "assistant":
        return [*prompt, *turns]

    # A whole conversation: with the same beginning, or around the one request that is named.
    holds_it = len(prompt) == 1 and prompt[0] in turns[:-1]
    if turns[: len(prompt)] != prompt and not holds_it:
        raise FieldError(field, "is a whole conversation with another prompt; remove one of them")
    return turns


def last_and_before(turns: list[Message], field: str) -> tuple[list[Message], str]:
    """Return the turns before the last one, and what the last one says; it must be trained on."""
    *before, last = turns
    if not is_trained(last):
        raise FieldError(field, "its last turn must be the assistant's, with no weight of 0")
    return before, last["content"]


# ---- Transcripts ----


def is_transcript(value: str) -> bool:
    """Return whether a string is one of HH's, "Human: ...", and a blank line, "Assistant: ..."."""
    begins = re.match(r"\s*Human:", value)
    return bool(begins and re.search(r"^Assistant:", value, re.MULTILINE))


def transcript(value: Any, field: str) -> list[Message]:
    """Read HH's "\\n\\nHuman: ...\\n\\nAssistant: ...", of which the last turn may be empty."""
    whole = "\n\n" + text_of(value, field).lstrip("\n")
    # What stands before the first turn, then names and contents in turn.
    before, *parts = re.split(r"\n\n(Human|Assistant):", whole)
    names = parts[0::2]
    contents = parts[1::2]
    turns: list[Message] = []
    for name, content in zip(names, contents, strict=True):
        role: Role = "user" if name == "Human" else "assistant"
        content = content.strip()
        # HH has some turns in two parts.
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append(turn(role, content))
    complete = all(said["content"] for said in turns[:-1])
    if before.strip() or not turns or not complete:
        raise FieldError(
            field,
            "must be a transcript of Human: and Assistant: turns, each after a blank line and "
            "none but the last empty; or beside a prompt",
        )
    return turns
