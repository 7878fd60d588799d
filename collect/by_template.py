"""Rows by a template alone: pairs turned round, and data sets below descriptions of their task.

Nothing is written by a model here. What every row of a data set has in common, its task, is what
a model reads first (Wei et al. 2022, FLAN; Sanh et al. 2022, T0), in one of several wordings.
"""

from collections.abc import Sequence

from collect.examples import folded
from collect.instructions import INSTRUCTION_OF, Made
from tasks.world import drawn_for


def invert(pairs: Sequence[tuple[str, str, str]]) -> list[Made]:
    """Turn pairs round: what was answered is asked for, by the answer.

    `pairs`: (id, prompt, response). A row has prompt and response, that of `INSTRUCTION_OF`. An
    answer to several prompts, such as a refusal, does not tell which, and goes: `ambiguous`; a
    pair that stands there before goes as `repeated`.
    """
    prompts_of: dict[str, set[str]] = {}
    for _, prompt, response in pairs:
        prompts_of.setdefault(folded(response), set()).add(folded(prompt))
    seen = set()
    rows = []
    for name, prompt, response in pairs:
        row = {"prompt": INSTRUCTION_OF.format(answer=response), "response": prompt}
        made = Made(f"invert {name}", row, "invert", (name,))
        key = folded(prompt), folded(response)
        count = len(prompts_of[folded(response)])
        if count > 1:
            made = made._replace(rule="ambiguous", reason=f"answers {count} prompts")
        elif key in seen:
            made = made._replace(rule="repeated", reason="stands there before")
        seen.add(key)
        rows.append(made)
    return rows


def describe(
    pairs: Sequence[tuple[str, str, str]], descriptions: Sequence[str], seed: int
) -> list[Made]:
    """Put a description of the task above each input, one of several drawn at random.

    `pairs`: (id, input, output). `descriptions`: wordings of one and the same task. A row has
    instruction, input and output. A pair that stands there before goes as `repeated`.
    """
    seen = set()
    rows = []
    for number, (name, given, output) in enumerate(pairs):
        description = drawn_for("describe", seed, number).choice(descriptions)
        row = {"instruction": description, "input": given, "output": output}
        made = Made(f"describe {name}", row, "describe", (name,))
        key = folded(given), folded(output)
        if key in seen:
            made = made._replace(rule="repeated", reason="stands there before")
        seen.add(key)
        rows.append(made)
    return rows
