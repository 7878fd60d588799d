"""`make assistant`: every command of the recipe, in turn, on tiny models in published layouts."""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from running import rows_of, run
from running import write as write_rows
from safetensors.numpy import load_file, save_file

import evaluate
import generate
import train_rm
import train_sft
from data.sources import open_source
from data.tokenizer import Tokenizer
from experiments.stories import import_llama2c
from model_config import stored_model
from responses import load_run
from runtime import flags
from runtime.errors import UserError
from runtime.terminal import printable
from tests.test_chat_template import CHATML, folder_of
from tests.test_tokenizer import CORPUS
from tests.test_weights import CONFIGS, SHAPE, checkpoint, logits_of, write
from train_state import load_params
from weights import convert

ROOT = pathlib.Path(__file__).parents[1]
KIND = "tokenizer.json" if importlib.util.find_spec("tokenizers") else "SentencePiece"
"""That of published models, where the package that reads it is there."""
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a cat.<|im_end|>\n' }}{% endif %}" + CHATML
)
"""SmolLM2's: a conversation without a system's turn gets one."""
FEW = "--lora.rank=2 --batch_size=8 --save_every=0 --eval_every=0"
SETTINGS = {
    "LENGTH": "64",
    "SFT_FLAGS": f"--steps=3 --optimizer.lr=0.01 {FEW}",
    "REWARD_FLAGS": f"--steps=2 {FEW}",
    "DPO_FLAGS": f"--steps=2 {FEW} --max_prompt=32",
    "PPO_FLAGS": f"--steps=1 {FEW} --minibatches=1 --epochs=1 --max_prompt=32 --max_new_tokens=8",
}

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("MAKE") and name != "RUN"
}
"""Not as a part of the make that runs these tests."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


# --- the recipe


def make(*words: str, **settings: Any) -> subprocess.CompletedProcess:
    """Run `make assistant`, as if packages were installed already; return what came of it."""
    given = [f"{name}={value}" for name, value in settings.items()]
    command = ["make", "-o", ".venv", "-o", ".venv/hf", *words, "assistant", *given]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def recipe(**settings: Any) -> list[str]:
    """Return the lines that `make assistant` runs."""
    told = make("-n", **settings)
    assert told.returncode == 0, told.stderr
    return told.stdout.splitlines()


def run_line(line: str) -> Any:
    """Run a line of the recipe in this process; return what its command's main returns."""
    guard, _, command = line.rpartition("|| ")
    if guard and subprocess.run(["sh", "-c", guard.removesuffix(" ")]).returncode == 0:
        return None
    words = shlex.split(command)
    if words[0] == "echo":
        return words[1]
    # .venv/bin/python SCRIPT FLAGS, or -m MODULE FLAGS; perhaps > FILE.
    _, *words = words
    path = None
    if ">" in words:
        *words, _, path = words
    if words[0] == "-m":
        words = words[1:]
    module = importlib.import_module(words[0].removesuffix(".py"))
    with contextlib.ExitStack() as stack:
        if path is not None:
            file = stack.enter_context(open(path, "w"))
            stack.enter_context(contextlib.redirect_stdout(file))
        return module.main(flags.parse(module.Config, words[1:]))


def talk(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command that the recipe's last line names; return the reply to a message."""
    words = shlex.split(line.removeprefix("Talk to it: "))
    messages = iter(["who sat by the door?", ""])
    monkeypatch.setattr("generate.read_message", lambda: next(messages))
    (reply,) = generate.main(flags.parse(generate.Config, [*words[2:], "--max_new_tokens=8"]))
    return reply


def pretrained(folder: pathlib.Path) -> pathlib.Path:
    """Write a random chat model as Llama's family is published."""
    folder.mkdir()
    folder_of(KIND, TEMPLATE, folder)
    shape = SHAPE | CONFIGS["llama 3"] | {"max_position_embeddings": 256}
    if KIND != "tokenizer.json":
        return write(folder, shape, checkpoint(shape))
    # `write` would add a SentencePiece model.
    (folder / "tokenizer.model").touch()
    write(folder, shape, checkpoint(shape))
    (folder / "tokenizer.model").unlink()
    return folder


def data(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Write conversations and pairs in the layouts of UltraChat and UltraFeedback."""
    chats = []
    pairs = []
    for number, line in enumerate(CORPUS * 4):
        asked = {"role": "user", "content": f"{number}: who sat there?"}
        good = {"role": "assistant", "content": line.split("\n")[0]}
        bad = {"role": "assistant", "content": "Nobody knows."}
        prompt = {"prompt": asked["content"], "prompt_id": str(number)}
        chats.append({**prompt, "messages": [asked, good]})
        scores = {"score_chosen": 8.0, "score_rejected": 2.5}
        both = {"chosen": [asked, good], "rejected": [asked, bad]}
        pairs.append({**prompt, **both, "messages": [asked, good], **scores})
    return {
        "CHATS": write_rows(folder / "chats.jsonl", chats),
        "PAIRS": write_rows(folder / "pairs.jsonl", pairs),
    }


TOKENS = np.arange(3, 40)[None].astype(np.int32)


def logits(model, params) -> np.ndarray:
    return np.asarray(logits_of(model)(params, TOKENS))


# --- from a folder to a folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Return the folder in which the whole recipe has run, and its last line."""
    folder = tmp_path_factory.mktemp("assistant")
    lines = recipe(
        MODEL=pretrained(folder / "model"), RUN=folder / "run", **data(folder), **SETTINGS
    )
    for line in lines:
        last = run_line(line)
    return folder, lines, last


def test_the_exports_are_the_runs_with_their_adapters_merged(walked):
    folder, _, _ = walked
    base = load_params(f"{folder}/run/base")
    for stage in ("dpo", "ppo"):
        model, exported = convert.load(folder / f"run/{stage}-hf")
        trained = load_params(f"{folder}/run/{stage}")
        # On one device, as the run's are: sums over others round otherwise.
        exported = jax.tree.map(np.asarray, exported)
        assert model == stored_model(f"{folder}/run/{stage}")
        np.testing.assert_array_equal(logits(model, exported), logits(model, trained))
        # Control: there was something to merge.
        assert np.abs(logits(model, exported) - logits(model, base)).max() > 1e-4


def test_template_and_ends_come_through(walked):
    folder, _, _ = walked
    ends = json.loads((folder / "model/generation_config.json").read_text())["eos_token_id"]
    for stage in ("dpo", "ppo"):
        out = folder / f"run/{stage}-hf"
        assert (out / "chat_template.jinja").read_text() == TEMPLATE
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends

    # What is imported again writes conversations as the first import did.
    run(convert, f"--read={folder}/run/ppo-hf", f"--run={folder}/again")
    tokenizers = [Tokenizer.load(f"{folder}/{name}") for name in ("run/base", "again")]
    asked = [{"role": "user", "content": CORPUS[0]}]
    one, other = (tokenizer.prompt(asked) for tokenizer in tokenizers)
    assert one == other and tokenizers[0].ends == tokenizers[1].ends
    assert "You are a cat." in tokenizers[0].decode(one)


def test_the_last_line_talks(walked, monkeypatch, capsys):
    _, _, last = walked
    reply = talk(last, monkeypatch)
    assert printable(reply) in capsys.readouterr().out


def test_the_reward_model_is_of_adapters_on_the_sft_run(walked):
    folder, _, _ = walked
    reward = load_run(f"{folder}/run/rm", reward=True)
    assert set(reward.params) == {"decoder", "head", "bias"}
    stored = json.loads((folder / "run/rm/config.json").read_text())
    assert stored["init"] == f"{folder}/run/sft" and stored["lora"]["rank"] == 2


def test_the_first_batches_are_shown_before_anything_is_trained(walked):
    folder, lines, _ = walked
    order = [line for line in lines if "train_" in line]
    assert all("--dry_run" in line for line in order[:2])
    assert "who sat there" in (folder / "run/pairs.txt").read_text()
    assert "who sat there" in (folder / "run/prompts.txt").read_text()
    assert not (folder / "run/dry_run").exists()


def test_the_same_command_again_trains_nothing_and_keeps_the_exports(walked):
    folder, lines, _ = walked
    imported, *_, to_dpo, to_ppo, _ = lines
    (trained,) = (line for line in lines if "train_sft.py" in line)
    before = rows_of(folder / "run/sft")
    for line in (imported, trained, to_dpo, to_ppo):
        run_line(line)
    assert rows_of(folder / "run/sft") == before

    # A run that has gone on since is not passed off as what was exported.
    os.utime(folder / "run/ppo/checkpoints")
    with pytest.raises(UserError, match="exists already"):
        run_line(to_ppo)


# --- mistakes


def test_a_folder_without_a_model_is_one_line(tmp_path):
    for named in ({}, {"MODEL": tmp_path}):
        told = make(**named, RUN=tmp_path / "run")
        assert told.returncode == 2 and not told.stdout
        (line,) = told.stderr.splitlines()
        assert f"MODEL={named.get('MODEL', '')}: has no config.json" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_is_named_as_its_user_wrote_it(tmp_path):
    """Spaces in names are kept; RUN of the environment is not overridden."""
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model/config.json").touch()
    for named in (f"{tmp_path}/my run", None):
        given = {} if named is None else {"RUN": named}
        env = {**ENVIRONMENT, **given}
        command = ["make", "-n", "-o", ".venv", "-o", ".venv/hf", "assistant"]
        command.append(f"MODEL={tmp_path}/my model")
        told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        words = shlex.split(told.stdout.splitlines()[0])
        assert words[3:] == [
            f"--read={tmp_path}/my model",
            f"--run={named or 'runs/assistant'}/base",
        ]


def test_a_bad_pair_is_told_before_the_first_stage(walked, tmp_path):
    folder, _, _ = walked
    broken = tmp_path / "broken.jsonl"
    text = (folder / "pairs.jsonl").read_text().replace('"rejected"', '"rejetced"', 1)
    broken.write_text(text)
    lines = recipe(
        MODEL=folder / "model", RUN=folder / "run", CHATS="world", PAIRS=broken, **SETTINGS
    )
    assert run_line(lines[0]) is not None
    with pytest.raises(UserError, match=r"broken\.jsonl:1: "):
        run_line(lines[1])


def test_refused_rows_are_left_out_to_the_end_of_sft_and_of_the_reward_model(walked, tmp_path):
    folder, _, _ = walked
    # Every third row spells what ends a turn; among them are rows that are held out.
    spelt = {}
    for name, path in data(tmp_path).items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[::3]:
            for messages in (row["messages"], row.get("chosen", []), row.get("rejected", [])):
                if messages:
                    messages[0] = {**messages[0], "content": row["prompt"] + " <|im_end|>"}
            row["prompt"] += " <|im_end|>"
        spelt[name] = write_rows(path, rows)
    held_out = open_source(str(spelt["CHATS"]), "chat", "heldout").first(8)
    refused = [record for record in held_out if "<|im_end|>" in record["messages"][0]["content"]]
    assert 0 < len(refused) < len(held_out)

    few = ["--length=64", "--lora.rank=2", "--batch_size=8", "--save_every=0", "--steps=1"]
    stages = {
        "sft": (train_sft, [f"--data={spelt['CHATS']}"]),
        "rm": (train_rm, [f"--data={spelt['PAIRS']}"]),
    }
    for name, (script, named) in stages.items():
        started = [f"--init={folder}/run/base", f"--run={tmp_path}/{name}", *named, *few]
        with pytest.raises(UserError, match=r"spells <\|im_end\|>.* --on_bad_row=skip leaves"):
            run(script, *started)
        assert not (tmp_path / name / "checkpoints/1").exists()

        # The remedy that it names, in the same run.
        run(script, *started, "--on_bad_row=skip")
        (row,) = rows_of(tmp_path / name)
        assert row["data/refused"] > 0 and row["data/dropped"] == 0
        told = (tmp_path / name / "skipped.txt").read_text().splitlines()
        # Once each, however often it was met: in batches, samples, references, evaluations.
        assert 0 < len(set(told)) == len(told) <= 72
        assert all("spells <|im_end|>" in line for line in told)
    assert (tmp_path / "sft/samples.md").read_text().count("who sat there") == len(held_out) - len(
        refused
    )

    # What is evaluated leaves them out too.
    skip = [f"--data={spelt['PAIRS']}", "--on_bad_row=skip", f"--run={tmp_path}", "--n=9"]
    found = run(evaluate, "--measure=accuracy", "--length=64", *skip)
    assert found["records"] == 9 and np.isfinite(found["eval/accuracy"])
    answered = run(
        evaluate, "--measure=win_rate", f"--policy={tmp_path}/sft", "--max_new_tokens=4", *skip
    )
    assert answered["n"] == 6


# --- an import is made once


def test_an_import_is_kept_and_never_taken_for_another(tmp_path, capsys):
    first = pretrained(tmp_path / "first")
    told = run(convert, f"--read={first}", f"--run={tmp_path}/run")
    again = run(convert, f"--read={first}", f"--run={tmp_path}/run")
    assert "has been imported from" in capsys.readouterr().out
    np.testing.assert_array_equal(again["decoder"]["embed"], told["decoder"]["embed"])

    other = shutil.copytree(first, tmp_path / "other")
    with pytest.raises(UserError, match="holds a checkpoint already"):
        run(convert, f"--read={other}", f"--run={tmp_path}/run")
    (file,) = first.glob("*.safetensors")
    # A later time alone is no change, and other weights are one with whatever time.
    os.utime(file)
    run(convert, f"--read={first}", f"--run={tmp_path}/run")
    time = file.stat().st_mtime
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, file, {"format": "pt"})
    os.utime(file, (time - 9, time - 9))
    with pytest.raises(UserError, match="has changed since it was imported"):
        run(convert, f"--read={first}", f"--run={tmp_path}/run")


# --- as a user does


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random, the world's data", "stories260k"])
def test_make_ends_with_a_command_that_answers(request, tmp_path, kind):
    """`make assistant` in processes of its own, twice; then its last line."""
    if kind == "stories260k":
        real = request.getfixturevalue("shared_data") / "stories260k"
        files = [real / "stories260K.bin", real / "tok512.model"]
        run(import_llama2c, *files, f"--run={tmp_path}/imported")
        run(convert, f"--run={tmp_path}/imported", f"--write={tmp_path}/model")
        settings = {**SETTINGS, **data(tmp_path)}
    else:
        pretrained(tmp_path / "model")
        settings = {**SETTINGS, "LENGTH": "192"}
    settings |= {
        "MODEL": tmp_path / "model",
        "RUN": tmp_path / "run",
        "BIN": pathlib.Path(sys.executable).parent,
    }
    for _ in range(2):
        told = make(**settings)
        assert told.returncode == 0, told.stderr
    *_, last = told.stdout.splitlines()
    command = [*shlex.split(last.removeprefix("Talk to it: ")), "--max_new_tokens=8"]
    chat = subprocess.run(command, cwd=ROOT, input="hello\n\n", capture_output=True, text=True)
    assert chat.returncode == 0 and chat.stdout.count("> ") == 2, chat.stderr
