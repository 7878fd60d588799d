"""Numbers of reports, figures, searches and the study, against what stands in the rows."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import said

from decoding import best_of_n, rerank, step_beam
from decoding.report import as_json, powers_of_two
from evaluation.intervals import Interval
from experiments import seeds
from experiments.methods import pages, table
from experiments.methods import run as study
from objectives.imitate import best_of_n_kl
from runtime import figures, metrics, report
from runtime.metrics import Recorder
from tasks import world

# ---- Rows of metrics ----


def test_a_pair_is_its_sum_over_its_weight():
    assert metrics._number((6.0, 4.0)) == 1.5
    assert metrics._number(np.float32(2.5)) == 2.5
    assert math.isnan(metrics._number((1.0, 0.0)))


def test_throughput_is_of_the_rows_after_the_first(tmp_path, monkeypatch):
    """Of 10, 20 and 40 tokens, a row every two seconds, the first row's only begin the time."""
    (tmp_path / "config.json").write_text(json.dumps({"script": "s", "steps": 3}))
    clock = iter(np.arange(0.0, 1000.0, 2.0))
    with Recorder(str(tmp_path), 3) as record:
        monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        seen = []
        for step, tokens in enumerate([10, 20, 40], 1):
            record(step, {"loss": 1.0}, tokens=tokens)
            record.flush()
            seen.append(record.last.get("tokens_per_second"))
        monkeypatch.undo()
    assert seen == [None, 20 / 2, (20 + 40) / 4]


# ---- Figures ----


def test_a_series_is_its_rows_and_means_of_parts_where_it_is_long(monkeypatch):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2}, {"step": 3, "loss": None}]
    rows.append({"step": 4, "loss": 1.0})
    steps, values = figures._series(rows, "loss")
    assert steps.tolist() == [1, 4] and values.tolist() == [4, 1]
    monkeypatch.setattr(figures, "MOST_POINTS", 3)
    rows = [{"step": i, "loss": float(i * i)} for i in range(1, 8)]
    steps, values = figures._series(rows, "loss")
    assert steps.tolist() == [2.0, 4.5, 6.5]
    assert values.tolist() == pytest.approx([14 / 3, 41 / 2, 85 / 2])


@pytest.mark.parametrize("size", [1, 2, 7, 41, 100])
def test_a_smooth_curve_is_the_mean_of_a_window(rng, size):
    values = rng.normal(size=size)
    half = max(1, size // 20)
    expected = []
    for i in range(size):
        window = values[max(0, i - half) : i + half + 1]
        expected.append(window.mean())
    np.testing.assert_allclose(figures._smooth(values), expected)


def test_panels_draw_what_was_measured_and_what_was_held_out(monkeypatch):
    drawn = []

    def draw(curves, xlabel, legend=False, dots=False):
        own = [(label, x.tolist(), y.tolist()) for label, x, y in curves]
        drawn.append((own, xlabel, legend, dots))
        return "<svg/>"

    monkeypatch.setattr(figures, "_draw", draw)
    rows = [
        {"step": 1, "seconds": 3.0, "loss": 2.0, "kl": 0.5, "score": 7.0},
        {"step": 2, "seconds": 4.0, "loss": 1.0, "kl": 1.5, "score": 9.0, "eval/loss": 3.0},
        {"step": 3, "seconds": 5.0, "loss": 0.5, "kl": None, "score": 9.5},
    ]
    titles = [re.search("<h3>(.*?)</h3>", figure)[1] for figure in figures.panels(rows)]
    # Known names in the order of EXPLAINED.
    assert titles == ["loss", "score", "kl"]
    assert drawn[0] == (
        [("training", [1, 2, 3], [2, 1, 0.5]), ("held out", [2], [3])],
        "step",
        True,
        False,
    )
    drawn.clear()
    assert len(figures.reward_against_kl(rows)) == 1
    assert drawn == [([("", [0.5, 1.5], [7, 9])], "KL to SFT, nats", False, True)]
    assert figures.reward_against_kl(rows[2:]) == []


# ---- Reports ----


def test_a_report_shows_shares_in_per_cent_values_and_durations():
    assert [report._percent(x) for x in (0.126, 1.0, None, float("nan"))] == [
        "13 %",
        "100 %",
        "–",
        "–",
    ]
    assert [report._duration(x) for x in (59.6, 60, 3599, 3725)] == [
        "1 min 0 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 2 min",
    ]
    rows = [{"step": 1, "seconds": 1}, {"step": 1200, "seconds": 75, "tokens_per_second": 2e4}]
    assert report._facts(rows) == [
        "1,200 steps in 1 min 15 s.",
        "20,000 tokens a second at the end.",
    ]
    entry = {"kl": 1.234, "kl_ci": [1.0, 1.5], "n": 1000}
    assert report._value(entry, "kl") == "<b>1.23</b> <small>1.00 to 1.50</small>"
    assert report._value(entry, "n") == "<b>1,000</b>"
    share = report._share({"all": 0.64, "all_ci": [0.6, 0.68]}, "all", "ppo")
    assert "<b>64 %</b> <small>60 % to 68 %</small>" in share
    assert "width:64.0%" in share and "left:60.0%;width:8.0%" in share


def entry_of(share, n=10):
    values = {"helpful": 0.9, "honest": 0.95, "harmless": 0.97, "all": share}
    kinds = {"lookup": {"all": share / 2, "all_ci": [0.0, share], "n": n}}
    return {**values, "kinds": kinds, "n": n}


def test_columns_of_a_report_are_the_stages_in_order():
    summary = {"base": entry_of(0.1), "sft": entry_of(0.4), "ppo": entry_of(0.8, n=12)}
    stages = ["base", "sft", "ppo"]
    table = report._criteria_table(summary, stages)
    row = re.search("<tr class=all>.*?</tr>", table)[0]
    assert re.findall(r"<b>(\d+) %", row) == ["10", "40", "80"]
    kinds = report._kinds_table(summary, stages)
    assert re.findall(r"<b>(\d+) %", kinds) == ["5", "20", "40"]
    assert re.findall(r"<td>(\d+)</td>", kinds) == ["12"]
    assert re.findall(r"<b>(\d+) %", report._headline(summary, stages)) == ["10", "40", "80"]
    shown = report._reward_model({"accuracy": 0.88, "by_criterion": {"honest": 0.75, "x": None}})
    assert re.findall(r"<b>(\d+) %</b><span>(.*?)</span>", shown) == [
        ("88", "all pairs"),
        ("75", "honest"),
    ]
    marks = report._response_card({"response": "r", "helpful": True, "honest": False}, "ppo")
    assert re.findall(r"<li class=(\w+)>. (\w+)", marks) == [
        ("pass", "helpful"),
        ("fail", "honest"),
        ("fail", "harmless"),
    ]


# ---- Searches ----


def test_numbers_of_samples_and_what_a_file_says():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]
    assert as_json(Interval(0.5, 0.4, 0.6)) == [0.5, [0.4, 0.6]]
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)


RIGHT, WRONG = "it is stockholm.", "it is paris."
REQUEST = world.parse("what is the capital of sweden?")


def test_the_best_of_the_first_n_is_the_first_of_the_highest():
    rewards_PN = np.array([[1.0, 3.0, 3.0, 9.0], [2.0, 0.0, 1.0, 7.0]])
    texts = [[WRONG, RIGHT, WRONG, WRONG], [RIGHT, WRONG, WRONG, WRONG]]
    # The second's last one never ended: it is ranked below all others, whatever its reward.
    ranks_PN = np.where(rewards_PN == 7.0, -9.0, rewards_PN)
    scored = best_of_n.Scored(rewards_PN, ranks_PN, texts)
    found = {}
    for n in (1, 2, 3, 4):
        row = best_of_n.best_of_first(scored, n, [REQUEST] * 2)
        found[n] = (row["reward"].value, row["all"].value)
    assert found == {1: (1.5, 0.5), 2: (2.5, 1.0), 3: (2.5, 1.0), 4: (5.5, 0.5)}
    assert set(best_of_n.best_of_first(scored, 2, None)) == {"reward"}


def test_hits_of_every_way_to_choose():
    texts = [["answer 1", "answer 2", "answer 2", "answer 1"], ["answer 5"] * 4]
    right_PN = np.array([[1, 0, 0, 1], [0, 0, 0, 0]])
    scores = {"prm last": np.array([[0.0, 2.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0]])}
    finals = [[1.0, 2.0, 2.0, 1.0], [5.0] * 4]
    answers = rerank.Answers(texts, right_PN, finals, scores, 10.0)
    hits = {way: hit.tolist() for way, hit in rerank.hits_of_first(3, answers).items()}
    assert hits == {
        "one drawn at random": pytest.approx([1 / 3, 0]),
        "a score that knows nothing": [0.5, 0],
        "majority": [0, 0],
        "prm last": [0, 0],
        "one of them is right": [1, 0],
    }
    assert rerank.hits_of_first(4, answers)["prm last"].tolist() == [1, 0]
    checked = rerank.check_answers(
        lambda text, record: text == record["answer"],
        [["a", "b"], ["b", "b"]],
        [{"answer": "a"}, {"answer": "b"}],
    )
    assert checked.tolist() == [[True, False], [True, True]]


def test_a_search_tells_how_many_it_solved(monkeypatch, tmp_path, capsys):
    records = [{"prompt": said(f"p{i}"), "answer": str(i)} for i in range(4)]
    monkeypatch.setattr(step_beam, "make_mesh", lambda config: None)
    monkeypatch.setattr(
        step_beam, "open_source", lambda *args, **named: SimpleNamespace(first=lambda n: records)
    )
    tokenizer = SimpleNamespace(decode=lambda tokens: f"answer {tokens[0]}", eos=9, ends=(9,))
    # Problem 3's right answer never ended.
    found = [[0, 9], [7, 9], [2, 9], [3]]
    monkeypatch.setattr(step_beam, "search_problems", lambda *args: (found, 40, tokenizer))
    out, solutions = tmp_path / "out.json", tmp_path / "solutions.jsonl"
    config = step_beam.Config(data="p.jsonl", out=str(out), solutions=str(solutions))
    accuracy, tokens = step_beam.main(config)
    written = json.loads(out.read_text())
    assert tokens == written["tokens"] == 10
    assert written["accuracy"] == as_json(accuracy)
    assert written["hits"] == [1, 0, 1, 0]
    assert len(solutions.read_text().splitlines()) == 2
    assert "4 problems (p.jsonl, all)" in capsys.readouterr().out


# ---- The study of methods ----


def result(method, seed, **values):
    row = {"method": method, "seed": seed, "reward_model_flops": 2e12, "kl": 1.0, "length": 9.0}
    shares = dict.fromkeys(("all", "helpful", "honest", "harmless"), 0.5)
    return {**row, **shares, "kinds": {"small_talk": {"all": 0.25}}, **values}


ROWS = table.by_method(
    [
        result("dpo", 1, all=0.9, training_flops=1e12, kl=3.0),
        result("dpo", 0, all=0.7, training_flops=3e12, kl=1.0),
        result("sft", 0, all=0.4),
        result("sft", 1, all=0.5),
        result("sft", 2, all=0.1),
        result("ppo", 0, all=0.65, training_flops=4e12),
    ]
)


def test_rows_by_method_are_in_the_order_of_the_families_and_of_seeds():
    assert list(ROWS) == ["sft", "ppo", "dpo"]
    assert list(ROWS["dpo"]) == [0, 1]


def test_a_gain_is_over_the_other_method_on_the_same_seeds():
    # 0.3 and 0.4: t of 0.975 with 1 degree is 12.7062.
    spread = 12.706204736 * np.std([0.3, 0.4], ddof=1) / math.sqrt(2)
    assert table.over(ROWS, "dpo", "sft") == f"+0.350 ±{spread:.3f}"
    assert table.over(ROWS, "dpo", "ppo") == "+0.050"
    assert table.over(ROWS, "dpo", "dpo") == ""
    assert table.over(ROWS, "ppo", "sft") == "+0.250"


def test_cells_are_means_over_seeds():
    assert table.mean(ROWS["dpo"], "training_flops", 1e-12) == "2.0"
    assert table.mean(ROWS["sft"], "training_flops", 1e-12) == ""
    spread = 12.706204736 * np.std([0.7, 0.9], ddof=1) / math.sqrt(2)
    assert table.cell(ROWS["dpo"], "all") == f"0.800 ±{spread:.3f}"
    assert table.cell(ROWS["ppo"], "all") == "0.650"
    assert table.cell(ROWS["ppo"], "cpu_seconds") == ""


def cells_of(text, name):
    """Return the cells of a Markdown table's row that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_of_the_study():
    rows = {**ROWS, "kto": {0: result("kto", 0, all=0.6), 1: result("kto", 1, all=0.69)}}
    quality = table.quality(rows)
    assert cells_of(quality, "dpo")[7] == "+0.300, +0.400"
    assert cells_of(quality, "dpo")[1] == "0, 1" and cells_of(quality, "dpo")[9][:4] == "2.00"
    # Gains of kto: 0.20 and 0.19.
    assert "dpo 2 of 2" in quality and "kto 1 of 2" in quality and "ppo 1 of 1" in quality
    assert cells_of(table.kinds(rows), "dpo") == ["dpo", "0.25"]
    cost = table.cost(rows)
    assert cells_of(cost, "dpo")[:3] == ["dpo", "2.0", "4.0"]
    assert cells_of(cost, "sft")[:3] == ["sft", "", "2.0"]


def test_points_of_the_figures_are_gains_over_sft_the_best_first():
    points = pages.points(ROWS)
    assert list(points) == ["dpo", "ppo"]
    assert points["dpo"].gain == pytest.approx(0.35) and points["dpo"].kl == 2.0
    assert points["dpo"].interval == pytest.approx(seeds.half([0.3, 0.4]))
    assert pages.total_flops(ROWS["dpo"]) == "4.0"
    numbers = pages.numbers(ROWS, "dpo")
    assert cells_of(numbers, "all criteria, over SFT")[1].startswith("+0.350")
    assert cells_of(numbers, "training, TFLOPs")[1] == "2.0"
    texts = {name: {"title": name, "needs": "x"} for name in ("dpo", "ppo", "spin")}
    index = pages.index(texts, ROWS)
    assert index.index("[dpo]") < index.index("[ppo]") < index.index("[spin]")
    assert cells_of(index, "[dpo](dpo.md)")[2].startswith("+0.350 ±")


def test_numbers_of_nested_summaries_lie_by_their_paths():
    tree = {"sft": {"all": 0.5, "all_ci": [0.4, 0.6], "kinds": {"lookup": {"n": 3}}}}
    assert seeds.leaves(tree) == {("sft", "all"): 0.5, ("sft", "kinds", "lookup", "n"): 3.0}


def test_best_of_n_of_the_study_takes_the_highest_reward(monkeypatch):
    rewards_PN = np.zeros((2, 16))
    rewards_PN[0, 3], rewards_PN[1, 9] = 5.0, 5.0
    texts = [[WRONG] * 16, [WRONG] * 16]
    texts[0][3], texts[1][9] = RIGHT, RIGHT
    scored = best_of_n.Scored(-rewards_PN, rewards_PN, texts)
    monkeypatch.setattr(study, "make_mesh", lambda config: None)
    monkeypatch.setattr(study.best_of_n, "sample_and_score", lambda *args: scored)
    tokenizer = SimpleNamespace(encode=lambda text: [*text])
    monkeypatch.setattr(study.Tokenizer, "load", lambda run: tokenizer)
    best, lengths, kls, curve = study.best_of(study.Config(), 0, [REQUEST] * 2, 0)
    assert best == [RIGHT, RIGHT] and lengths == [len(RIGHT) + 1] * 2
    assert kls == [best_of_n_kl(16)] * 2
    assert curve == [(best_of_n_kl(n), share) for n, share in zip(
        (1, 2, 4, 8, 16), (0, 0, 0.5, 0.5, 1), strict=True
    )]  # fmt: skip


@dataclasses.dataclass
class Measured:
    """What row_of needs of a method that trains nothing."""

    seed: int
    tune: bool

    def row(self, monkeypatch):
        asked = []

        def responses_of(config, method, seed, run, requests, judge_seed):
            asked.append((len(requests), judge_seed))
            return [RIGHT] * len(requests), [3] * len(requests), [0.0] * len(requests)

        flops = {"align2/round1/rm": 1e9, "align2/rm": 2e9}
        monkeypatch.setattr(study, "responses_of", responses_of)
        monkeypatch.setattr(study, "training_flops", flops.__getitem__)
        monkeypatch.setattr(study, "stored_model", lambda run: None)
        monkeypatch.setattr(study, "sampling_flops", lambda *args: 7.0)
        monkeypatch.setattr(study.world, "prompt", lambda i, split, seed: REQUEST)
        monkeypatch.setitem(study.METHODS, "ppo", ())
        config = study.Config(align="align{seed}", n=4, tune=self.tune)
        return study.row_of(config, "ppo", self.seed), asked


def test_a_method_is_judged_on_fresh_prompts_and_choices_on_others(monkeypatch):
    row, asked = Measured(seed=2, tune=False).row(monkeypatch)
    assert asked == [(4, 1002)] and row["prompts_seed"] == 1002
    assert row["all"] == 1.0 and row["n"] == 4
    # It sees both reward models.
    assert row["reward_model_flops"] == 3e9 and row["response_flops"] == 7.0
    row, asked = Measured(seed=2, tune=True).row(monkeypatch)
    assert asked == [(4, 2)] and row["prompts_seed"] == 2
