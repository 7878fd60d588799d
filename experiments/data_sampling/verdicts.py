"""Judge the claims of the README by results.jsonl, and write its tables and figure.

    python -m experiments.data_sampling.verdicts

Thresholds are the README's, declared before any run. A verdict is confirmed, refuted, undecided
(an interval holds both, or some of the runs are missing) or not run.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
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
    if budget in (0, 100):
        schedule = "own"
    if budget == 0:
        pool, aligner, sampler = "clean", "dpo", "none"
    elif budget == 100:
        sampler = "all"
    scores = {}
    for run, row in results.items():
        same = (run.pool, run.aligner, run.sampler) == (pool, aligner, sampler)
        if same and run.budget == budget and run.schedule == schedule:
            scores[run.seed] = row[measure]
    return scores


def in_common(*parts: BySeed) -> np.ndarray:
    """Return the scores of the seeds that all parts have, [parts, seeds]."""
    seeds = sorted(set.intersection(*(set(part) for part in parts)))
    return np.array([[part[seed] for seed in seeds] for part in parts])


def curves_of(results: Results, aligner: str, *cells: tuple[str, str]) -> list[np.ndarray]:
    """Return for each cell, a pool and a sampler, the scores at budget 0 and BUDGETS.

    [1 + budgets, seeds], of the seeds that have run at every budget of every cell.
    """
    parts = []
    for pool, sampler in cells:
        parts += [gold_of(results, pool, aligner, sampler, x) for x in (0, *BUDGETS)]
    return np.split(in_common(*parts), len(cells))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean over seeds with its 95 % interval (Student's t)."""
    mean = float(np.mean(values))
    return Interval(mean, mean - half(list(values)), mean + half(list(values)))


def ends(found: Interval) -> str:
    """Show a value and the ends of its interval."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def not_enough(claim: str, setting: str, seeds: int) -> Finding:
    return Finding(claim, setting, seeds, "", "not run" if seeds == 0 else "undecided: few seeds")


# ---- 1. Plateau ----


def held_out_aic(curve: fits.Curve, x_N: np.ndarray, y_NS: np.ndarray) -> tuple[float, float]:
    """Return AIC and R^2 of a curve on seeds that were not fitted, each half fitted in turn.

    `y_NS`: scores at the budgets `x_N`. AIC is the sum of both halves, R^2 the lower one.
    """
    aic = 0.0
    r_squared = 1.0
    for fitted, tested in ((y_NS[:, ::2], y_NS[:, 1::2]), (y_NS[:, 1::2], y_NS[:, ::2])):
        # Points of single seeds, not means.
        found = fits.fit(curve, np.repeat(x_N, fitted.shape[1]), fitted.ravel())
        x = np.repeat(x_N, tested.shape[1])
        expected = curve.value(x, **found.parameters)
        aic += fits.aic(expected - tested.ravel(), len(found.parameters))
        r_squared = min(r_squared, fits.r_squared(tested.ravel(), expected))
    return aic, r_squared


def plateau(results: Results, draws: int = fits.DRAWS) -> list[Finding]:
    """Judge claim 1, by the curve of random rows of the clean pool; `draws` of the bootstrap."""
    claim = "1. plateau"
    findings = []
    for aligner in BATCH:
        (y_NS,) = curves_of(results, aligner, ("clean", "random"))
        seeds = y_NS.shape[1]
        setting = f"clean, {aligner}, random"
        if seeds < FEWEST_SEEDS:
            findings.append(not_enough(claim, setting, seeds))
            continue
        x_N = np.array([0, *BUDGETS], float)
        aic, r_squared = held_out_aic(fits.PLATEAU, x_N, y_NS)
        rivals = {curve.name: held_out_aic(curve, x_N, y_NS)[0] for curve in RIVALS}
        best = min(rivals, key=rivals.__getitem__)
        rate = fits.bootstrap(fits.PLATEAU, x_N, y_NS.T, draws=draws)["b"]
        # A rate at the least one searched is a line.
        least = fits.PLATEAU.bounds(x_N)[0][0]
        conditions = {
            "AIC": aic < rivals[best],
            "R²": r_squared >= LEAST_R_SQUARED,
            "rate": rate.low > 1.01 * least,
        }
        fails = [name for name, holds in conditions.items() if not holds]
        found = (
            f"AIC {aic:.1f}, {best} {rivals[best]:.1f}; R² {r_squared:.3f}; "
            f"rate {ends(rate)} per percent"
        )
        verdict = f"refuted: {', '.join(fails)}" if fails else "confirmed"
        findings.append(Finding(claim, setting, seeds, found, verdict))
    return findings


# ---- 2. Less than 10 % is comparable ----


def share_kept(none_S: np.ndarray, little_S: np.ndarray, all_S: np.ndarray) -> Interval:
    """Return (little - none) / (all - none) of the means, with its interval over seeds.

    Seeds are drawn with replacement (Efron 1979; percentiles 2.5 and 97.5).
    """
    rng = np.random.default_rng(0)
    gains = np.stack([little_S - none_S, all_S - none_S])
    drawn = rng.integers(len(none_S), size=(fits.DRAWS, len(none_S)))
    little_D, all_D = gains[:, drawn].mean(-1)
    low, high = np.percentile(little_D / all_D, [2.5, 97.5])
    little, whole = gains.mean(-1)
    return Interval(float(little / whole), float(low), float(high))


def little_data(
    results: Results, names: Iterable[str] = tuple(pools.POOLS), schedule: Schedule = "own"
) -> list[Finding]:
    """Judge claim 2 in each pool of `names` and by each aligner, at the budget LITTLE."""
    claim = f"2. isa_A at {LITTLE:g} %"
    if schedule == "equal_steps":
        claim += ", updates of all data"
    findings = []
    for pool in names:
        for aligner in BATCH:
            where = (results, pool, aligner, "isa_A")
            parts = [gold_of(*where, x, schedule) for x in (0, LITTLE, 100)]
            scores = in_common(*parts)
            seeds = scores.shape[1]
            setting = f"{pool}, {aligner}"
            if seeds < FEWEST_SEEDS:
                findings.append(not_enough(claim, setting, seeds))
                continue
            gain = interval(scores[2] - scores[0])
            share = share_kept(*scores)
            verdict = "undecided"
            if gain.low <= 0:
                verdict = "undecided: all data gain nothing"
            elif share.value >= LEAST_SHARE and share.low >= LEAST_LOW_END:
                verdict = "confirmed"
            elif share.high < LEAST_SHARE:
                verdict = "refuted"
            found = f"share of the gain {ends(share)}; gain of all data {ends(gain)}"
            findings.append(Finding(claim, setting, seeds, found, verdict))
    return findings


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
    """Compare ISA with the best other sampler that has run there; None for too few seeds."""
    ours = gold_of(results, pool, aligner, "isa_A", budget)
    best = None
    for other in pools.SAMPLERS:
        if other.startswith("isa"):
            continue
        pair = in_common(ours, gold_of(results, pool, aligner, other, budget))
        if pair.shape[1] >= FEWEST_SEEDS and (best is None or pair[1].mean() > best[1].mean()):
            best = pair
            name = other
    if best is None:
        return None
    difference_S = best[0] - best[1]
    p = float(stats.ttest_rel(best[0], best[1]).pvalue) if difference_S.any() else 1.0
    return Comparison(name, interval(difference_S), p)


def better(results: Results) -> list[Finding]:
    """Judge claim 3 over all pools, aligners and budgets below all data."""
    claim = "3. better than others"
    cells = [(pool, aligner, x) for pool in pools.POOLS for aligner in BATCH for x in BUDGETS[:-1]]
    found = {cell: compared(results, *cell) for cell in cells}
    comparisons = {cell: one for cell, one in found.items() if one is not None}
    if not comparisons:
        return [not_enough(claim, "all", 0)]
    corrected = holm([one.p for one in comparisons.values()])
    is_real = corrected < LEVEL
    is_above = np.array([one.difference.value > 0 for one in comparisons.values()])
    above = int((is_real & is_above).sum())
    below = int((is_real & ~is_above).sum())

    # By every pool and aligner, the mean difference.
    others = sorted({one.other for one in comparisons.values()})
    mean = np.mean([one.difference.value for one in comparisons.values()])
    told = (
        f"above in {above}, below in {below} of {len(comparisons)} comparisons "
        f"({len(cells)} planned); mean difference {mean:+.3f}; best others: {', '.join(others)}"
    )
    verdict = "undecided"
    if above == len(cells):
        verdict = "confirmed"
    elif below or (len(comparisons) == len(cells) and above == 0):
        verdict = "refuted"
    return [Finding(claim, "all that has run", fewest_seeds(results, comparisons), told, verdict)]


def fewest_seeds(results: Results, cells: Iterable[tuple[str, str, float]]) -> int:
    """Return the fewest seeds that ISA has in any of the cells."""
    return min(len(gold_of(results, pool, aligner, "isa_A", x)) for pool, aligner, x in cells)


# ---- 4. Savings ----


def savings(results: Results) -> list[Finding]:
    """Judge claim 4 by the FLOPs of runs on the clean pool, their selection counted."""
    claim = "4. savings"
    kept = {one.setting: one.verdict for one in little_data(results)}
    findings = []
    for aligner in BATCH:
        flops = {}
        for run, row in results.items():
            if run.pool == "clean" and run.aligner == aligner and run.schedule == "own":
                flops[run.sampler, run.budget] = row["flops"]
        needed = [("isa_A", BUDGETS[0]), ("isa_A", LITTLE), ("all", 100)]
        if any(cell not in flops for cell in needed):
            findings.append(not_enough(claim, f"clean, {aligner}", 0))
            continue
        whole = sum(flops["all", 100].values())
        least = 1 - sum(flops["isa_A", BUDGETS[0]].values()) / whole
        at_little = 1 - sum(flops["isa_A", LITTLE].values()) / whole
        training = 1 - flops["isa_A", LITTLE]["training"] / whole
        found = (
            f"saved at {LITTLE:g} % {at_little:.3f}, of training alone {training:.3f}; "
            f"at {BUDGETS[0]:g} % {least:.3f}"
        )
        verdict = "undecided"
        if max(least, at_little) <= LEAST_SAVED:
            verdict = "refuted"
        elif at_little > LEAST_SAVED and kept[f"clean, {aligner}"] == "confirmed":
            verdict = "confirmed"
        seeds = len(gold_of(results, "clean", aligner, "isa_A", LITTLE))
        findings.append(Finding(claim, f"clean, {aligner}", seeds, found, verdict))
    return findings


# ---- 5. Null controls ----


def shuffled(results: Results) -> list[Finding]:
    """Judge the first control of claim 5: ISA on shuffled embeddings equals random rows."""
    claim = "5. shuffled embeddings equal random"
    findings = []
    for aligner in BATCH:
        cells = (("clean", "isa_A" + pools.SHUFFLED), ("clean", "random"))
        control_NS, random_NS = curves_of(results, aligner, *cells)
        seeds = control_NS.shape[1]
        setting = f"clean, {aligner}"
        if seeds < FEWEST_SEEDS:
            findings.append(not_enough(claim, setting, seeds))
            continue
        # Budgets below all data; budget 0 comes first.
        difference = interval((control_NS - random_NS)[1:-1].mean(0))
        verdict = "confirmed" if difference.low <= 0 <= difference.high else "refuted"
        found = f"mean difference over budgets {ends(difference)}"
        findings.append(Finding(claim, setting, seeds, found, verdict))
    return findings


def duplicates(results: Results) -> list[Finding]:
    """Judge the second control of claim 5: duplicates break reading A less than random."""
    claim = "5. duplicates break reading A less"
    findings = []
    for aligner in BATCH:
        cells = [(pool, by) for by in ("isa_A", "random") for pool in ("clean", "duplicates")]
        isa_NS, broken_isa_NS, random_NS, broken_random_NS = curves_of(results, aligner, *cells)
        seeds = isa_NS.shape[1]
        setting = f"clean and duplicates, {aligner}"
        if seeds < FEWEST_SEEDS:
            findings.append(not_enough(claim, setting, seeds))
            continue
        lost_isa_S = (isa_NS - broken_isa_NS)[1:-1].mean(0)
        lost_random_S = (random_NS - broken_random_NS)[1:-1].mean(0)
        difference = interval(lost_isa_S - lost_random_S)
        verdict = "undecided"
        if difference.high < 0:
            verdict = "confirmed"
        elif difference.low > 0:
            verdict = "refuted"
        found = (
            f"lost by duplicates, mean over budgets: isa_A {lost_isa_S.mean():.3f}, random "
            f"{lost_random_S.mean():.3f}, difference {ends(difference)}"
        )
        findings.append(Finding(claim, setting, seeds, found, verdict))
    return findings


# ---- 6. Plateau against hump ----


def hump(results: Results) -> list[Finding]:
    """Judge claim 6: on random rows DPO falls from its peak to all data, KTO does not."""
    claim = "6. dpo humps, kto plateaus"
    falls = {}
    told = []
    counts = []
    for aligner in BATCH:
        (curve_NS,) = curves_of(results, aligner, ("clean", "random"))
        y_NS = curve_NS[1:]
        counts.append(y_NS.shape[1])
        if counts[-1] < FEWEST_SEEDS:
            return [not_enough(claim, "clean, random", counts[-1])]
        peak = int(y_NS.mean(1).argmax())
        fall_S = y_NS[peak] - y_NS[-1]
        error = float(np.std(fall_S, ddof=1) / len(fall_S) ** 0.5)
        falls[aligner] = bool(fall_S.mean() > ERRORS * error)
        told.append(
            f"{aligner} peaks at {BUDGETS[peak]:g} % with {y_NS[peak].mean():.3f} and falls by "
            f"{fall_S.mean():.3f}, standard error {error:.3f}"
        )
    verdict = "confirmed" if falls["dpo"] and not falls["kto"] else "refuted"
    return [Finding(claim, "clean, random", min(counts), "; ".join(told), verdict)]


# ---- The page ----


def verdict_table(results: Results) -> str:
    """Tabulate all claims in the README's order; what has not run of a claim is one row."""
    findings = plateau(results) + little_data(results)
    findings += little_data(results, ("clean",), "equal_steps")
    findings += better(results) + savings(results)
    findings += shuffled(results) + duplicates(results) + hump(results)
    lines = []
    missing: dict[str, list[str]] = {}
    for one in findings:
        if one.verdict == "not run":
            missing.setdefault(one.claim, []).append(one.setting)
    for one in findings:
        if one.verdict != "not run":
            lines.append([one.claim, one.setting, str(one.seeds), one.found, one.verdict])
        elif one.claim in missing:
            settings = "; ".join(missing.pop(one.claim))
            lines.append([one.claim, settings, "0", "", "not run"])
    return table(["claim", "setting", "seeds", "found", "verdict"], lines)


def score_table(results: Results, measure: str) -> str:
    """Tabulate `measure` by budget, mean over seeds, of all that has run, in the plan's order."""
    places = {}
    for run in plan():
        if run in results and run.sampler in pools.SAMPLERS:
            places[run.pool, run.schedule, run.aligner, run.sampler] = True
    lines = []
    for pool, schedule, aligner, sampler in places:
        where = (results, pool, aligner, sampler)
        cells = [gold_of(*where, x, schedule, measure) for x in (0, *BUDGETS)]
        most = max(len(cell) for cell in cells[1:-1])
        shown = [cell_of(list(cell.values())) for cell in cells]
        lines.append([pool, schedule, aligner, sampler, str(most), *shown])
    head = ["pool", "schedule", "aligner", "sampler", "seeds", "SFT"]
    return table([*head, *(f"{x:g} %" for x in BUDGETS)], lines)


def pilot_table(path: str) -> str:
    """Tabulate gold by learning rate, of the one seed that rates were chosen on."""
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    rates = sorted({line["rate"] for line in lines})
    found = {(line["aligner"], line["budget"], line["rate"]): line["gold"] for line in lines}
    rows = []
    for aligner, budget in sorted({(line["aligner"], line["budget"]) for line in lines}):
        golds = [f"{found[aligner, budget, rate]:.3f}" for rate in rates]
        rows.append([aligner, f"{budget} %", *golds])
    return table(["aligner", "budget", *(f"{rate:g}" for rate in rates)], rows)


def chosen_table(path: str) -> str:
    """Tabulate the share of desirable rows among those chosen, mean over seeds."""
    shares: dict[str, dict[float, list[float]]] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        row = json.loads(line)
        by_budget = shares.setdefault(row["sampler"], {})
        by_budget.setdefault(row["budget"], []).append(row["desirable"])
    rows = []
    for sampler, by_budget in shares.items():
        rows.append([sampler, *(cell_of(by_budget[budget]) for budget in BUDGETS[:-1])])
    return table(["sampler", *(f"{budget:g} %" for budget in BUDGETS[:-1])], rows)


def seconds_line(results: Results) -> str:
    """Say what an update and judging took, median over runs on the machine at hand."""
    told = []
    for aligner in BATCH:
        trained = [row for run, row in results.items() if row["steps"] and run.aligner == aligner]
        if trained:
            a_step = np.median([row["train_seconds"] / row["steps"] for row in trained])
            judging = np.median([row["judge_seconds"] for row in trained])
            told.append(
                f"an update of {aligner} took {1000 * a_step:.0f} ms, judging {judging:.1f} s"
            )
    return f"Wall time, median over runs: {'; '.join(told)}." if told else ""


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
            y_NS = curve_NS[1:]
            if y_NS.shape[1] > 1:
                errors = [half(list(row)) for row in y_NS]
                name = f"{aligner}, {sampler}"
                curves.append(Series(name, BUDGETS, list(y_NS.mean(1)), errors))
    return curves


def main(config: Config) -> dict[str, int]:
    """Write the tables and the figure; return the counts of runs `done` and `planned`."""
    for path in (config.results, config.pilot, config.chosen, config.readme):
        require(pathlib.Path(path).is_file(), f"{path}: no such file; name another")
    page = pathlib.Path(config.readme).read_text("utf-8")
    is_marked = FIRST in page and LAST in page.partition(FIRST)[2]
    require(is_marked, f"--readme={config.readme}: lacks the marks {FIRST} and {LAST}")
    results = read_results(config.results)
    planned = plan()
    done = len([run for run in planned if run in results])
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
    before, _, rest = page.partition(FIRST)
    _, _, after = rest.partition(LAST)
    body = "\n\n".join(parts)
    with atomic_text(config.readme) as file:
        file.write(f"{before}{FIRST}\n\n{body}\n\n{LAST}{after}")
    curves = series_of(results)
    if curves:
        draw(curves, "percent of the pool", "gold", config.figure, log=True)
    print(f"{config.readme}: {done} of {len(planned)} runs")
    return {"done": done, "planned": len(planned)}


if __name__ == "__main__":
    flags.run(main, Config)
