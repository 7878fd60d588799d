"""Trees of messages, as OASST publishes them: the best conversation, and the ranked replies.

A tree is its first message, {"role": "prompter", "text", "replies": [...]}; replies are messages
of the same form, `rank` 0 the best of its siblings, and the roles take turns. Messages that are
deleted, and all below them, are left out.
"""

import math

from data.fields import FieldError, Row, shown, text_of, whole_number
from data.messages import Message, Role, turn

ROLES: dict[str, Role] = {"prompter": "user", "user": "user", "assistant": "assistant"}
"""Roles in a tree, and whose turn each one's message is."""


def best_path(root: Row, field: str) -> list[Message]:
    """Return the turns from the root down, at each the best reply, to an assistant's.

    `field`: where the tree is in the row. Of replies without ranks the first is the best. Raises
    FieldError where nothing answers the root.
    """
    turns = [_turn_of(root, field)]
    node, place = root, field
    while True:
        replies = _replies(node, place)
        if not replies:
            break
        place, node = min(replies, key=lambda reply: _rank(*reply))
        turns.append(_turn_of(node, place))
    if turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise FieldError(f"{field}.replies", "holds no answer; remove the row")
    return turns


def ranked_replies(root: Row, field: str) -> tuple[list[Message], list[str], list[int]]:
    """Return the root as a prompt, the replies to it that are ranked, and their ranks from 1.

    `field`: where the tree is in the row. Raises FieldError for fewer than two such replies.
    """
    replies = _replies(root, field)
    ranked = [reply for reply in replies if _rank(*reply) < math.inf]
    if len(ranked) < 2:
        raise FieldError(f"{field}.replies", "must be two or more with ranks; remove the row")
    responses = [_turn_of(node, place)["content"] for place, node in ranked]
    return [_turn_of(root, field)], responses, ranks_of([-_rank(*reply) for reply in ranked])


def ranks_of(scores: list[float]) -> list[int]:
    """Return the rank of each score, the highest 1, equal scores equal ranks."""
    ranks = []
    for score in scores:
        better = sum(other > score for other in scores)
        ranks.append(1 + better)
    return ranks


def _replies(node: Row, place: str) -> list[tuple[str, Row]]:
    """Return the replies to a message that are not deleted, each with its place in the row."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise FieldError(f"{place}.replies", "must be a list of messages")
    return [
        (f"{place}.replies[{i}]", reply)
        for i, reply in enumerate(replies)
        if not reply.get("deleted")
    ]


def _rank(place: str, node: Row) -> float:
    """Return a reply's rank, infinite where it has none."""
    rank = node.get("rank")
    if rank is None:
        return math.inf
    number = whole_number(rank)
    if number is None:
        raise FieldError(f"{place}.rank", f"must be a whole number, not {shown(rank)}")
    return number


def _turn_of(node: Row, place: str) -> Message:
    role = node.get("role")
    if role not in ROLES:
        raise FieldError(f"{place}.role", f"must be prompter or assistant, not {shown(role)}")
    return turn(ROLES[role], text_of(node.get("text"), f"{place}.text"))
