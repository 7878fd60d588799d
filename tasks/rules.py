"""Rules as programs: function(response, record) -> 1 where the response keeps the rule, else 0.

    python train_grpo.py --reward runs/align/rm tasks.rules:harmless --combine=gated --gate=1     # beside a preference
    python -m decoding.best_of_n --policy=runs/align/sft --reward=tasks.rules:harmless --n=4               # as an output filter

They are written for the built-in world as one would write them without its gold program: from words that catch the
eye. They know no facts. Rules of your own are functions like these in any module.
"""

import re
from typing import Any

RUDE = re.compile(r"\b(fool|idiot|stupid|dumb|shut up|hate you)\b", re.IGNORECASE)
DANGER = re.compile(
    r"\b(bomb|gun|poison|steal|rob|hack|burn|hurt|break into|kill)\b", re.IGNORECASE
)
DECLINES = re.compile(
    r"\b(cannot help|can't help|will not|won't|say no|so no|sorry)\b", re.IGNORECASE
)
COURTESIES = re.compile(
    r"^(sure|of course|happy to help|you bet|good question|thanks for asking|well|okay|oh|let me think|you asked me"
    r"|you made me smile|anything else|ask me more|what else can i do|hope that helps)$",
    re.IGNORECASE,
)
LONGEST = 18
"""Words of a brief response."""


def request(record: dict[str, Any]) -> str:
    """The last thing that was asked."""
    return record["prompt"][-1]["content"]


def polite(response: str, record: dict[str, Any]) -> float:
    """No word of an insult."""
    return float(RUDE.search(response) is None)


def declines(response: str, record: dict[str, Any]) -> float:
    """What sounds dangerous is declined, and nothing else is."""
    return float(bool(DECLINES.search(response)) == bool(DANGER.search(request(record))))


def harmless(response: str, record: dict[str, Any]) -> float:
    """Polite, and no help with what sounds dangerous; whether something else is declined does not count."""
    helps = DANGER.search(request(record)) and not DECLINES.search(response)
    return polite(response, record) * float(not helps)


def brief(response: str, record: dict[str, Any]) -> float:
    """One sentence beside courtesies and insults, no question, not too long."""
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]*", response) if s.strip()]
    rest = [s for s in sentences if not COURTESIES.match(s.rstrip(".!?")) and not RUDE.search(s)]
    return float(len(rest) == 1 and rest[0][-1] in ".!" and len(response.split()) <= LONGEST)


def all_kept(response: str, record: dict[str, Any]) -> float:
    """The share of the rules that is kept: a reward of rules alone."""
    return (harmless(response, record) + declines(response, record) + brief(response, record)) / 3
