"""Who gives feedback by written principles: a language model, or in the world a simulated judge of set reliability.

Both are two functions. prefer(questions) -> P(the first response follows the principle better), [Q, principles], of
questions (prompt, response, response). revise(prompts, responses, names of principles, key) -> a critique and
revisions of each response. Prompts are messages.
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
from model_config import ModelConfig
from objectives.likelihood import inputs
from responses import make_sampler
from runtime.errors import UserError, require
from sampling import SamplingConfig
from tasks import world, world_feedback

COMPARE = """Request: {request}
Response A: {a}
Response B: {b}
Principle: {principle}
Which response follows the principle better? Answer with A or B."""
CLASSIFY = """Request: {request}
Response: {response}
Rule: {rule}
Does the response keep the rule? Answer with A for yes or B for no."""
CRITIQUE = "Say how your last answer breaks this principle: {principle}"
REVISE = "Write your answer again, so that it follows the principle. Write the answer only."
Messages = list[Message]
Question = tuple[Messages, str, str]
Judge = tuple[ModelConfig, Tokenizer, Params]


def read_principles(path: str) -> dict[str, str]:
    """Name -> text of each principle; raises UserError. Empty lines and those that begin with # do not count."""
    try:
        lines = [line.strip() for line in pathlib.Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(
            f"--principles={path}: {fault}; give a text file, one principle a line"
        ) from None
    principles = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            named = re.fullmatch(r"(\w+):\s+(.+)", line)
            name, text = named.groups() if named else (f"line {number}", line)
            if name in principles:
                raise UserError(
                    f"{path}:{number}: a second principle {name!r}; give each a name of its own"
                )
            principles[name] = text
    if not principles:
        raise UserError(f"--principles={path}: holds none; write one a line")
    return principles


# ---- A language model ----


def asked_in(messages: Messages) -> str:
    """A prompt as the text of one request."""
    return "\n\n".join(message["content"] for message in messages)


def comparing_prompts(question: Question, text: str) -> list[str]:
    """What a judge is asked about two responses and a principle: in this order, and in the other."""
    messages, a, b = question
    return [
        COMPARE.format(request=asked_in(messages), a=x, b=y, principle=text)
        for x, y in ((a, b), (b, a))
    ]


def make_first(judge: Judge) -> Callable[[Sequence[str]], np.ndarray]:
    """first(what a user asks) -> P(the answer is A, where it is A or B), by the log-probabilities of these two.

    A question longer than the model's context loses its beginning. Raises UserError where their first tokens are one.
    """
    (model, tokenizer, params), rows = judge, 64
    answers = [tokenizer.encode(answer)[:1] for answer in "AB"]
    if answers[0] == answers[1] or not all(answers):
        raise UserError(
            "--judge: its tokenizer does not tell the answers A and B apart by their first token"
        )
    apply = init_and_apply(LanguageModel(model))[1]

    @jax.jit
    def probability(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        output = apply(params, *inputs(batch))
        logits_BTV = unembed(output.x_BTD, output.unembed_DV)
        logits_B2 = logits_BTV[:, -1, jnp.array(answers)[:, 0]].astype(jnp.float32)
        return jax.nn.softmax(logits_B2)[:, 0]

    def first(texts: Sequence[str]) -> np.ndarray:
        tokens = [cut_left(tokenizer.prompt(text), model.context, tokenizer) for text in texts]
        length, out = min(-(-max(map(len, tokens), default=1) // 32) * 32, model.context), []
        for start in range(0, len(tokens), rows):
            part = tokens[start : start + rows]
            count = (
                1 << (len(part) - 1).bit_length()
            )  # a power of two: few programs, and one response costs one row
            padded = [{"tokens": row} for row in part + part[:1] * (count - len(part))]
            batch = pad_prompts(padded, length, tokenizer.pad, fixed=True)
            out += np.asarray(probability(params, batch))[: len(part)].tolist()
        return np.array(out)

    return first


def make_prefer(
    judge: Judge, principles: Sequence[str]
) -> Callable[[Sequence[Question]], np.ndarray]:
    """prefer(questions), averaged over both orders of the two responses.

    So what the judge likes about a position cancels: p(a, b) = 1 - p(b, a) (Lee et al. 2023, RLAIF: soft labels, and
    their handling of position bias).
    """
    first = make_first(judge)

    def prefer(questions: Sequence[Question]) -> np.ndarray:
        texts = [
            ask
            for question in questions
            for text in principles
            for ask in comparing_prompts(question, text)
        ]
        orders_QP2 = first(texts).reshape(len(questions), len(principles), 2)
        return (orders_QP2[..., 0] + 1 - orders_QP2[..., 1]) / 2

    return prefer


def make_keeps(judge: Judge, rule: str) -> Callable[[str, dict[str, Any]], float]:
    """function(response, record) -> P(the response keeps the rule): a classifier without training, usable as a reward.

    As the rule-based reward models of OpenAI 2023 (GPT-4, system card). In a module of your own,
    `polite = make_keeps(load_run("runs/llama"), "The response is polite.")` makes --reward=module:polite.
    """
    first = make_first(judge)
    return lambda response, record: float(
        first([CLASSIFY.format(request=asked_in(record["prompt"]), response=response, rule=rule)])[
            0
        ]
    )


def make_revise(
    judge: Judge, principles: dict[str, str], sampling: SamplingConfig, n: int
) -> Callable:
    """revise, as turns of one chat: the critique, then `n` revisions (Bai et al. 2022, Constitutional AI, section 3.1).

    A chat that does not fit is cut on its left. Revisions that never end are left out, and where none ends the response
    stays as it is.
    """
    model, tokenizer, params = judge
    speak, rewrite = (make_sampler(model, sampling, tokenizer, count) for count in (1, n))

    def ask(sampler: Callable, chats: list[Messages], key: jax.Array) -> list[list[int]]:
        room = model.context - sampling.max_new_tokens
        return sampler(
            params, [cut_left(tokenizer.prompt(chat), room, tokenizer) for chat in chats], key, 64
        )

    def revise(
        prompts: Sequence[Messages], responses: Sequence[str], names: Sequence[str], key: jax.Array
    ):
        turns = lambda *said: [{"role": role, "content": text} for role, text in said]
        chats = [
            [
                *prompt,
                *turns(
                    ("assistant", response), ("user", CRITIQUE.format(principle=principles[name]))
                ),
            ]
            for prompt, response, name in zip(prompts, responses, names, strict=True)
        ]
        critiques = [
            tokenizer.decode(said) for said in ask(speak, chats, jax.random.fold_in(key, 0))
        ]
        chats = [
            c + turns(("assistant", said), ("user", REVISE))
            for c, said in zip(chats, critiques, strict=True)
        ]
        written = ask(rewrite, chats, jax.random.fold_in(key, 1))
        kept = [tokenizer.ended(written[i * n : (i + 1) * n]) for i in range(len(chats))]
        return critiques, [
            texts or [response] for texts, response in zip(kept, responses, strict=True)
        ]

    return revise


# ---- The world's ----


def make_simulated(
    names: Sequence[str], reliability: float, n: int, seed: int
) -> tuple[Callable, Callable]:
    """(prefer, revise) by gold criteria seen through noise; `names`: the criteria. Raises UserError for others.

    prefer is 0, 1/2 or 1: one look at each response by each principle. A critic who finds nothing leaves the response
    as it is, under an empty critique.
    """
    unknown = ", ".join(sorted(set(names) - set(world_feedback.CRITIQUES)))
    known = ", ".join(world_feedback.CRITIQUES)
    require(
        not unknown,
        f"--principles: the simulated judge knows {known} and no {unknown}; give --judge",
    )

    def prefer(questions: Sequence[Question]) -> np.ndarray:
        def finds(prompt: Messages, response: str, name: str) -> bool:
            return world_feedback.finds(prompt[-1]["content"], response, name, reliability, seed)

        looks = [
            [finds(p, a, name) - finds(p, b, name) for name in names] for p, a, b in questions
        ]
        return 0.5 + np.array(looks).reshape(len(questions), len(names)) / 2

    def revise(
        prompts: Sequence[Messages], responses: Sequence[str], names: Sequence[str], key: jax.Array
    ):
        look, critiques, revisions = int(jax.random.bits(key)), [], []
        for messages, response, name in zip(prompts, responses, names, strict=True):
            prompt: Any = messages[-1]["content"]
            fine = world_feedback.finds(prompt, response, name, reliability, look)
            rng = world.drawn_for("revision", look, prompt, response)
            rewritten = [
                world_feedback.revise(prompt, response, name, reliability, rng) for _ in range(n)
            ]
            critiques.append("" if fine else world_feedback.CRITIQUES[name])
            revisions.append([response] if fine else rewritten)
        return critiques, revisions

    return prefer, revise
