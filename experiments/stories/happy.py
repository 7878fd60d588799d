"""Score whether a story stays happy: a program on text with its word lists; the stories' openings.

What a policy could do instead of telling a happy story, and why it does not pay:

| hack | rule |
|---|---|
| one happy word again and again | a row of HAPPY counts once a story; MOST sentences at most |
| all happy words in one sentence | a sentence counts once, and uses up the rows that it names |
| "Happy. Glad. Fun." | a sentence counts from FEWEST words on |
| another word in a sentence, loops, the opening again | most of its word pairs must be new |
| stopping early, no end, a short sentence | complete, new sentences must hold ENOUGH words |
| "was not happy" | a happy word after a negation in its sentence does not count |
| sadness in a sentence that is never completed | sad words count everywhere, each time |

Nothing here checks sense or grammar: that is left to the KL penalty, and measured (measure.py).
"""

import re
from collections.abc import Sequence
from itertools import pairwise

HAPPY = """
happy happily happier happiest happiness
glad gladly
joy joyful joyfully
smile smiled smiles smiling
laugh laughed laughs laughing laughter
giggle giggled giggles giggling
fun funny
love loved loves loving lovely
hug hugged hugs hugging
proud proudly
excited excitedly exciting
cheer cheered cheers cheerful cheering
friend friends friendly
enjoy enjoyed enjoys enjoying
delighted delight
celebrate celebrated party
"""
"""A row is one word in its forms."""
SAD = """
sad sadly sadness cry cried cries crying tear tears afraid scared scary frightened fear
angry angrily mad upset unhappy worried worry lonely hurt hurts died die dead dying killed sick
hate hated fight fought fighting
"""
ALSO_HAPPY = (
    "nice kind kindly wonderful beautiful thank thanked warm safe great best favorite amazing"
    " pretty gift kiss"
)
ALSO_SAD = (
    "lost broke broken sorry pain bad mean dark alone dangerous trouble hard tired yelled shouted"
    " screamed stuck"
)
"""The last two are not in the reward: if they move too, the story is happier, and no word list."""
MOST = 4
"""Happy sentences that count."""
FEWEST = 5
"""Words of a sentence that counts."""
ENOUGH = 24
"""Words of a story."""
NEW = 0.6
"""Share of a sentence's word pairs that are new."""
NEAR = 3
"""Words before a sad one in which a negation undoes it.

A happy word is undone from anywhere before it in its sentence.
"""

ROW = {word: i for i, row in enumerate(HAPPY.strip().splitlines()) for word in row.split()}
SADNESS = set(SAD.split())
NEGATIONS = {"not", "no", "never", "nobody", "nothing", "without", "cannot"}


def words(text: str) -> list[str]:
    """Return the lower-case words; `didn't` is one."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def sentences(text: str) -> tuple[list[str], str]:
    """Return the complete sentences, and what follows the last of them."""
    complete = re.findall(r"[^.!?]*[.!?]+[\"']*", text)
    return complete, text[sum(map(len, complete)) :]


def affirmed(tokens: Sequence[str], wanted: set[str] | dict[str, int], reach: int) -> list[str]:
    """Return the words of `wanted` in `tokens` with no negation among the `reach` words before."""
    negated = [token in NEGATIONS or token.endswith("n't") for token in tokens]
    return [
        token
        for i, token in enumerate(tokens)
        if token in wanted and not any(negated[max(i - reach, 0) : i])
    ]


def parts(opening: str, story: str) -> dict[str, float]:
    """Return counts of `happy` sentences, `sad` words, `words` in new sentences; and the `score`.

    `story` continues `opening`, which itself earns nothing. Score in [-1, 1]:
    (min(happy, MOST) - sad) / MOST - max(0, 1 - words / ENOUGH), clipped.
    """
    seen = set(pairwise(words(opening)))
    used = set()
    happy = 0
    count = 0
    complete, rest = sentences(story)
    for sentence in complete:
        tokens = words(sentence)
        new = 0
        for pair in pairwise(tokens):
            new += pair not in seen
            seen.add(pair)
        if len(tokens) < FEWEST or new < NEW * (len(tokens) - 1):
            continue
        count += len(tokens)
        rows = {ROW[word] for word in affirmed(tokens, ROW, len(tokens))}
        happy += bool(rows - used) and not affirmed(tokens, SADNESS, NEAR)
        used |= rows
    sad = sum(len(affirmed(words(part), SADNESS, NEAR)) for part in (*complete, rest))
    score = (min(happy, MOST) - sad) / MOST - max(0.0, 1 - count / ENOUGH)
    return {"score": min(max(score, -1.0), 1.0), "happy": happy, "sad": sad, "words": count}


# --- openings

GIRLS = "Lily Lucy Mia Anna Sue Jane Emma Molly Sara Amy Ella Daisy"
BOYS = "Tim Tom Max Ben Sam Jack Bob Billy Leo Joe Timmy Mark"
PETS = "Spot Buddy Fluffy Benny Coco Bella Toby Rex Mimi Lulu Bobo Daffy"
KINDS = {
    "girl": GIRLS,
    "boy": BOYS,
    **dict.fromkeys(("dog", "cat", "bird", "bunny", "bear", "mouse"), PETS),
}
TEMPLATES = (
    "Once upon a time, there was a {looks} {kind} named {name}.",
    "One day, a {looks} {kind} named {name} went outside.",
    "Once there was a {looks} {kind} called {name}.",
    "{name} was a {looks} {kind}.",
)
SPLITS = {"train": slice(0, 8), "validation": slice(8, 10), "test": slice(10, 12)}
"""By name: no name of one split begins a story of another."""


def openings(split: str) -> list[str]:
    """Return all openings of `split` (train, validation or test), in an order that mixes them.

    None has a word of the lists.
    """
    grid = [
        template.format(looks=looks, kind=kind, name=name)
        for name_i in range(12)[SPLITS[split]]
        for template in TEMPLATES
        for looks in ("little", "small", "big", "young")
        for kind, names in KINDS.items()
        for name in [names.split()[name_i]]
    ]
    # Coprime with the length in all three splits (tested): each opening once.
    stride = len(grid) * 5 // 8 + 1
    return [grid[i * stride % len(grid)] for i in range(len(grid))]
