"""Recipes: the commands of each are accepted at full size, planned as they are, and take steps."""

import dataclasses
import importlib
import io
import json
import math
import operator
import os
import pathlib
import re
import shlex
import subprocess
import tempfile

import jax
import pytest
import sentencepiece
from running import run, write

import train_sft
from benchmarks import recipes
from data.tokenizer import Tokenizer
from data.tokenizer_json import read_tokenizer
from model_config import ModelConfig
from planning import plan
from runtime import data_files, flags
from runtime.errors import UserError
from sharding import MeshConfig, check_batch
from train_step import make_schedule
from weights import convert

RECIPES = recipes.recipes()
PLANNED = (
    *("batch_size", "microbatches", "minibatches", "epochs", "samples_per_prompt"),
    *("length", "max_prompt", "max_new_tokens"),
    *("mesh", "rollout", "lora", "offload", "reward", "loss", "reference"),
    *("optimizer.name", "optimizer.moment", "value_optimizer.name", "value_optimizer.moment"),
)
"""Fields that decide what a plan compiles."""

# Rows as each data set of the Hub has them, and a number that makes them differ.
USER = {"role": "user", "content": "what is {} and one?"}
RIGHT = {"role": "assistant", "content": "it is {} and one."}
WRONG = {"role": "assistant", "content": "no idea about {}."}
POST = "SUBREDDIT: r/cats\n\nTITLE: {} cats\n\nPOST: we have {} cats.\n\nTL;DR:"
TALK = "\n\nHuman: what is {}?\n\nAssistant:"
ROWS = {
    "hf:allenai/tulu-3-sft-mixture": {
        "id": "a_{}",
        "messages": [USER, RIGHT],
        "source": "ai2-adapt-dev/oasst1_converted",
    },
    "hf:hendrydong/preference_700K": {
        "rejected": [USER, WRONG],
        "rejected_score": 2.0,
        "chosen_score": 3.0,
        "chosen": [USER, RIGHT],
    },
    "hf:HuggingFaceH4/ultrafeedback_binarized@train_prefs": {
        "prompt": USER["content"],
        "prompt_id": "{}",
        "chosen": [USER, RIGHT],
        "rejected": [USER, WRONG],
        "messages": [USER, RIGHT],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    },
    "hf:allenai/RLVR-GSM": {
        "messages": [{"role": "user", "content": "Question: 1 and {}?"}],
        "ground_truth": "{}",
        "dataset": "gsm8k",
    },
    "hf:openai/gsm8k:main": {
        "question": "A hen lays {} eggs. How many?",
        "answer": "It lays {} eggs.\n#### {}",
    },
    "hf:trl-lib/tldr": {"prompt": POST, "completion": " {} cats."},
    "hf:trl-lib/tldr-preference": {"prompt": POST, "chosen": " {} cats.", "rejected": " cats."},
    "runs/hh-rlhf/helpful-*/train.jsonl.gz": {
        "chosen": TALK + " it is {}.",
        "rejected": TALK + " no idea.",
    },
}
ROWS["hf:trl-lib/tldr-preference@validation"] = ROWS["hf:trl-lib/tldr-preference"]
ROWS["runs/hh-rlhf/helpful-*/test.jsonl.gz"] = ROWS["runs/hh-rlhf/helpful-*/train.jsonl.gz"]
DATA_FLAGS = ("data", "eval_data", "demonstrations")
"""Flags that name rows."""

RECORDER = """#!/bin/sh
# Stands in for Python: writes its arguments, one a line, and an empty line.
printf '%s\\n' "$@" '' >> "$RECORDED"
"""


def commands_of(path: pathlib.Path) -> list[list[str]]:
    """Run a recipe with a recorder in Python's place; return the arguments of each command.

    The first of them is the script.
    """
    with tempfile.TemporaryDirectory() as folder:
        recorder = pathlib.Path(folder, "python")
        recorder.write_text(RECORDER)
        recorder.chmod(0o755)
        recorded = pathlib.Path(folder, "recorded")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(recorder)}
        environment["RECORDED"] = str(recorded)
        environment["RUNS"] = "runs"
        subprocess.run(
            ["sh", str(path)], cwd=recipes.ROOT, env=environment, check=True, timeout=60
        )
        text = recorded.read_text()
    return [command.split("\n") for command in text.removesuffix("\n\n").split("\n\n")]


def numbered(value, number):
    """Return a row with `number` in all places of its texts."""
    if isinstance(value, dict):
        return {name: numbered(part, number) for name, part in value.items()}
    if isinstance(value, list):
        return [numbered(part, number) for part in value]
    return value.replace("{}", str(number)) if isinstance(value, str) else value


def values_of(command: list[str]) -> dict[str, str]:
    """Return the flags of a command as {name: value}; each must stand there once."""
    values = dict(word.removeprefix("--").split("=", 1) for word in command[1:])
    assert len(values) == len(command) - 1
    return values


def script_of(command: list[str]):
    """Return the module that a command runs."""
    return importlib.import_module(command[0].removesuffix(".py"))


def run_of_shape(folder: pathlib.Path, model: ModelConfig) -> None:
    """Write the config.json of a run that is not there: enough to read its model's shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"script": "train_sft", "model": dataclasses.asdict(model)})
    )


def planned_config(argv: str):
    """Return the config of a plan's arguments, and its number of devices."""
    command = plan.read_command(shlex.split(argv))
    config = flags.parse(importlib.import_module(command.script).Config, command.flags)
    shape = command.topology.partition(":")[2]
    return config, math.prod(map(int, shape.split("x")))


def parse(command: list[str], folder: pathlib.Path, model: ModelConfig):
    """Parse a command's flags with its own Config, from a run in `folder` of the shape `model`."""
    run_of_shape(folder, model)
    values = values_of(command) | {"init": str(folder)}
    words = [f"--{name}={value}" for name, value in values.items()]
    return flags.parse(script_of(command).Config, words)


def check(command: list[str], config, devices: int) -> None:
    """Raise what the script would raise before it reads anything, on as many devices."""
    script = script_of(command)
    axes = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    if axes["data"] == -1:
        axes["data"] = devices // (axes["fsdp"] * axes["tensor"])
    assert math.prod(axes.values()) == devices
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    if hasattr(config, "minibatches"):
        config = plan_filled(script, config)
        script.check(config, mesh)
        updates = config.steps * config.epochs * config.minibatches
    else:
        check_batch("batch_size", config.batch_size, config.microbatches, mesh, config.length)
        updates = config.steps
    assert config.length <= config.model.context
    make_schedule(config.optimizer, updates)


def plan_filled(script, config):
    """Return a config of train_grpo with its method's values; others as they are."""
    papers = getattr(script, "group", None)
    if papers is None:
        return config
    return flags.fill_paper_defaults(config, papers.PAPERS[config.method])


@pytest.mark.parametrize("name", RECIPES)
def test_commands_are_accepted_at_full_size_and_planned_as_they_are(name, tmp_path):
    commands = commands_of(RECIPES[name])
    plans = recipes.plans_of(RECIPES[name])
    assert len(commands) == len(plans) >= 1
    for number, (command, argv) in enumerate(zip(commands, plans, strict=True)):
        planned, devices = planned_config(argv)
        assert command[0] == f"{argv.split()[0]}.py"
        config = parse(command, tmp_path / str(number), planned.model)
        check(command, config, devices)
        # What the plan compiles is what the command runs.
        for field in PLANNED:
            if hasattr(config, field.split(".")[0]) and (field != "reward" or "reward" in argv):
                value = operator.attrgetter(field)
                assert value(config) == value(planned), field
        assert config.model.remat == planned.model.remat == "full"
        # What auto is on these chips.
        assert {config.model.dtype, planned.model.dtype} <= {"auto", "bfloat16"}


@pytest.mark.parametrize("name", RECIPES)
def test_data_sets_are_named_as_data_is(name):
    for command in commands_of(RECIPES[name]):
        values = values_of(command)
        for data in {values[flag] for flag in DATA_FLAGS if flag in values}:
            assert data in ROWS
            if data.startswith(data_files.HUB):
                repository, _, split = data_files.hub_parts(data)
                assert f"hf:{repository}" in data and data.endswith(split or data)
            else:
                assert data.endswith(data_files.KINDS)


def test_a_wrong_name_on_the_hub_and_files_of_a_pattern_are_seen(tmp_path):
    """Controls of the test above; a pattern may have its star in a folder's name."""
    with pytest.raises(UserError, match="must be hf:"):
        data_files.hub_parts("hf:openai/gsm8k:main:test")
    for part in ("base", "online"):
        (tmp_path / f"helpful-{part}").mkdir()
        (tmp_path / f"helpful-{part}" / "train.jsonl.gz").touch()
    found = data_files.files_named(f"{tmp_path}/helpful-*/train.jsonl.gz")
    assert [path.parent.name for path in found] == ["helpful-base", "helpful-online"]


def test_a_wrong_flag_an_impossible_mesh_and_a_wrong_size_are_seen(tmp_path):
    """Controls of the test above."""
    (command,) = commands_of(RECIPES["v5e256_8b_grpo"])
    (argv,) = recipes.plans_of(RECIPES["v5e256_8b_grpo"])
    planned, devices = planned_config(argv)
    with pytest.raises(UserError, match="sample_per_prompt"):
        parse([*command, "--sample_per_prompt=16"], tmp_path, planned.model)
    config = parse(command, tmp_path, planned.model)
    check(command, config, devices)
    with pytest.raises(AssertionError):
        check(command, dataclasses.replace(config, mesh=MeshConfig(1, 64, 8)), devices)
    with pytest.raises(UserError, match="samples_per_prompt"):
        check(command, dataclasses.replace(config, samples_per_prompt=32), devices)
    with pytest.raises(AssertionError):
        values_of([*command, "--batch_size=8"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_comment_says_all_that_a_reader_asks(name):
    path = RECIPES[name]
    fields = dict(recipes.fields_of(path))
    wanted = ["hardware", "start", "batch", "rate", "steps", "remat", "mesh", "aims at", "plan"]
    assert [word for word in wanted if not fields.get(word)] == []
    assert fields["not run"] == "at full size"
    assert re.search(r"arXiv \d{4}\.\d{5}|verl's documentation", fields["aims at"])
    # The number of chips is the plan's.
    _, devices = planned_config(recipes.plans_of(path)[0])
    assert re.search(rf"\b{devices}\b", fields["hardware"].replace("-", " "))


def test_the_table_of_the_page_has_the_results():
    assert recipes.section() in recipes.PAGE.read_text("utf-8")
    assert recipes.verdict("train_sft --length=1", {}) == "not yet compiled"
    # Every plan that was compiled is still a recipe's, and fits.
    plans = [argv for path in RECIPES.values() for argv in recipes.plans_of(path)]
    results = recipes.read_results()
    assert results or not recipes.RESULTS.exists()
    for argv, text in results.items():
        assert argv in plans and text.splitlines()[-1].startswith("fits: ")


def executable(path: pathlib.Path, script: str) -> None:
    """Write a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_command_is_started_again_where_that_is_of_use(tmp_path):
    """Codes 75 and 143 are met again, 2, 127 and Ctrl-C's 130 are not, nor are five in a row.

    sleep is stood in for, and in the second half date: with 200 seconds between two calls, five in
    a row are no reason to give up.
    """
    slow = tmp_path / "slow"
    slow.mkdir()
    executable(tmp_path / "sleep", "")
    executable(slow / "date", f"echo >> {slow}/calls; echo $(($(wc -l < {slow}/calls) * 200))")
    program = tmp_path / "program"
    count = tmp_path / "count"
    for codes, starts, end, path in (
        ((0,), 1, 0, ""),
        ((75, 143, 0), 3, 0, ""),
        ((2, 0), 1, 2, ""),
        ((1, 0), 1, 1, ""),
        ((75, 130, 0), 2, 130, ""),
        ((126, 0), 1, 126, ""),
        ((127, 0), 1, 127, ""),
        ((*4 * [139], 0), 5, 0, ""),
        ((*5 * [139], 0), 5, 139, ""),
        ((*7 * [139], 0), 8, 0, f"{slow}:"),
    ):
        count.write_text("")
        cases = "".join(f"{n}) exit {code};; " for n, code in enumerate(codes, 1))
        executable(
            program, f'echo >> {count}\ncase $(wc -l < {count} | tr -d " ") in {cases} esac'
        )
        ended = subprocess.run(
            ["sh", "recipes/until_done.sh", str(program)],
            cwd=recipes.ROOT,
            env={"PATH": f"{path}{tmp_path}:/usr/bin:/bin"},
        )
        assert (ended.returncode, count.read_text().count("\n")) == (end, starts)


# --- the first steps


SMALL = {
    "steps": 2,
    "length": 64,
    "max_prompt": 24,
    "max_new_tokens": 8,
    "minibatches": 1,
    "epochs": 1,
    "eval_every": 2,
    "eval_records": 8,
    "save_every": 2,
    "optimizer.warmup": 1,
    "value_optimizer.warmup": 1,
    # The CPU's own type.
    "model.dtype": "auto",
}
"""Values of the flags that a recipe sets, in the small."""


def tiny(model: ModelConfig) -> ModelConfig:
    """Return a tiny model of the same family."""
    grouped = model.kv_heads < model.heads
    return dataclasses.replace(
        model,
        vocab=512,
        width=32,
        mlp_width=64,
        layers=2,
        heads=8,
        kv_heads=4 if grouped else 8,
        head_dim=8,
        context=256,
    )


def small_mesh(values: dict[str, str]) -> dict[str, int]:
    """Return the mesh of a command cut to eight devices, its largest axes first."""
    axes = {name: int(value) for name, value in values.items() if name.startswith("mesh.")}
    while math.prod(axes.values()) > 8:
        largest = max(axes, key=axes.__getitem__)
        axes[largest] //= 2
    return axes


def small(command: list[str], folder: pathlib.Path) -> list[str]:
    """Return a command's flags for a tiny model, its runs and its data in `folder`."""
    values = values_of(command)
    changed: dict[str, object] = {name: value for name, value in SMALL.items() if name in values}
    changed |= small_mesh(values)
    # As many micro-batches as two, and rows for all.
    parts = min(int(values["microbatches"]), 2)
    changed |= {"microbatches": parts, "batch_size": 8 * parts}
    if "samples_per_prompt" in values:
        changed |= {"samples_per_prompt": 2, "batch_size": 16 * parts}
    if "rollout.tensor" in values:
        mesh_tensor = changed.get("mesh.tensor", 1)
        changed["rollout.tensor"] = 2 * mesh_tensor

    # The data set's rows as a file, and all runs in the folder.
    for flag in DATA_FLAGS:
        if flag in values:
            rows = [numbered(ROWS[values[flag]], number) for number in range(80)]
            name = re.sub(r"\W", "_", values[flag])
            changed[flag] = write(folder / f"{name}.jsonl", rows)
    values |= {name: str(value) for name, value in changed.items()}
    for name in ("init", "run", "reward"):
        if values.get(name, "").startswith("runs/"):
            values[name] = str(folder / values[name])
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "name",
    [
        name if name == "v5e256_8b_sft" else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_the_first_steps_run_with_a_tiny_model_of_the_family(name, tmp_path):
    commands = commands_of(RECIPES[name])
    planned, _ = planned_config(recipes.plans_of(RECIPES[name])[0])

    # A run to start from, in the place of the imported one.
    train_start(tmp_path / values_of(commands[0])["init"], planned.model)
    for command in commands:
        take_steps(command, tmp_path)


def train_start(folder: pathlib.Path, model: ModelConfig) -> None:
    """Train a tiny model of the family of `model` for one step, as a run in `folder`."""
    start = train_sft.Config(run=str(folder), model=tiny(model), steps=1, length=64, eval_every=0)
    train_sft.main(start)


def take_steps(command: list[str], folder: pathlib.Path) -> None:
    """Take the first two steps of a command in the small, from and to runs in `folder`."""
    script = script_of(command)
    config = flags.parse(script.Config, small(command, folder))
    metrics = script.main(config)
    updates = [metrics[name] for name in metrics if name.endswith("updates")]
    assert metrics["step"] == 2 and min(updates) > 0
    assert all(math.isfinite(value) for value in metrics.values())


LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
TULU_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def with_llama_tokens(folder: pathlib.Path, template: str, ends: list[str]) -> None:
    """Give an exported folder a tokenizer with Llama 3's special tokens, in place of its own."""
    texts = [numbered(USER["content"] + RIGHT["content"], number) for number in range(80)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=made,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_piece=BEGIN,
        eos_piece=END,
        control_symbols=[END_OF_TURN, "<|start_header_id|>", "<|end_header_id|>"],
        minloglevel=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    (folder / "chat_template.jinja").write_text(template)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    ids = [pieces.piece_to_id(end) for end in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def test_an_end_of_a_turn_that_is_not_the_eos_must_be_named(tmp_path):
    """As the comments of the recipes that start from such a folder say."""
    (tmp_path / "config.json").write_text("{}")
    messages = [USER, RIGHT]
    for template, ends, last in (
        (TULU_3, [END], END),
        (LLAMA_3, [END, END_OF_TURN], END_OF_TURN),
        (LLAMA_3, [END], None),
    ):
        with_llama_tokens(tmp_path, template, ends)
        tokenizer = Tokenizer(read_tokenizer(tmp_path))
        if last is None:
            with pytest.raises(UserError, match="ends an assistant's turn with none"):
                tokenizer.chat(messages)
            continue
        tokens, mask = tokenizer.chat(messages)
        trained = [token for token, counts in zip(tokens, mask, strict=True) if counts]
        assert trained == [*tokenizer.encode(RIGHT["content"]), tokenizer.pieces.piece_to_id(last)]


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_the_first_steps_run_from_a_folder_with_a_chat_template(tmp_path):
    planned, _ = planned_config(recipes.plans_of(RECIPES["h100x8_8b_sft"])[0])
    train_start(tmp_path / "first", planned.model)
    for name, template, ends in (
        ("h100x8_8b_sft", TULU_3, [END]),
        ("h100x8_8b_dpo", LLAMA_3, [END, END_OF_TURN]),
    ):
        place = tmp_path / name
        place.mkdir()
        run(convert, f"--write={place}/folder", f"--run={tmp_path}/first")
        with_llama_tokens(place / "folder", template, ends)
        (command,) = commands_of(RECIPES[name])
        run(convert, f"--read={place}/folder", f"--run={place / values_of(command)['init']}")
        take_steps(command, place)
