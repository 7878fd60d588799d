"""Ranges of a configuration's numbers: a table beside its fields, checked as it is made.

A number without a line in a table has the usual range: an integer is at least 0, a float finite.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime.errors import UserError


class Range(NamedTuple):
    """Numbers from `low` to `high`; without a bound, -inf and inf. NaN is in no range."""

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    """`low` itself is out."""
    without_high: bool = False
    """`high` itself is out."""
    takes_inf: bool = False
    """Infinity is in, where there is no `high`: it stands for no limit."""

    def admits(self, number: float) -> bool:
        """Tell if `number` is in the range; -inf and NaN never are."""
        if math.isinf(number):
            return number > 0 and self.takes_inf
        above = number > self.low if self.without_low else number >= self.low
        below = number < self.high if self.without_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'above' if self.without_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"{'below' if self.without_high else 'at most'} {_shown(self.high)}")
        words = " and ".join(bounds) or "a finite number"
        return f"{words} (inf: no limit)" if self.takes_inf else words


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


AT_LEAST_0 = Range(low=0)
AT_LEAST_1 = Range(low=1)
ABOVE_0 = Range(low=0, without_low=True)
ABOVE_0_OR_INF = Range(low=0, without_low=True, takes_inf=True)
FROM_0_TO_1 = Range(low=0, high=1)
BELOW_1 = Range(low=0, high=1, without_high=True)
FINITE = Range()

Ranges = Mapping[str, Range]
"""Ranges by the field's name. That of a tuple holds for each of its numbers."""

SCRIPTS: Ranges = {
    # Sizes of a run. JAX's random keys hold 32 bits of a seed: more would be cut off.
    "steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "length": AT_LEAST_1,
    "microbatches": AT_LEAST_1,
    "minibatches": AT_LEAST_1,
    "minibatch_size": AT_LEAST_1,
    "epochs": AT_LEAST_1,
    "max_rounds": AT_LEAST_1,
    "rounds": AT_LEAST_1,
    "seed": Range(low=0, high=2**32 - 1),
    "seeds": Range(low=0, high=2**32 - 1),
    "keep_checkpoints": AT_LEAST_1,
    "eval_records": AT_LEAST_1,
    # Prompts and responses.
    "max_prompt": AT_LEAST_1,
    "max_new_tokens": AT_LEAST_1,
    "samples_per_prompt": AT_LEAST_1,
    "samples": AT_LEAST_1,
    "prompts": AT_LEAST_1,
    "completions": AT_LEAST_1,
    "beams": AT_LEAST_1,
    "branch": AT_LEAST_1,
    "n": AT_LEAST_1,
    # Rows of data that are chosen, and among which.
    "k": ABOVE_0,
    "rows": AT_LEAST_1,
    "most": AT_LEAST_1,
    "records": AT_LEAST_1,
    "project": AT_LEAST_1,
    "validation_records": AT_LEAST_1,
    "temperature": AT_LEAST_0,
    "top_p": Range(low=0, high=1, without_low=True),
    "port": Range(low=0, high=65535),
    "max_mib": AT_LEAST_1,
    # Losses and rewards.
    "gamma": FROM_0_TO_1,
    "gae_lambda": FROM_0_TO_1,
    "clip": ABOVE_0_OR_INF,
    "clip_high": ABOVE_0_OR_INF,
    "value_clip": ABOVE_0_OR_INF,
    "kl_coef": AT_LEAST_0,
    "kl_target": ABOVE_0,
    "kl_horizon": AT_LEAST_1,
    "kl_limit": ABOVE_0_OR_INF,
    "entropy_coef": AT_LEAST_0,
    "ptx_coef": AT_LEAST_0,
    "lm_coef": AT_LEAST_0,
    "center_rewards_coef": AT_LEAST_0,
    "beta": ABOVE_0,
    "weight": AT_LEAST_0,
    "desirable_weight": AT_LEAST_0,
    "undesirable_weight": AT_LEAST_0,
    "simpo_margin": AT_LEAST_0,
    "delta": ABOVE_0,
    "label_smoothing": Range(low=0, high=0.5, without_high=True),
    "overlong": FROM_0_TO_1,
    "alpha": FROM_0_TO_1,
    "tau": ABOVE_0,
    "on_policy": FROM_0_TO_1,
    "check": FROM_0_TO_1,
    "shaping": AT_LEAST_0,
    "reliability": FROM_0_TO_1,
    "reliabilities": FROM_0_TO_1,
    "near": FROM_0_TO_1,
    "perplexity_share": FROM_0_TO_1,
    "least_good": FROM_0_TO_1,
    "least_score": Range(low=1, high=5),
    "noise": AT_LEAST_0,
}
"""Ranges of what scripts have in common, whichever script has it: a name has one meaning."""


def check_ranges(config: Any, ranges: Ranges, prefix: str = "") -> None:
    """Raise OutOfRange for the first number of the dataclass `config` that is out of its range.

    `ranges`: by field. `prefix`: what the flags of `config` begin with, such as `model.`.
    Dataclasses within it are not looked into.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # One number, or several; None and other types have no range.
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            usual = AT_LEAST_0 if isinstance(number, int) else FINITE
            allowed = ranges.get(field.name, usual)
            if not allowed.admits(number):
                raise OutOfRange(prefix, field.name, number, allowed)


class OutOfRange(UserError):
    """A number out of its range; `field` and `fault` let flags.py name another flag."""

    def __init__(self, prefix: str, field: str, number: float, allowed: Range):
        self.field = field
        self.fault = f"{number}: must be {allowed}"
        super().__init__(f"--{prefix}{field}={self.fault}")
