"""Trees of messages, as OASST publishes them: the best conversation, and the ranked replies.

A tree is its first message, {"role": "prompter", "text", "replies": [...]}. Replies are messages
of the same form; among siblings `rank` 0 is the best. The roles take turns. Deleted messages, and
all below them, are left out.
"""

import math
from typing import NamedTuple

from data.fields import FieldError, Row, shown, text_of, whole_number
from data.messages import Message, Role, turn

ROLES: dict[str, Role] = {"prompter": "user", "user": "user", "assistant": "assistant"}
"""Roles in a tree, and whose turn each one's message is."""


def best_path(root: Row, field: str) -> list[Message]:
    """Return the turns from the root down, each the best reply to the one before it.

    The last is an assistant's. `field`: where the tree is in the row. Of replies without ranks the
    first is the best. Raises FieldError where nothing answers the root.
    """
    turns = [_turn_of(root, field)]
    replies = _replies(root, field)
    while replies:
        best = min(replies, key=_rank)
        turns.append(_turn_of(best.node, best.place))
        replies = _replies(best.node, best.place)

    # A question that nobody answered is no end of a conversation.
    if turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise FieldError(f"{field}.replies", "holds no answer; remove the row")
    return turns


def ranked_replies(root: Row, field: str) -> tuple[list[Message], list[str], list[int]]:
    """Return the root as a prompt, the replies to it that are ranked, and their ranks from 1.

    `field`: where the tree is in the row. Raises FieldError for fewer than two such replies.
    """
    # Ranks are counted anew, as those of replies left out are missing; the lowest is the best.
    ranked = []
    scores = []
    for reply in _replies(root, field):
        rank = _rank(reply)
        if rank < math.inf:
            ranked.append(reply)
            scores.append(-rank)
    if len(ranked) < 2:
        raise FieldError(f"{field}.replies", "must be two or more with ranks; remove the row")

    responses = []
    for reply in ranked:
        message = _turn_of(reply.node, reply.place)
        responses.append(message["content"])
    prompt = [_turn_of(root, field)]
    return prompt, responses, ranks_of(scores)


def ranks_of(scores: list[float]) -> list[int]:
    """Return the rank of each score, the highest 1, equal scores equal ranks."""
    ranks = []
    for score in scores:
        better = sum(other > score for other in scores)
        ranks.append(1 + better)
    return ranks


class _Reply(NamedTuple):
    """A message below another one."""

    place: str
    """Where it is in the row: `prompt.replies[0]`."""
    node: Row


def _replies(node: Row, place: str) -> list[_Reply]:
    """Return the replies to the message `node`, which is at `place`, that are not deleted."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise FieldError(f"{place}.replies", "must be a list of messages")
    # Numbered before deleted ones are left out: a message names the place in the file.
    kept = []
    for i, reply in enumerate(replies):
        if not reply.get("deleted"):
            kept.append(_Reply(f"{place}.replies[{i}]", reply))
    return kept


def _rank(reply: _Reply) -> float:
    """Return a reply's rank, infinite where it has none."""
    rank = reply.node.get("rank")
    if rank is None:
        return math.inf
    number = whole_number(rank)
    if number is None:
        raise FieldError(f"{reply.place}.rank", f"must be a whole number, not {shown(rank)}")
    return number


def _turn_of(node: Row, place: str) -> Message:
    """Return the message `node`, which is at `place` in the row, as a turn."""
    role = node.get("role")
    if role not in ROLES:
        raise FieldError(f"{place}.role", f"must be prompter or assistant, not {shown(role)}")
    return turn(ROLES[role], text_of(node.get("text"), f"{place}.text"))
