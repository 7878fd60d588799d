"""What a run reads by name cannot change under it: content is pinned, and of runs the step."""

import ast
import dataclasses
import json
import pathlib
import shutil
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from running import fails, run, write

import train_grpo
import train_rm
import train_sft
from runtime import inputs as pinning
from runtime import run_folder
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.guard import GuardConfig
from runtime.inputs import RunAtStep, named_inputs, with_pinned_runs
from runtime.run_folder import finished_steps, identity_hash, load_config
from train_state import load_params

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """As a fork might have it: fields that no script of the root has name inputs too."""

    run: str = ""
    steps: int = 9
    method: Literal["grpo", "rloo"] = "grpo"
    data: str = "world"
    extra_data: str | None = None
    teacher: str | None = None
    reward: tuple[str, ...] = ()


def checkpoints(config):
    return Checkpoints(config.run, config, script="fork", tokenizer=None, keep=2)


def extend(folder, *steps, value=0.0, **fields):
    """Save `steps` of a run whose parameter is the step's number, plus `value`."""
    with checkpoints(Config(run=str(folder), **fields)) as saver:
        for step in steps:
            saver.save(step, {"params": {"w": jnp.full(4, step + value)}})


def resume(config):
    """Open a run as a script does, and return its config with what it reads."""
    config = with_pinned_runs(config)
    with checkpoints(config) as saver:
        if not finished_steps(saver.folder):
            saver.save(1, {"params": {"w": jnp.zeros(4)}})
    return config


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Make two files, two runs of one step, and a config that names them."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [{"text": name}])
    for name in ("rm", "sft", "other", "grpo", "world"):
        extend(tmp_path / name, 1)
    return Config(
        run="run",
        data="a.jsonl",
        extra_data="b.jsonl",
        teacher="sft",
        reward=("rm", "module:function", "other", "http://127.0.0.1:9"),
    )


def test_what_is_named_is_found_and_nothing_else(inputs):
    flags = {"data", "extra_data", "teacher", "reward.0", "reward.2"}
    assert named_inputs(inputs).keys() == flags
    # A choice of words, the built-in data and the run itself are no inputs, whatever lies here.
    assert named_inputs(Config(run="grpo")) == {}
    resume(inputs)
    assert load_config("run")["inputs"].keys() == flags


@pytest.mark.parametrize("flag", ["data", "extra_data"])
def test_another_content_of_a_file_is_refused(inputs, flag):
    resume(inputs)
    resume(dataclasses.replace(inputs, steps=12))  # control
    path = getattr(inputs, flag)
    with open(path, "a") as file:
        file.write("\n")
    before = load_config("run")
    with pytest.raises(UserError, match=f"--{flag}={path}: its content is not what run began"):
        resume(inputs)
    assert load_config("run") == before


@pytest.mark.parametrize("field", ["teacher", "reward"])
def test_the_step_that_a_run_began_with_is_read_however_long_it_went_on(inputs, field):
    resume(inputs)
    name = "sft" if field == "teacher" else "rm"
    extend(name, 2)
    config = resume(dataclasses.replace(inputs, steps=12))
    named = config.teacher if field == "teacher" else config.reward[0]
    assert isinstance(named, RunAtStep) and named == name
    assert load_params(named)["w"][0] == 1 and load_params(name)["w"][0] == 2
    # Gone: what needs it is told, and what does not goes on.
    extend(name, 3, 4)
    config = resume(inputs)
    named = config.teacher if field == "teacher" else config.reward[0]
    with pytest.raises(UserError, match=r"no checkpoint of step 1 \(finished.*restore it"):
        load_params(named)


def test_a_step_that_a_trainer_removes_meanwhile_is_passed_over(inputs, monkeypatch):
    """The names of steps are read first, then their manifests: one of them may be gone by then."""
    resume(inputs)
    extend("sft", 2)
    before = iter([[9, 2, 1]])
    there = pinning.finished_steps
    monkeypatch.setattr(pinning, "finished_steps", lambda folder: next(before, there(folder)))
    assert pinning.at_newest("sft").step == 2
    before = iter([[9, 2, 1]])
    assert pinning.step_of_sum("sft", load_config("run")["inputs"]["teacher"]["sha256"]) == 1
    # Where it is the last of them there is none.
    before = iter([[9]])
    assert pinning.step_of_sum("sft", "0" * 64) is None


def test_a_run_that_has_saved_nothing_may_begin_anew_on_other_content(inputs):
    with checkpoints(with_pinned_runs(inputs)):
        first = load_config("run")["inputs"]["data"]
    with open("a.jsonl", "a") as file:
        file.write("\n")
    resume(inputs)
    assert load_config("run")["inputs"]["data"] != first


def test_another_run_of_the_same_name_is_refused(inputs):
    resume(inputs)
    shutil.rmtree("sft")
    extend("sft", 1, value=0.5)
    with pytest.raises(UserError, match="--teacher=sft: its step 1 is not what run began with"):
        resume(inputs)


def test_a_script_that_pins_nothing_is_refused_not_answered(inputs):
    resume(inputs)
    extend("rm", 2)
    with pytest.raises(UserError, match="--reward=rm: its content"), checkpoints(inputs):
        pass


def rewrite(folder, config):
    """Make the run in `folder` one whose config.json has always been `config`."""
    (folder / "config.json").write_text(json.dumps(config))
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        body = json.loads(manifest.read_text())
        del body["self"]
        body["config"] = identity_hash(config)
        manifest.write_bytes(run_folder._seal(body))


def restore(config):
    like = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with checkpoints(config) as saver:
        step, _, _ = saver.restore(like)
        saver.save(step + 1, {"params": {"w": jnp.full(4, step + 1.0)}})
    return step


def test_runs_from_before_a_field_or_the_pins_go_on(inputs, tmp_path):
    extend("old", 1, data="a.jsonl")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    # What today's code has and the run does not: a field has its default there.
    del config["inputs"], config["versions"]["plumb"], config["reward"]
    rewrite(tmp_path / "old", config)
    resumed = Config(run="old", data="a.jsonl")
    with pytest.raises(UserError, match=r"reward is \[\] in this run and \['rm'\] now"):
        restore(dataclasses.replace(resumed, reward=("rm",)))
    assert restore(resumed) == 1
    # Pinned from now on, and its first step is known as before.
    assert load_config("old")["inputs"].keys() == {"data"}
    shutil.rmtree("old/checkpoints/2")
    assert load_params("old")["w"][0] == 1 and restore(resumed) == 1
    with open("a.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"--data=a\.jsonl: its content"):
        restore(resumed)


def test_a_field_of_another_version_is_named_with_the_version(inputs, tmp_path):
    extend("new", 1)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config["versions"]["plumb"] = "9.9"
    rewrite(tmp_path / "new", {**config, "nesterov": True})
    with pytest.raises(UserError, match=r"nesterov is True, which is unknown .* of Plumb 9\.9"):
        restore(Config(run="new"))


@dataclasses.dataclass(frozen=True)
class Guarded(Config):
    guard: GuardConfig = GuardConfig()
    kl_limit: float = 50.0
    on_bad_row: str = "stop"


def test_when_a_run_gives_up_may_change_also_of_one_from_before(tmp_path):
    """Its manifests name the hash of a config in which these fields counted."""
    run = tmp_path / "run"
    config = Guarded(run=str(run))
    with checkpoints(config) as saver:
        saver.save(1, {"params": {"w": jnp.full(4, 1.0)}})
    body = json.loads((run / "checkpoints" / "1" / "manifest.json").read_text())
    del body["self"]
    everything = run_folder._identity(
        load_config(str(run)), run_folder.FREE - run_folder.FREED_LATER
    )
    assert everything.keys() >= run_folder.FREED_LATER
    body["config"] = run_folder._hash(everything)
    (run / "checkpoints" / "1" / "manifest.json").write_bytes(run_folder._seal(body))
    assert load_params(str(run))["w"][0] == 1
    raised = dataclasses.replace(
        config, guard=GuardConfig(most=99), kl_limit=3.0, on_bad_row="skip"
    )
    assert restore(raised) == 1
    shutil.rmtree(run / "checkpoints" / "2")
    assert load_params(str(run))["w"][0] == 1 and restore(config) == 1
    with pytest.raises(UserError, match=r"guard\.skip is 8 in this run and 9 now"):
        restore(dataclasses.replace(config, guard=GuardConfig(skip=9)))


# --- the catalogue, and functions


class Sums(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Questions and answers of which the last one can be chosen."""

    VERSION = tfds.core.Version("1.0.0")
    last = "#### 7"

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"question": text, "answer": text})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _):
        return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            answer = f"#### {i}" if i < 7 else self.last
            yield i, {"question": f"{i} + 0?", "answer": answer}


class NewerSums(Sums, skip_registration=True):
    name = "sums"
    VERSION = tfds.core.Version("1.0.1")


def prepare(builder, place, last="#### 7"):
    """Prepare a data set in `place` as a user would, with another last answer."""
    tfds.disable_progress_bar()
    made = builder(data_dir=place, file_format="array_record")
    made.last = last
    made.download_and_prepare()


def test_a_data_set_of_the_catalogue_is_pinned(inputs, tmp_path, monkeypatch):
    place = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(place))
    config = dataclasses.replace(inputs, data="tfds:sums")
    assert "data" not in named_inputs(config)
    prepare(Sums, place)
    resume(config)
    pin = load_config("run")["inputs"]["data"]
    assert pin.keys() == {"version", "sha256"} and pin["version"] == "1.0.0"
    # The same rows prepared anew are the same, whatever describes them.
    shutil.rmtree(place)
    prepare(Sums, place)
    about = place / "sums" / "1.0.0" / "dataset_info.json"
    about.write_text(about.read_text() + "\n")
    resume(config)

    # One answer of the same length.
    shutil.rmtree(place)
    prepare(Sums, place, last="#### 8")
    with pytest.raises(UserError, match="--data=tfds:sums: its content is not what run began"):
        resume(config)
    shutil.rmtree(place)
    prepare(Sums, place)
    resume(config)  # control
    prepare(NewerSums, place)
    with pytest.raises(UserError, match=r"--data=tfds:sums: its version 1\.0\.1 is not what run"):
        resume(config)


def test_the_module_of_a_function_is_pinned(inputs, tmp_path):
    """Its own file: what it imports is not."""
    (tmp_path / "imported_by_it.py").write_text("HIGHEST = 1.0\n")
    module = tmp_path / "pinned_rule.py"
    text = "import imported_by_it\n\ndef short(response, record):\n    return 1.0\n"
    module.write_text(text)
    config = dataclasses.replace(inputs, reward=("rm", "pinned_rule:short"))
    resume(config)
    assert load_config("run")["inputs"]["reward.1"].keys() == {"module_sha256"}
    (tmp_path / "imported_by_it.py").write_text("HIGHEST = 2.0\n")
    resume(config)
    module.write_text(text.replace("1.0", "2.0"))
    told = "--reward=pinned_rule:short: the file of its module is not what run began with"
    with pytest.raises(UserError, match=told):
        resume(config)
    module.write_text(text)
    resume(config)  # control


@pytest.mark.slow
def test_a_script_stops_where_its_function_or_its_catalogue_has_changed(
    tmp_path, monkeypatch, capsys
):
    """In one line, with code 2, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("PLUMB_CACHE", str(tmp_path / "cache"))
    prepare(Sums, tmp_path / "tfds")
    rule = tmp_path / "ruled_here.py"
    rule.write_text("def short(response, record):\n    return -1.0 * len(response)\n")
    sft = [*TINY, "--model.preset=tiny", "--data=tfds:sums", "--length=32", "--run=sft"]
    online = [*TINY, "--init=sft", "--data=tfds:sums", "--reward=ruled_here:short", "--run=online"]
    online += [
        "--max_prompt=24",
        "--max_new_tokens=4",
        "--minibatches=1",
        "--samples_per_prompt=2",
    ]
    run(train_sft, *sft, "--steps=1")
    run(train_grpo, *online, "--steps=1")
    with rule.open("a") as file:
        file.write("# another version\n")
    line = fails(train_grpo, [*online, "--steps=2"], capsys)
    assert "--reward=ruled_here:short: the file of its module is not what online began" in line

    shutil.rmtree(tmp_path / "tfds")
    prepare(Sums, tmp_path / "tfds", last="#### 9")
    line = fails(train_sft, [*sft, "--steps=2"], capsys)
    assert "--data=tfds:sums: its content is not what sft began with" in line


# --- through scripts

TINY = ["--optimizer.warmup=0", "--eval_every=0", "--batch_size=16", "--save_every=1"]


def test_every_script_pins_what_it_reads():
    """The first thing that a main does to its config, in forks too."""
    scripts = [*ROOT.glob("train_*.py"), *ROOT.glob("experiments/*/train_*.py")]
    mains = {}
    for path in scripts:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                mains[path] = ast.unparse(node)
    assert len(mains) >= 15
    for path, text in mains.items():
        pinned = text.find("pin_inputs(")
        read = [text.find(f"{name}(") for name in ("open_source", "load", "starting_params")]
        assert 0 < pinned < min(at for at in read if at > 0), path


@pytest.mark.slow
def test_a_reference_and_a_reward_stay_as_they_were(tmp_path, monkeypatch):
    """GRPO is resumed to the bit though the runs that it reads were trained on."""
    monkeypatch.chdir(tmp_path)
    sft = [*TINY, "--model.preset=tiny", "--length=32", "--run=sft"]
    rm = [*TINY, "--init=sft", "--length=64", "--run=rm"]
    online = [*TINY, "--init=sft", "--reward=rm", "--minibatches=2", "--samples_per_prompt=2"]
    online += ["--max_prompt=48", "--max_new_tokens=8"]
    run(train_sft, *sft, "--steps=1")
    run(train_rm, *rm, "--steps=1")
    run(train_grpo, *online, "--steps=2", "--run=whole")
    run(train_grpo, *online, "--steps=2", "--run=half")
    shutil.rmtree("half/checkpoints/2")
    run(train_sft, *sft, "--steps=3", "--keep_checkpoints=9")
    run(train_rm, *rm, "--steps=3", "--keep_checkpoints=9")
    run(train_grpo, *online, "--steps=2", "--run=half")
    jax.tree.map(np.testing.assert_array_equal, load_params("half"), load_params("whole"))
    # Control: a new run takes the newest, and ends elsewhere.
    run(train_grpo, *online, "--steps=2", "--run=new")
    assert not np.array_equal(
        load_params("new")["decoder"]["embed"], load_params("whole")["decoder"]["embed"]
    )
