"""Judge the claims of the README by results.jsonl, and write its tables and figure.

    python -m experiments.data_sampling.verdicts

Thresholds are the README's, declared before any run. A verdict is confirmed, refuted, undecided
(an interval holds both, or some of the runs are missing) or not run.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from evaluation import fits
from evaluation.intervals import Interval
from experiments.curves import Series, draw
from experiments.data_sampling import pools
from experiments.data_sampling.runs import (
    BATCH,
    BUDGETS,
    HERE,
    LITTLE,
    Run,
    Schedule,
    plan,
    read_results,
)
from experiments.data_sampling.runs import Config as StudyConfig
from experiments.methods.table import table
from experiments.seeds import half
from runtime import flags
from runtime.errors import require
from runtime.writes import atomic_text

FIRST = "<!-- written by python -m experiments.data_sampling.verdicts -->"
LAST = "<!-- end -->"
RIVALS = (fits.LINE, fits.LOGARITHM, fits.POWER)
"""Curves that the plateau must beat."""
LEAST_R_SQUARED = 0.95
LEAST_SHARE = 0.90
LEAST_LOW_END = 0.85
"""Share of the gain that little data must keep, and the lower end of its interval."""
LEAST_SAVED = 0.90
LEVEL = 0.05
"""Chance of any false difference among all comparisons."""
ERRORS = 2.0
"""Standard errors that a fall from the peak must exceed."""
FEWEST_SEEDS = 4
"""Seeds below which nothing is judged: half of them are fitted, half are not."""

Results = dict[Run, dict[str, Any]]
BySeed = dict[int, float]


class Finding(NamedTuple):
    """What was found on a claim, in one setting."""

    claim: str
    setting: str
    seeds: int
    found: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Config:
    results: str = str(HERE / "results.jsonl")
    """Lines of experiments.data_sampling.runs."""
    readme: str = str(HERE / "README.md")
    """Page with the tables, between two marks."""
    pilot: str = str(HERE / "pilot.jsonl")
    """Lines of experiments.data_sampling.pilot."""
    chosen: str = str(HERE / "chosen.jsonl")
    """Lines of experiments.data_sampling.chosen."""
    figure: str = str(HERE / "curves.png")
    """Figure to write."""


# ---- Scores ----


def gold_of(
    results: Results,
    pool: str,
    aligner: str,
    sampler: str,
    budget: float,
    schedule: Schedule = "own",
    measure: str = "gold",
) -> BySeed:
    """Return the gold share of each seed that has run; budget 0 is the SFT model.

    At 100 % all samplers take the same rows, and both schedules are one. `measure`: another name
    in a line of results.jsonl.
    """
    # How the lines of the SFT model and of all data are named.
    if budget in (0, 100):
        schedule = "own"
    if budget == 0:
        pool = "clean"
        aligner = "dpo"
        sampler = "none"
    elif budget == 100:
        sampler = "all"

    # All seeds of that name.
    wanted = (pool, aligner, sampler, budget, schedule)
    scores = {}
    for run, row in results.items():
        *named, seed = run
        if tuple(named) == wanted:
            scores[seed] = row[measure]
    return scores


def in_common(*parts: BySeed) -> np.ndarray:
    """Return the scores of the seeds that all parts have, [parts, seeds]."""
    seeds = set(parts[0])
    for part in parts:
        seeds &= part.keys()
    rows = []
    for part in parts:
        rows.append([part[seed] for seed in sorted(seeds)])
    return np.array(rows)


def curves_of(results: Results, aligner: str, *cells: tuple[str, str]) -> list[np.ndarray]:
    """Return for each cell, a pool and a sampler, the scores at budget 0 and BUDGETS.

    [1 + budgets, seeds], of the seeds that have run at every budget of every cell.
    """
    parts = []
    for pool, sampler in cells:
        for budget in (0, *BUDGETS):
            parts.append(gold_of(results, pool, aligner, sampler, budget))
    return np.split(in_common(*parts), len(cells))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean over seeds with its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    spread = half(list(values))
    return Interval(mean, mean - spread, mean + spread)


def ends(found: Interval) -> str:
    """Show a value and the ends of its interval."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def not_enough(claim: str, setting: str, seeds: int) -> Finding:
    """Return the finding of a setting that too few seeds have run."""
    verdict = "not run" if seeds == 0 else "undecided: few seeds"
    return Finding(claim, setting, seeds, "", verdict)


def sign_verdict(difference: Interval) -> str:
    """Return the verdict on the claim that a difference is below 0."""
    if difference.high < 0:
        return "confirmed"
    if difference.low > 0:
        return "refuted"
    return "undecided"


# ---- 1. Plateau ----


def held_out_aic(curve: fits.Curve, x_N: np.ndarray, y_NS: np.ndarray) -> tuple[float, float]:
    """Return AIC and R^2 of a curve on seeds that were not fitted, each half fitted in turn.

    `y_NS`: scores at the budgets `x_N`. AIC is the sum of both halves, R^2 the lower one.
    """
    even_NS = y_NS[:, ::2]
    odd_NS = y_NS[:, 1::2]
    aic = 0.0
    r_squared = 1.0
    for fitted_NS, tested_NS in ((even_NS, odd_NS), (odd_NS, even_NS)):
        # Fitted to points of single seeds, not to means.
        x = np.repeat(x_N, fitted_NS.shape[1])
        found = fits.fit(curve, x, fitted_NS.ravel())

        # Judged on the other seeds' points.
        x = np.repeat(x_N, tested_NS.shape[1])
        tested = tested_NS.ravel()
        expected = curve.value(x, **found.parameters)
        aic += fits.aic(expected - tested, len(found.parameters))
        r_squared = min(r_squared, fits.r_squared(tested, expected))
    return aic, r_squared


def plateau(results: Results, draws: int = fits.DRAWS) -> list[Finding]:
    """Judge claim 1, by the curve of random rows of the clean pool; `draws` of the bootstrap."""
    return [plateau_of(results, aligner, draws) for aligner in BATCH]


def plateau_of(results: Results, aligner: str, draws: int) -> Finding:
    """Judge claim 1 for one aligner."""
    claim = "1. plateau"
    setting = f"clean, {aligner}, random"
    (y_NS,) = curves_of(results, aligner, ("clean", "random"))
    seeds = y_NS.shape[1]
    if seeds < FEWEST_SEEDS:
        return not_enough(claim, setting, seeds)

    # The plateau, and the best of its rivals, on seeds that were not fitted.
    x_N = np.array([0, *BUDGETS], float)
    aic, r_squared = held_out_aic(fits.PLATEAU, x_N, y_NS)
    rivals = {}
    for curve in RIVALS:
        rivals[curve.name], _ = held_out_aic(curve, x_N, y_NS)
    best = min(rivals, key=rivals.__getitem__)

    # Its rate; one at the least that is searched makes a line.
    rate = fits.bootstrap(fits.PLATEAU, x_N, y_NS.T, draws=draws)["b"]
    rate_bounds, *_ = fits.PLATEAU.bounds(x_N)
    least, *_ = rate_bounds
    conditions = {
        "AIC": aic < rivals[best],
        "R²": r_squared >= LEAST_R_SQUARED,
        "rate": rate.low > 1.01 * least,
    }
    fails = [name for name, holds in conditions.items() if not holds]
    verdict = f"refuted: {', '.join(fails)}" if fails else "confirmed"
    found = (
        f"AIC {aic:.1f}, {best} {rivals[best]:.1f}; R² {r_squared:.3f}; "
        f"rate {ends(rate)} per percent"
    )
    return Finding(claim, setting, seeds, found, verdict)


# ---- 2. Less than 10 % is comparable ----


def share_kept(none_S: np.ndarray, little_S: np.ndarray, all_S: np.ndarray) -> Interval:
    """Return (little - none) / (all - none) of the means, with its interval over seeds.

    Seeds are drawn with replacement (Efron 1979; percentiles 2.5 and 97.5).
    """
    seeds = len(none_S)
    gains = np.stack([little_S - none_S, all_S - none_S])
    little, whole = gains.mean(-1)
    share = float(little / whole)

    # The same of each draw of seeds.
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(fits.DRAWS, seeds))
    little_D, all_D = gains[:, drawn].mean(-1)
    low, high = np.percentile(little_D / all_D, [2.5, 97.5])
    return Interval(share, float(low), float(high))


def little_data(
    results: Results, names: Iterable[str] = tuple(pools.POOLS), schedule: Schedule = "own"
) -> list[Finding]:
    """Judge claim 2 in each pool of `names` and by each aligner, at the budget LITTLE."""
    findings = []
    for pool in names:
        for aligner in BATCH:
            findings.append(little_data_of(results, pool, aligner, schedule))
    return findings


def little_data_of(results: Results, pool: str, aligner: str, schedule: Schedule) -> Finding:
    """Judge claim 2 in one pool and by one aligner."""
    claim = f"2. isa_A at {LITTLE:g} %"
    if schedule == "equal_steps":
        claim += ", updates of all data"
    setting = f"{pool}, {aligner}"

    # The SFT model's gold, that of little data and that of all.
    parts = []
    for budget in (0, LITTLE, 100):
        parts.append(gold_of(results, pool, aligner, "isa_A", budget, schedule))
    scores = in_common(*parts)
    seeds = scores.shape[1]
    if seeds < FEWEST_SEEDS:
        return not_enough(claim, setting, seeds)
    none_S, little_S, all_S = scores
    gain = interval(all_S - none_S)
    found = f"gain of all data {ends(gain)}"
    if gain.low <= 0:
        # A share of nothing says nothing.
        return Finding(claim, setting, seeds, found, "undecided: all data gain nothing")

    share = share_kept(none_S, little_S, all_S)
    verdict = "undecided"
    if share.value >= LEAST_SHARE and share.low >= LEAST_LOW_END:
        verdict = "confirmed"
    elif share.high < LEAST_SHARE:
        verdict = "refuted"
    found = f"share of the gain {ends(share)}; {found}"
    return Finding(claim, setting, seeds, found, verdict)


# ---- 3. Better than others ----


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values corrected for all comparisons (Holm 1979), in their order."""
    order = np.argsort(p_values)
    count = len(p_values)
    corrected = np.empty(count)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, (count - rank) * p_values[place])
        corrected[place] = min(1.0, highest)
    return corrected


class Comparison(NamedTuple):
    """ISA's reading A against the best other sampler, paired by seed."""

    other: str
    difference: Interval
    p: float
    """Two-sided, of the paired t-test; not corrected."""


def compared(results: Results, pool: str, aligner: str, budget: float) -> Comparison | None:
    """Compare ISA with the best other sampler planned there; None for too few seeds."""
    # The other sampler with the highest mean. In damaged pools some have run, for one aligner, at
    # budgets that are no longer planned.
    planned = set(plan())
    ours = gold_of(results, pool, aligner, "isa_A", budget)
    best = None
    for other in pools.SAMPLERS:
        if other.startswith("isa"):
            continue
        if Run(pool, aligner, other, budget, "own", 0) not in planned:
            continue
        theirs = gold_of(results, pool, aligner, other, budget)
        pair = in_common(ours, theirs)
        if pair.shape[1] < FEWEST_SEEDS:
            continue
        if best is None or pair[1].mean() > best[1].mean():
            best = pair
            name = other
    if best is None:
        return None

    # The t-test has no p where no seed differs.
    isa_S, best_S = best
    difference_S = isa_S - best_S
    p = 1.0
    if difference_S.any():
        p = float(stats.ttest_rel(isa_S, best_S).pvalue)
    return Comparison(name, interval(difference_S), p)


def better(results: Results) -> list[Finding]:
    """Judge claim 3 over all pools, aligners and budgets below all data."""
    claim = "3. better than others"
    cells = list(itertools.product(pools.POOLS, BATCH, BUDGETS[:-1]))
    comparisons = {}
    for cell in cells:
        comparison = compared(results, *cell)
        if comparison is not None:
            comparisons[cell] = comparison
    if not comparisons:
        return [not_enough(claim, "all", 0)]

    # Differences that chance hardly explains, above 0 and below.
    differences = np.array([one.difference.value for one in comparisons.values()])
    corrected = holm([one.p for one in comparisons.values()])
    is_real = corrected < LEVEL
    is_above = differences > 0
    above = int((is_real & is_above).sum())
    below = int((is_real & ~is_above).sum())

    # Over all comparisons, the mean difference.
    others = sorted({one.other for one in comparisons.values()})
    mean = np.mean(differences)
    told = (
        f"above in {above}, below in {below} of {len(comparisons)} comparisons "
        f"({len(cells)} planned); mean difference {mean:+.3f}; best others: {', '.join(others)}"
    )
    verdict = "undecided"
    if above == len(cells):
        verdict = "confirmed"
    elif below or (len(comparisons) == len(cells) and above == 0):
        verdict = "refuted"
    seeds = fewest_seeds(results, comparisons)
    return [Finding(claim, "all that has run", seeds, told, verdict)]


def fewest_seeds(results: Results, cells: Iterable[tuple[str, str, float]]) -> int:
    """Return the fewest seeds that ISA has in any of the cells."""
    counts = []
    for pool, aligner, budget in cells:
        scores = gold_of(results, pool, aligner, "isa_A", budget)
        counts.append(len(scores))
    return min(counts)


# ---- 4. Savings ----


def savings(results: Results) -> list[Finding]:
    """Judge claim 4 by the FLOPs of runs on the clean pool, their selection counted."""
    return [savings_of(results, aligner) for aligner in BATCH]


def savings_of(results: Results, aligner: str) -> Finding:
    """Judge claim 4 for one aligner."""
    claim = "4. savings"
    setting = f"clean, {aligner}"

    # FLOPs do not depend on the seed: any line of a sampler and a budget has them.
    flops = {}
    for run, row in results.items():
        if run.pool == "clean" and run.aligner == aligner and run.schedule == "own":
            flops[run.sampler, run.budget] = row["flops"]
    fewest = BUDGETS[0]
    needed = (("isa_A", fewest), ("isa_A", LITTLE), ("all", 100))
    if not flops.keys() >= set(needed):
        return not_enough(claim, setting, 0)

    # Shares of the FLOPs of all data that are saved.
    whole = sum(flops["all", 100].values())
    least = 1 - sum(flops["isa_A", fewest].values()) / whole
    at_little = 1 - sum(flops["isa_A", LITTLE].values()) / whole
    training = 1 - flops["isa_A", LITTLE]["training"] / whole
    found = (
        f"saved at {LITTLE:g} % {at_little:.3f}, of training alone {training:.3f}; "
        f"at {fewest:g} % {least:.3f}"
    )

    # Confirmed only where what little data keep is enough too.
    kept = little_data_of(results, "clean", aligner, "own")
    verdict = "undecided"
    if max(least, at_little) <= LEAST_SAVED:
        verdict = "refuted"
    elif at_little > LEAST_SAVED and kept.verdict == "confirmed":
        verdict = "confirmed"
    seeds = len(gold_of(results, "clean", aligner, "isa_A", LITTLE))
    return Finding(claim, setting, seeds, found, verdict)


# ---- 5. Null controls ----


def shuffled(results: Results) -> list[Finding]:
    """Judge the first control of claim 5: ISA on shuffled embeddings equals random rows."""
    return [shuffled_of(results, aligner) for aligner in BATCH]


def over_budgets(difference_NS: np.ndarray) -> np.ndarray:
    """Return the mean of differences [1 + budgets, seeds] over budgets below all data, [seeds]."""
    return difference_NS[1:-1].mean(0)


def shuffled_of(results: Results, aligner: str) -> Finding:
    """Judge the first control of claim 5 for one aligner."""
    claim = "5. shuffled embeddings equal random"
    setting = f"clean, {aligner}"
    cells = (("clean", "isa_A" + pools.SHUFFLED), ("clean", "random"))
    control_NS, random_NS = curves_of(results, aligner, *cells)
    seeds = control_NS.shape[1]
    if seeds < FEWEST_SEEDS:
        return not_enough(claim, setting, seeds)

    difference = interval(over_budgets(control_NS - random_NS))
    verdict = "confirmed" if difference.low <= 0 <= difference.high else "refuted"
    found = f"mean difference over budgets {ends(difference)}"
    return Finding(claim, setting, seeds, found, verdict)


def duplicates(results: Results) -> list[Finding]:
    """Judge the second control of claim 5: duplicates break reading A less than random."""
    return [duplicates_of(results, aligner) for aligner in BATCH]


def duplicates_of(results: Results, aligner: str) -> Finding:
    """Judge the second control of claim 5 for one aligner."""
    claim = "5. duplicates break reading A less"
    setting = f"clean and duplicates, {aligner}"
    isa_NS, broken_isa_NS, random_NS, broken_random_NS = curves_of(
        results,
        aligner,
        ("clean", "isa_A"),
        ("duplicates", "isa_A"),
        ("clean", "random"),
        ("duplicates", "random"),
    )
    seeds = isa_NS.shape[1]
    if seeds < FEWEST_SEEDS:
        return not_enough(claim, setting, seeds)

    # What each loses by them.
    lost_isa_S = over_budgets(isa_NS - broken_isa_NS)
    lost_random_S = over_budgets(random_NS - broken_random_NS)
    difference = interval(lost_isa_S - lost_random_S)
    found = (
        f"lost by duplicates, mean over budgets: isa_A {lost_isa_S.mean():.3f}, random "
        f"{lost_random_S.mean():.3f}, difference {ends(difference)}"
    )
    return Finding(claim, setting, seeds, found, sign_verdict(difference))


# ---- 6. Plateau against hump ----


def hump(results: Results) -> list[Finding]:
    """Judge claim 6: on random rows DPO falls from its peak to all data, KTO does not."""
    claim = "6. dpo humps, kto plateaus"
    falls = {}
    told = []
    counts = []
    for aligner in BATCH:
        # Without the SFT model, budget 0.
        (curve_NS,) = curves_of(results, aligner, ("clean", "random"))
        y_NS = curve_NS[1:]
        seeds = y_NS.shape[1]
        counts.append(seeds)
        if seeds < FEWEST_SEEDS:
            return [not_enough(claim, "clean, random", seeds)]

        # From the budget with the highest mean to all data, seed by seed.
        mean_N = y_NS.mean(1)
        peak = int(mean_N.argmax())
        fall_S = y_NS[peak] - y_NS[-1]
        fall = fall_S.mean()
        error = float(np.std(fall_S, ddof=1) / seeds**0.5)
        falls[aligner] = bool(fall > ERRORS * error)
        told.append(
            f"{aligner} peaks at {BUDGETS[peak]:g} % with {y_NS[peak].mean():.3f} and falls by "
            f"{fall:.3f}, standard error {error:.3f}"
        )
    verdict = "confirmed" if falls["dpo"] and not falls["kto"] else "refuted"
    return [Finding(claim, "clean, random", min(counts), "; ".join(told), verdict)]


# ---- The page ----


def verdict_table(results: Results) -> str:
    """Tabulate all claims in the README's order; what has not run of a claim is one row."""
    findings = plateau(results)
    findings += little_data(results)
    findings += little_data(results, ("clean",), "equal_steps")
    findings += better(results)
    findings += savings(results)
    findings += shuffled(results)
    findings += duplicates(results)
    findings += hump(results)

    # The settings of each claim that have not run.
    missing: dict[str, list[str]] = {}
    for one in findings:
        if one.verdict == "not run":
            missing.setdefault(one.claim, []).append(one.setting)

    # Their one row stands where the first of them would.
    lines = []
    for one in findings:
        if one.verdict != "not run":
            lines.append([one.claim, one.setting, str(one.seeds), one.found, one.verdict])
        elif one.claim in missing:
            settings = "; ".join(missing.pop(one.claim))
            lines.append([one.claim, settings, "0", "", "not run"])
    return table(["claim", "setting", "seeds", "found", "verdict"], lines)


def score_table(results: Results, measure: str) -> str:
    """Tabulate `measure` by budget, mean over seeds, of all that has run, in the plan's order."""
    # Each cell once: a dict keeps the order.
    places = {}
    for run in plan():
        if run in results and run.sampler in pools.SAMPLERS:
            places[run.pool, run.schedule, run.aligner, run.sampler] = True

    # A line's number of seeds is that of its own runs, not of the SFT model's or all data's.
    lines = []
    for pool, schedule, aligner, sampler in places:
        shown = []
        most = 0
        for budget in (0, *BUDGETS):
            scores = gold_of(results, pool, aligner, sampler, budget, schedule, measure)
            shown.append(cell_of(list(scores.values())))
            if budget not in (0, 100):
                most = max(most, len(scores))
        lines.append([pool, schedule, aligner, sampler, str(most), *shown])
    head = ["pool", "schedule", "aligner", "sampler", "seeds", "SFT"]
    return table([*head, *(f"{x:g} %" for x in BUDGETS)], lines)


def pilot_table(path: str) -> str:
    """Tabulate gold by learning rate, of the one seed that rates were chosen on."""
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    rates = sorted({line["rate"] for line in lines})

    # By aligner and budget, the gold of each rate.
    golds: dict[tuple[str, float], dict[float, float]] = {}
    for line in lines:
        by_rate = golds.setdefault((line["aligner"], line["budget"]), {})
        by_rate[line["rate"]] = line["gold"]
    rows = []
    for aligner, budget in sorted(golds):
        by_rate = golds[aligner, budget]
        shown = [f"{by_rate[rate]:.3f}" for rate in rates]
        rows.append([aligner, f"{budget} %", *shown])
    return table(["aligner", "budget", *(f"{rate:g}" for rate in rates)], rows)


def chosen_table(path: str) -> str:
    """Tabulate the share of desirable rows among those chosen, mean over seeds."""
    # By sampler and budget, the share of each seed.
    shares: dict[str, dict[float, list[float]]] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        row = json.loads(line)
        by_budget = shares.setdefault(row["sampler"], {})
        by_budget.setdefault(row["budget"], []).append(row["desirable"])
    rows = []
    for sampler, by_budget in shares.items():
        shown = [cell_of(by_budget[budget]) for budget in BUDGETS[:-1]]
        rows.append([sampler, *shown])
    return table(["sampler", *(f"{budget:g} %" for budget in BUDGETS[:-1])], rows)


def seconds_line(results: Results) -> str:
    """Say what an update and judging took, median over runs on the machine at hand."""
    told = []
    for aligner in BATCH:
        # The SFT model takes no steps.
        trained = [row for run, row in results.items() if row["steps"] and run.aligner == aligner]
        if not trained:
            continue
        a_step = np.median([row["train_seconds"] / row["steps"] for row in trained])
        judging = np.median([row["judge_seconds"] for row in trained])
        told.append(f"an update of {aligner} took {1000 * a_step:.0f} ms, judging {judging:.1f} s")
    if not told:
        return ""
    return f"Wall time, median over runs: {'; '.join(told)}."


def cell_of(values: Sequence[float]) -> str:
    """Show a mean with half of its interval."""
    if not values:
        return ""
    spread = f" ±{half(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def series_of(results: Results) -> list[Series]:
    """Return the clean pool's curves over the budgets, means over seeds with intervals."""
    curves = []
    for aligner in BATCH:
        for sampler in ("random", "isa_A"):
            (curve_NS,) = curves_of(results, aligner, ("clean", sampler))
            # Budget 0 has no place on a logarithmic axis; one seed has no interval.
            y_NS = curve_NS[1:]
            if y_NS.shape[1] < 2:
                continue
            means = list(y_NS.mean(1))
            errors = [half(list(row)) for row in y_NS]
            curves.append(Series(f"{aligner}, {sampler}", BUDGETS, means, errors))
    return curves


def main(config: Config) -> dict[str, int]:
    """Write the tables and the figure; return the counts of runs `done` and `planned`."""
    for path in (config.results, config.pilot, config.chosen, config.readme):
        require(pathlib.Path(path).is_file(), f"{path}: no such file; name another")
    page = pathlib.Path(config.readme).read_text("utf-8")
    before, _, rest = page.partition(FIRST)
    _, last, after = rest.partition(LAST)
    require(bool(last), f"--readme={config.readme}: lacks the marks {FIRST} and {LAST}")
    results = read_results(config.results)
    planned = plan()
    done = len([run for run in planned if run in results])

    # The tables.
    parts = [
        f"{done} of {len(planned)} runs are done. {seconds_line(results)}",
        verdict_table(results).strip(),
        f"Gold: the share of {StudyConfig().prompts} held-out prompts that pass all criteria, "
        "mean over seeds, ± half of the 95 % interval.",
        score_table(results, "gold").strip(),
        "Win rate against demonstrations, likewise: more criteria pass; ties count half.",
        score_table(results, "win_rate").strip(),
        "Share of desirable rows among those chosen for KTO in the clean pool, of which half are:",
        chosen_table(config.chosen).strip(),
        "Gold by the learning rate, the pilot's seed alone:",
        pilot_table(config.pilot).strip(),
    ]
    body = "\n\n".join(parts)

    # Between the page's marks, and the figure.
    with atomic_text(config.readme) as file:
        file.write(f"{before}{FIRST}\n\n{body}\n\n{LAST}{after}")
    curves = series_of(results)
    if curves:
        draw(curves, "percent of the pool", "gold", config.figure, log=True)
    print(f"{config.readme}: {done} of {len(planned)} runs")
    return {"done": done, "planned": len(planned)}


if __name__ == "__main__":
    flags.run(main, Config)
