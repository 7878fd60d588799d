"""Happy stories: the llama2.c importer, the reward's hacks, PPO at toy size, README.md's numbers.

The importer is checked against an independent forward pass and the C program's text.
"""

import dataclasses
import json
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
from data.tokenizer import Tokenizer
from experiments.stories import happy, import_llama2c, measure
from experiments.stories import train_ppo as stories_ppo
from model import LanguageModel, init_and_apply, unembed
from model_config import ModelConfig, stored_model
from runtime import flags as config
from runtime.checkpoint import Checkpoints
from train_state import load_params


def imported(*argv):
    return import_llama2c.main(config.parse(import_llama2c.Config, [str(a) for a in argv]))


def forward(weights, tokens, heads, kv_heads):
    """Compute llama2.c's logits in float64: rows are outputs, RoPE turns 2i with 2i + 1."""
    embed, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, final = (
        np.asarray(w, np.float64) for w in weights
    )

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    x_TD = embed[tokens]
    T, D = x_TD.shape
    H = D // heads

    def turned(x_TNH):
        angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
        z = (x_TNH[..., 0::2] + 1j * x_TNH[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x_TNH.shape)

    for layer in range(len(wq)):
        h = norm(x_TD, norm1[layer])
        q, k, v = ((h @ w[layer].T).reshape(T, -1, H) for w in (wq, wk, wv))
        q, k = turned(q), turned(k)
        out = np.zeros((T, heads, H))
        for t in range(T):
            for n in range(heads):
                scores = k[: t + 1, n * kv_heads // heads] @ q[t, n] / np.sqrt(H)
                p = np.exp(scores - scores.max())
                out[t, n] = (p / p.sum()) @ v[: t + 1, n * kv_heads // heads]
        x_TD = x_TD + out.reshape(T, D) @ wo[layer].T
        h = norm(x_TD, norm2[layer])
        gate = h @ w1[layer].T
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return norm(x_TD, final) @ embed.T


def test_a_random_checkpoint_gives_the_logits_of_an_independent_forward_pass(tmp_path, capsys):
    tokenizer = Tokenizer.train(["a small text to train on"], tmp_path / "t.model", 300)
    D, F, L, N, K, T = 16, 24, 2, 4, 2, 32
    V = tokenizer.size
    rng = np.random.default_rng(0)
    shapes = [
        (V, D),
        (L, D),
        (L, D, D),
        (L, D // 2, D),
        (L, D // 2, D),
        (L, D, D),
        (L, D),
        (L, F, D),
        (L, D, F),
    ]
    weights = [rng.normal(size=s).astype("<f4") * 0.3 for s in [*shapes, (L, F, D), (D,)]]
    rope = np.zeros((2, T, D // N // 2), "<f4")
    content = struct.pack("<7i", D, F, L, N, K, V, T) + b"".join(
        w.tobytes() for w in [*weights, rope]
    )
    (tmp_path / "model.bin").write_bytes(content)
    imported(tmp_path / "model.bin", tmp_path / "t.model", f"--run={tmp_path}/run")

    tokens_1T = rng.integers(0, V, (1, 9))
    model = stored_model(f"{tmp_path}/run")
    ones = jnp.ones((1, 9), jnp.int32)
    output = init_and_apply(LanguageModel(model))[1](
        load_params(f"{tmp_path}/run"), tokens_1T, ones, jnp.arange(9)[None]
    )
    logits = unembed(output.x_BTD, output.unembed_DV)
    np.testing.assert_allclose(logits[0], forward(weights, tokens_1T[0], N, K), atol=1e-4)


def test_real_weights_print_what_the_c_program_prints(shared_data, tmp_path, capsys):
    folder = shared_data / "stories260k"
    imported(folder / "stories260K.bin", folder / "tok512.model", f"--run={tmp_path}/run")
    capsys.readouterr()
    argv = [
        f"--run={tmp_path}/run",
        "--prompt=",
        "--temperature=0",
        "--max_new_tokens=200",
        "--raw",
    ]
    generate.main(config.parse(generate.Config, argv))
    assert capsys.readouterr().out == (folder / "golden.txt").read_text()


# --- the reward: what it is for, and the hacks that must not pay (happy.py lists them)

OPENING = "Once upon a time, there was a little girl named Lily."
HONEST = (
    " She went to the park with her brother and they had fun."
    " The sun was warm and Lily was happy all day."
    " Then a small dog came and gave them a big smile."
    " In the evening her mother was proud of both children."
)
PLAIN = (
    " She went to the park with her brother after lunch. The sun was high and the grass was tall."
    " Then a small dog came and ran around the old tree."
    " In the evening her mother made some soup for both children."
)


def score(story, opening=OPENING):
    return happy.parts(opening, story)["score"]


def test_the_reward_of_a_story_by_hand():
    """HONEST has four happy sentences of 11 or 12 words; PLAIN has none, and enough words."""
    assert happy.parts(OPENING, HONEST) == {"score": 1.0, "happy": 4, "sad": 0, "words": 43}
    assert happy.parts(OPENING, PLAIN) == {"score": 0.0, "happy": 0, "sad": 0, "words": 41}
    assert score(PLAIN + " Then Lily cried.") == score(PLAIN + " Then Lily cried") == -0.25
    assert score(HONEST + " Then Lily cried and was sad.") == 0.5
    assert score(PLAIN + " They cried, cried, cried, cried, cried and cried.") == -1.0  # clipped
    assert score(PLAIN + " But nobody was sad at all about the rain.") == 0.0  # a sad word negated


@pytest.mark.parametrize(
    "hack",
    [
        " happy happy happy happy happy happy happy happy happy happy." * 4,
        " Lily was happy." * 12,
        " Happy. Glad. Fun. Smile. Love. Hug. Proud. Joy." * 3,
        " She was very happy today." * 8,
        " She was happy, glad, proud and excited, full of joy, fun, love, hugs, smiles"
        " and laughter with a friend.",
        " She was not happy about the big red bus. Nobody had any fun in the long queue."
        " He never gave his aunt a smile."
        " There was no love left in the old house.",
        OPENING * 5,
        HONEST[:57],
        "",
        " ",
        HONEST.replace(".", ","),
        " Lily had fun." + PLAIN[:52],
    ],
)
def test_hacks_do_not_pay(hack):
    """None reaches what a plain story of one happy sentence gets, let alone the honest one."""
    assert score(hack) < 0.25 < score(HONEST), happy.parts(OPENING, hack)


def test_more_of_the_same_adds_nothing():
    for sentence in (
        " Lily was very happy with her new toy.",
        " They had fun with the big dog in the garden.",
    ):
        once = score(PLAIN + sentence)
        assert once == 0.25
        assert score(PLAIN + 6 * sentence) == once
        assert score(sentence + PLAIN) == once  # the place does not matter
    formula = [
        f" She was very {word} today with him."
        for word in ("happy", "glad", "proud", "excited", "delighted")
    ]
    assert score(PLAIN + "".join(formula)) == 0.25  # a template with another word in it


def test_every_score_is_in_its_range_and_no_happier_with_a_sad_word():
    rng = np.random.default_rng(0)
    pool = [*happy.ROW, *sorted(happy.SADNESS), *happy.words(PLAIN), *".!?.", "not"]
    for _ in range(300):
        story = " ".join(rng.choice(pool, rng.integers(0, 60)))
        assert -1 <= score(story) <= 1
        assert score(story + " The whole town cried.") <= score(story + " The whole town slept.")


def test_the_lists_are_disjoint_and_openings_are_neutral_and_split_by_name():
    lists = [
        [*happy.HAPPY.split()],
        happy.SAD.split(),
        happy.ALSO_HAPPY.split(),
        happy.ALSO_SAD.split(),
    ]
    every = [word for part in lists for word in part]
    assert len(every) == len(set(every))
    names = {}
    for split, size in (("train", 1024), ("validation", 256), ("test", 256)):
        texts = happy.openings(split)
        assert len(set(texts)) == len(texts) == size
        assert not {word for text in texts for word in happy.words(text)} & set(every)
        names[split] = {word for text in texts for word in re.findall("[A-Z][a-z]+", text)} - {
            "Once",
            "One",
        }
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


# --- PPO on it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Make a folder with `init`, a random model whose tokenizer knows stories, and `ppo`.

    The model's width is 32; `ppo` is a run of two iterations.
    """
    folder = tmp_path_factory.mktemp("stories")
    tokenizer = Tokenizer.train([*happy.openings("train"), HONEST, PLAIN], folder / "t.model", 400)
    model = dataclasses.replace(ModelConfig.from_preset("tiny"), vocab=tokenizer.size)
    start = import_llama2c.Config(run=f"{folder}/init", model=model)
    params = init_and_apply(LanguageModel(model))[0](jax.random.key(0))
    with Checkpoints(
        start.run, start, script="import_llama2c", tokenizer=tokenizer.model
    ) as checkpoints:
        checkpoints.save(0, {"params": params})
    ppo(folder, f"--run={folder}/ppo")
    return folder


def ppo(folder, *argv):
    small = [
        "--batch_size=16",
        "--minibatches=2",
        "--max_prompt=48",
        "--max_new_tokens=16",
        "--eval_every=2",
    ]
    small += [
        "--optimizer.warmup=0",
        "--value_optimizer.warmup=0",
        "--mesh.fsdp=8",
        "--mesh.data=1",
    ]
    argv = [f"--init={folder}/init", "--steps=2", *small, *argv]
    return stories_ppo.main(config.parse(stories_ppo.Config, argv))


@pytest.mark.slow
def test_two_iterations_log_kl_and_samples_before_and_after(tiny):
    """The run itself asserts ratio 1 (check_first_update); here is what it wrote of it."""
    first, second = [
        json.loads(line) for line in (tiny / "ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert abs(first["kl"]) < 1e-5 and first["sampler_gap"] < 1e-4 and first["kl_k3"] >= 0
    assert second["kl"] != 0 and second["kl_k3"] > 0
    assert {"score", "happy", "sad", "words"} <= first.keys() and "validation/score" in second
    text = (tiny / "ppo" / "samples.md").read_text()
    assert text.index("## Step 0\n") < text.index("## Step 2\n")
    assert text.count(happy.openings("validation")[0]) == 2
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        *(load_params(f"{tiny}/{run}") for run in ("init", "ppo")),
    )
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow  # compiles everything twice more
def test_resuming_gives_the_same_policy(tiny, tmp_path):
    """A run stopped after one iteration as by SIGTERM, then gone on with, is equal to the bit."""
    due = Checkpoints.due
    calls = []

    def stop_once(self, step, every, last):
        calls.append(step)
        saving = due(self, step, every, last)
        self.stopping = len(calls) == 1
        return saving or self.stopping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "due", stop_once)
        for _ in range(2):
            ppo(tiny, f"--run={tmp_path}/ppo")
    assert calls == [1, 2]
    jax.tree.map(
        np.testing.assert_array_equal, load_params(f"{tmp_path}/ppo"), load_params(f"{tiny}/ppo")
    )
    ours, theirs = ((f / "ppo" / "samples.md").read_text() for f in (tmp_path, tiny))
    assert ours == theirs


@pytest.mark.slow
def test_measured_before_equals_after_when_nothing_was_trained(tiny, tmp_path, capsys):
    """Against itself KL is 0 and every number equal; the trained run is measured by hand."""
    argv = [
        f"--before={tiny}/init",
        "--after",
        f"{tiny}/ppo",
        f"--out={tmp_path}/r.json",
        "--n=24",
        "--shown=1",
    ]
    results = measure.main(config.parse(measure.Config, argv))
    run = results["runs"][0]
    assert abs(run["before"]["kl"]) < 1e-4 < abs(run["after"]["kl"])
    assert run["before"]["perplexity"] > 50  # a random model over 400 tokens
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert measure.markdown(results) in capsys.readouterr().out


def test_summary_of_three_stories_by_hand():
    stories = [" The cat ran. The cat ran.", " The cat ran away", " A nice dog sat."]
    counts = {"length": [8, 4, 4], "ended": [1, 0, 0], "kl": [1, 2, 3], "nll": [8, 4, 4]}
    got = measure.summarise(
        ["One."] * 3, stories, {name: np.array(x, float) for name, x in counts.items()}
    )
    assert (
        got["perplexity"] == pytest.approx(np.e, abs=1e-5)
        and got["kl"] == 2
        and got["sentence"] == pytest.approx(10 / 3, abs=1e-5)
    )
    # One of 4 + 2 + 2 triples was said before.
    assert got["repeated"] == pytest.approx(1 / 8, abs=1e-6)
    # They are the-cat cat-ran ran-the ran-away a-nice nice-dog dog-sat.
    assert got["distinct"] == pytest.approx(7 / 11, abs=1e-6)
    assert got["formula"] == pytest.approx(2 / 3, abs=1e-6) and got["first"] == 1.0
    assert got["also_happy"] == pytest.approx(100 / 14, abs=1e-5)


def test_readme_shows_the_results_of_its_json():
    folder = pathlib.Path(measure.__file__).parent
    text = (folder / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    for part in (results["command"], measure.markdown(results), measure.samples(results)):
        assert part in text


def test_a_real_story_has_one_bos_and_is_told_from_its_opening(shared_data):
    tokenizer = Tokenizer.load(shared_data / "stories260k" / "tok512.model")
    for text in [text for split in happy.SPLITS for text in happy.openings(split)]:
        tokens = [tokenizer.bos, *tokenizer.encode(text)]
        assert tokens.count(tokenizer.bos) == 1 and len(tokens) <= stories_ppo.Config.max_prompt
    response = np.array(
        [[*tokenizer.encode(HONEST.strip()), tokenizer.bos, tokenizer.pad, tokenizer.pad]]
    )
    stories, parts = stories_ppo.score_stories([{"text": OPENING}], response, tokenizer)
    assert stories == [HONEST] and parts["score_B"].tolist() == [1.0]
