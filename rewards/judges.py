"""Feedback by written principles: from a language model, or in the world from a simulated judge.

Both are two functions, of the types Prefer and Revise below. A prompt is a list of messages.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batches import cut_left, pad_prompts
from data.tokenizer import Message, Tokenizer
from model import LanguageModel, Params, init_and_apply, unembed
from objectives.likelihood import inputs
from responses import LoadedRun, filled, make_sampler, split_evenly
from runtime.errors import UserError, require
from sampling import SamplingConfig
from tasks import world, world_feedback

COMPARE = """Request: {request}
Response A: {a}
Response B: {b}
Principle: {principle}
Which response follows the principle better? Answer with A or B."""
KEEPS = """Request: {request}
Response: {response}
Rule: {rule}
Does the response keep the rule? """
CLASSIFY = KEEPS + "Answer with A for yes or B for no."
CRITIQUE = "Say how your last answer breaks this principle: {principle}"
REVISE = "Write your answer again, so that it follows the principle. Write the answer only."
# Questions a call of a language model, padded to a multiple of so many tokens.
ROWS = 64
WIDTH = 32

Messages = list[Message]
Question = tuple[Messages, str, str]
"""A prompt, and two responses to compare."""
Prefer = Callable[[Sequence[Question]], np.ndarray]
"""prefer(questions) -> [Q, principles]: P(the first response follows the principle better)."""
Revise = Callable[
    [Sequence[Messages], Sequence[str], Sequence[str], jax.Array],
    tuple[list[str], list[list[str]]],
]
"""revise(prompts, responses, names, key) -> (a critique, revisions) of each response.

`names`: for each response the name of the principle that it is criticised by. There is at least
one revision of each: the response itself where nothing is found or no revision came to its end.
"""
Ask = Callable[[list[Messages], jax.Array], list[list[int]]]
"""ask(chats, key) -> what the model says next, as token lists, equally many to each chat."""


def read_principles(path: str) -> dict[str, str]:
    """Read a text file of principles, one a line, as `name: text` or as the text alone.

    Returns {name: text}, in the file's order; a line without a name is called `line <number>`,
    from 1. Empty lines and those that begin with # are skipped. Raises UserError for a file that
    cannot be read or holds none, and for a name given twice.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(
            f"--principles={path}: {fault}; give a text file, one principle a line"
        ) from None

    # One principle a line; without a name it is called by the line's number.
    principles: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        named = re.fullmatch(r"(\w+):\s+(.+)", line)
        name, principle = named.groups() if named else (f"line {number}", line)
        if name in principles:
            raise UserError(
                f"{path}:{number}: a second principle {name!r}; give each a name of its own"
            )
        principles[name] = principle
    if not principles:
        raise UserError(f"--principles={path}: holds none; write one a line")
    return principles


# ---- A language model as a judge ----


def request_text(messages: Messages) -> str:
    """Join the contents of a prompt's messages, a blank line between them, into one text."""
    return "\n\n".join(message["content"] for message in messages)


def comparing_prompts(question: Question, principle: str) -> list[str]:
    """Return the two questions to a judge about `question`: its responses in order, and swapped.

    `principle`: its text. Each asks for A, the response that stands first in it, or B.
    """
    messages, first, second = question
    request = request_text(messages)
    return [
        COMPARE.format(request=request, a=first, b=second, principle=principle),
        COMPARE.format(request=request, a=second, b=first, principle=principle),
    ]


def make_probability_of_a(
    judge: LoadedRun, a: str = "A", b: str = "B", flag: str = "--judge"
) -> Callable[[Sequence[str]], np.ndarray]:
    """Make the language model `judge` answer questions with `a` or `b`.

    Returns probability_of_a(texts) -> [N] float: P(the answer is a, given that it is a or b), from
    the log-probabilities of these two first tokens; it waits for the device. A text is a user's
    message; one longer than the model's context loses its beginning. Raises UserError, which names
    the judge's `flag`, where a and b have the same first token.
    """
    config, tokenizer, params = judge
    first_of_a = tokenizer.encode(a)[:1]
    first_of_b = tokenizer.encode(b)[:1]
    if first_of_a == first_of_b or not first_of_a or not first_of_b:
        raise UserError(
            f"{flag}: its tokenizer does not tell the answers {a} and {b} apart by their first "
            "token"
        )
    answers_2 = np.array([*first_of_a, *first_of_b])
    _, apply = init_and_apply(LanguageModel(config))

    @jax.jit
    def probability(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        # Rows are padded on the left: the last position predicts the answer's first token.
        output = apply(params, *inputs(batch))
        logits_BTV = unembed(output.x_BTD, output.unembed_DV)
        logits_B2 = logits_BTV[:, -1, answers_2].astype(jnp.float32)
        return jax.nn.softmax(logits_B2)[:, 0]

    def probability_of_a(texts: Sequence[str]) -> np.ndarray:
        # Few widths: a multiple of WIDTH that holds the longest.
        tokens = [cut_left(tokenizer.prompt(text), config.context, tokenizer) for text in texts]
        longest = max(map(len, tokens), default=1)
        width = min(-(-longest // WIDTH) * WIDTH, config.context)
        out: list[float] = []
        for start in range(0, len(tokens), ROWS):
            # A power of two of rows: few programs, and one question costs one row.
            part = tokens[start : start + ROWS]
            rows = 1 << (len(part) - 1).bit_length()
            all_rows = filled(part, rows)
            padded = [{"tokens": row} for row in all_rows]
            batch = pad_prompts(padded, width, tokenizer.pad, fixed=True)
            answers_N = np.asarray(probability(params, batch))
            out += answers_N[: len(part)].tolist()
        require(
            bool(np.isfinite(out).all()),
            f"{flag}: its answers are not finite; name a run whose training went well",
        )
        return np.array(out)

    return probability_of_a


def make_prefer(judge: LoadedRun, principles: Sequence[str]) -> Prefer:
    """Make the language model `judge` compare responses by each of `principles`, their texts.

    Returns prefer(questions) -> [Q, principles] float: P(the first response follows the principle
    better), the mean over both orders of the responses. So what the judge likes about a position
    cancels, p(a, b) = 1 - p(b, a) (Lee et al. 2023, RLAIF: soft labels, and their handling of
    position bias). Raises UserError as `make_probability_of_a` does.
    """
    probability_of_a = make_probability_of_a(judge)

    def prefer(questions: Sequence[Question]) -> np.ndarray:
        # For each question and principle both orders, then the mean over them.
        texts = []
        for question in questions:
            for principle in principles:
                texts += comparing_prompts(question, principle)
        shape = (len(questions), len(principles), 2)
        orders_QP2 = probability_of_a(texts).reshape(shape)
        first_QP = orders_QP2[..., 0]
        second_QP = orders_QP2[..., 1]
        return (first_QP + 1 - second_QP) / 2

    return prefer


def make_keeps(judge: LoadedRun, rule: str) -> Callable[[str, dict[str, Any]], float]:
    """Make the language model `judge` a classifier of one rule, usable as a reward.

    Returns keeps(response, record) -> P(the response keeps the rule), without training. `record`:
    {"prompt": messages}. OpenAI 2023 (GPT-4, system card) had such rule-based reward models. In a
    module of your own, `polite = make_keeps(load_run("runs/llama"), "The response is polite.")`
    makes --reward=module:polite. Raises UserError as `make_probability_of_a` does.
    """
    probability_of_a = make_probability_of_a(judge)

    def keeps(response: str, record: dict[str, Any]) -> float:
        request = request_text(record["prompt"])
        text = CLASSIFY.format(request=request, response=response, rule=rule)
        return float(probability_of_a([text])[0])

    return keeps


def make_revise(
    judge: LoadedRun, principles: dict[str, str], sampling: SamplingConfig, n: int
) -> Revise:
    """Make the language model `judge` criticise responses and write `n` revisions of each.

    Returns the function that `make_chat_revise` describes. `principles`: {name: text}. `sampling`:
    of critiques and revisions. A chat that does not fit the model's context is cut on its left.
    """
    return make_chat_revise(
        make_ask(judge, sampling, 1),
        make_ask(judge, sampling, n),
        judge.tokenizer,
        principles,
        n,
    )


def make_ask(judge: LoadedRun, sampling: SamplingConfig, n: int) -> Ask:
    """Make the sampler of what `judge` says next in a chat, `n` times to each.

    Returns ask(chats, key) -> lists of token ids, a chat's `n` next to one another. A chat is a
    list of messages; one that does not fit the context is cut on its left. `key`: a PRNG key.
    """
    config, tokenizer, params = judge
    respond = make_sampler(config, sampling, tokenizer, n)
    room = config.context - sampling.max_new_tokens

    def ask(chats: list[Messages], key: jax.Array) -> list[list[int]]:
        prompts = [cut_left(tokenizer.prompt(chat), room, tokenizer) for chat in chats]
        return respond(params, prompts, key, ROWS)

    return ask


def make_chat_revise(
    criticise: Ask, rewrite: Ask, tokenizer: Tokenizer, principles: dict[str, str], n: int
) -> Revise:
    """Make revisions as turns of one chat: prompt, response, a critique, then `n` revisions.

    Bai et al. 2022 (Constitutional AI), section 3.1. `criticise` and `rewrite`: of `make_ask`,
    with 1 and with `n` answers to a chat. `principles`: {name: text}. Returns revise(prompts,
    responses, names, key) -> (critiques, lists of revisions), one each a response; `names`: by
    which principle it is criticised. Revisions that never end are left out; where none ends the
    response itself is the one revision.
    """

    def revise(
        prompts: Sequence[Messages], responses: Sequence[str], names: Sequence[str], key: jax.Array
    ) -> tuple[list[str], list[list[str]]]:
        # The critique: what the response has against its principle.
        chats = []
        for prompt, response, name in zip(prompts, responses, names, strict=True):
            question = CRITIQUE.format(principle=principles[name])
            turns = [turn("assistant", response), turn("user", question)]
            chats.append([*prompt, *turns])
        said = criticise(chats, jax.random.fold_in(key, 0))
        critiques = [tokenizer.decode(tokens) for tokens in said]

        # The revisions, in the same chat.
        for chat, critique in zip(chats, critiques, strict=True):
            chat += [turn("assistant", critique), turn("user", REVISE)]
        written = rewrite(chats, jax.random.fold_in(key, 1))
        revisions = []
        for response, own in zip(responses, split_evenly(written, n), strict=True):
            complete = tokenizer.ended(own)
            revisions.append(complete or [response])
        return critiques, revisions

    return revise


def turn(role: str, content: str) -> Message:
    """Return one message of a chat, {"role", "content"}; `role`: user, assistant or system."""
    return {"role": role, "content": content}


# ---- The world's simulated judge ----


def make_simulated(
    names: Sequence[str], reliability: float, n: int, seed: int
) -> tuple[Prefer, Revise]:
    """Make (prefer, revise) of a judge that sees the gold criteria `names` through noise.

    They are called like the results of `make_prefer` and `make_chat_revise`. A look at one
    criterion of one response is right with probability `reliability`. A preference is 0, 1/2 or 1
    by each principle, from one look at each response; `seed` decides what looks see. A critic who
    finds nothing leaves the response as its one revision, under an empty critique; else there are
    `n` revisions, by the key given to revise. Raises UserError for a name that is no gold
    criterion.
    """
    known = list(world_feedback.CRITIQUES)
    unknown = sorted(set(names) - set(known))
    require(
        not unknown,
        f"--principles: the simulated judge knows {', '.join(known)} and no "
        f"{', '.join(unknown)}; give --judge",
    )

    def finds(messages: Messages, response: str, name: str) -> bool:
        return world_feedback.finds(messages[-1]["content"], response, name, reliability, seed)

    def prefer(questions: Sequence[Question]) -> np.ndarray:
        # 1 where only the first is found good by a principle, -1 where only the second is.
        gaps_QP = np.zeros((len(questions), len(names)), int)
        for q, (messages, first, second) in enumerate(questions):
            for p, name in enumerate(names):
                found = finds(messages, first, name)
                gaps_QP[q, p] = found - finds(messages, second, name)
        return 0.5 + gaps_QP / 2

    def revise(
        prompts: Sequence[Messages], responses: Sequence[str], names: Sequence[str], key: jax.Array
    ) -> tuple[list[str], list[list[str]]]:
        # The same look at the same response finds the same again; another key looks anew.
        look = int(jax.random.bits(key))
        critiques: list[str] = []
        revisions: list[list[str]] = []
        for messages, response, name in zip(prompts, responses, names, strict=True):
            prompt = messages[-1]["content"]
            if world_feedback.finds(prompt, response, name, reliability, look):
                critiques.append("")
                revisions.append([response])
                continue
            rng = world.drawn_for("revision", look, prompt, response)
            rewritten = [
                world_feedback.revise(prompt, response, name, reliability, rng) for _ in range(n)
            ]
            critiques.append(world_feedback.CRITIQUES[name])
            revisions.append(rewritten)
        return critiques, revisions

    return prefer, revise
