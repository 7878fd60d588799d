"""Ask a reward that runs in a process of its own, behind HTTP (rewards/serve.py)."""

import http.client
import json
import sys
import time
import urllib.parse
from typing import Any, NamedTuple, TypedDict

from runtime.errors import UserError

# The arrays of a batch that a server is sent.
SENT = ("tokens_BT", "segment_ids_BT", "positions_BT", "response_BR", "mask_BR")
# Seconds for which a server may be away or busy, and between two tries to reach it.
WAIT = 300.0
PAUSE = 0.5
# Statuses that pass: the asker may try again (RFC 9110; 429 of RFC 6585), and faults of the
# server's or of a proxy's, 500 and above. Any other says that the question is wrong.
PASSING = (408, 425, 429)


class Question(TypedDict):
    """One batch of responses to score, as JSON; complete in itself."""

    tokenizer: str
    """SHA-256 of the tokenizer that made the token ids."""
    texts: list[str]
    """The responses, [B]."""
    records: list[dict[str, Any]]
    """The record of each response's prompt, [B]."""
    batch: dict[str, list[Any]]
    """The arrays SENT, [B, ...] as lists."""


class Reply(NamedTuple):
    """A server's answer as HTTP has it."""

    status: int
    reason: str
    text: str


def ask(reward: str, question: Question, wait: float = WAIT) -> list[float]:
    """Return the scores [B] of `question` by the server at `reward`, http://host:port.

    A server that is away, busy or failing is asked again, up to `wait` seconds; it may be killed
    and started again meanwhile. Raises UserError where it stays away or goes on failing, refuses
    the question, or answers no {"scores": [...]}. The number of scores, and whether they are
    numbers, is not checked here (scorer.check_scores).
    """
    reply = _patient_post(reward, json.dumps(question), wait)
    if reply.status != 200:
        raise UserError(f"--reward={reward}: {_text_of(reply)}")
    try:
        return list(json.loads(reply.text)["scores"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'--reward={reward}: answered {reply.text[:80]!r}; it must answer {{"scores": [...]}}'
        ) from None


def _patient_post(reward: str, body: str, wait: float) -> Reply:
    """Post `body` until the server answers for good; say that it is waited for, and is back."""
    address = _address(reward)
    start = time.monotonic()
    away = False
    while True:
        left = start + wait - time.monotonic()
        fault = ""
        try:
            # At least a moment for the last try.
            reply = _post(address, body, max(left, PAUSE))
            if not _is_passing(reply.status):
                break
            fault = f"status {reply.status}: {_text_of(reply)}"
        except (OSError, http.client.HTTPException) as lost:
            fault = f"no answer ({lost})"
        if left <= 0:
            raise UserError(
                f"--reward={reward}: {fault}, for {wait:.0f} s; mend or start rewards/serve.py "
                "there, then give the same command again"
            )
        if not away:
            _note(reward, f"{fault}; asking again for up to {wait:.0f} s")
        away = True
        time.sleep(min(PAUSE, max(left, 0.0)))
    if away:
        _note(reward, f"answers again after {time.monotonic() - start:.0f} s")
    return reply


def _is_passing(status: int) -> bool:
    """Tell if an answer of this HTTP status may be another one when the server is asked again."""
    return status in PASSING or status >= 500


def _text_of(reply: Reply) -> str:
    """Return what the server says of a fault, in one line."""
    return " ".join(reply.text.split())[:300] or reply.reason


def _address(reward: str) -> urllib.parse.SplitResult:
    try:
        address = urllib.parse.urlsplit(reward)
        _ = address.port
    except ValueError as fault:
        raise UserError(f"--reward={reward}: {fault}; give http://127.0.0.1:<port>") from None
    if not address.hostname:
        raise UserError(f"--reward={reward}: names no host; give http://127.0.0.1:<port>")
    return address


def _post(address: urllib.parse.SplitResult, body: str, wait: float) -> Reply:
    host = address.hostname or ""
    connection = http.client.HTTPConnection(host, address.port or 80, timeout=wait)
    try:
        headers = {"Content-Type": "application/json"}
        query = f"?{address.query}" if address.query else ""
        connection.request("POST", (address.path or "/") + query, body, headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        return Reply(response.status, response.reason, text)
    finally:
        connection.close()


def _note(reward: str, text: str) -> None:
    print(f"note: --reward={reward}: {text}", file=sys.stderr)
