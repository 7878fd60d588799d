"""Forks: what a run is follows from what it holds; what cannot be read is refused in a line."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ONE_DEVICE, run

import train_sft
from model import ScalarModel, init_and_apply
from model_config import PRESETS, ModelConfig, stored_model
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError, command_name
from runtime.run_folder import describe_run, load_model_config
from sharding import MeshConfig, make_mesh
from train_state import has_scalar_head, load_params, starting_critic

ROOT = pathlib.Path(__file__).parents[1]
TINY = ["--model.preset=tiny", "--length=32", "--batch_size=8", "--steps=1", "--eval_every=0"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The least that a run stores."""

    run: str
    model: ModelConfig = PRESETS["tiny"]


def save(folder, script, params, **others):
    """Save `params` as the one step of a run of `script`; `others`: more of its config.json."""
    with Checkpoints(str(folder), Config(str(folder)), script=script) as checkpoints:
        checkpoints.config.update(others)
        checkpoints.save(0, {"params": params})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    return str(folder)


def edit_model(folder, **fields):
    """Write `fields` into the model of a run's config.json."""
    path = pathlib.Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["model"] |= fields
    path.write_text(json.dumps(config))


def test_a_reward_model_is_told_by_its_head_whatever_script_made_it(tmp_path):
    init, _ = init_and_apply(ScalarModel(PRESETS["tiny"]))
    params = init(jax.random.key(0))
    assert has_scalar_head(save(tmp_path / "mine", "experiments/mine/train_quality", params))
    decoder = {"decoder": params["decoder"]}
    assert not has_scalar_head(save(tmp_path / "named", "train_rm", decoder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        has_scalar_head(str(tmp_path / "empty"))


def test_a_critic_from_a_reward_model_s_decoder_starts_at_0(tmp_path):
    init, _ = init_and_apply(ScalarModel(PRESETS["tiny"]))
    params = init(jax.random.key(0)) | {"bias": jnp.float32(3.0)}
    folder = save(tmp_path / "judge", "train_rm", params)
    config = SimpleNamespace(model=PRESETS["tiny"], init=folder, seed=0)
    critic, apply = starting_critic(config, {}, make_mesh(MeshConfig()))
    rows = jnp.ones((1, 4), jnp.int32)
    np.testing.assert_array_equal(apply(critic, rows, rows, rows).scalars_BT, 0.0)
    # Control: its decoder is the reward model's.
    np.testing.assert_array_equal(critic["decoder"]["embed"], params["decoder"]["embed"])


def test_fields_that_this_code_does_not_know_end_in_a_line_with_the_remedy(tmp_path):
    folder = save(tmp_path / "run", "experiments/mine/train_sft", {"w": jnp.ones(2)})
    assert stored_model(folder) == PRESETS["tiny"]
    edit_model(folder, slopes=8)
    with pytest.raises(UserError) as fault:
        stored_model(folder)
    told = str(fault.value)
    assert told.startswith(f"{folder}: made by experiments/mine/train_sft")
    assert "its model has slopes" in told
    assert "PYTHONPATH=experiments/mine:. python -P" in told and "\n" not in told


def test_fields_that_a_run_lacks_are_named_unless_they_have_a_default(tmp_path):
    @dataclasses.dataclass
    class Needs:
        layers: int
        slopes: int

    folder = save(tmp_path / "run", "train_sft", {"w": jnp.ones(2)})
    path = pathlib.Path(folder) / "config.json"
    path.write_text(json.dumps({"script": "train_sft", "model": {"layers": 2}}))
    with pytest.raises(UserError, match="lacks slopes; read it with the version that made it"):
        load_model_config(folder, Needs)
    assert stored_model(folder).layers == 2
    # Without any field it is no shape of ours, which would be the default one in silence.
    path.write_text(json.dumps({"script": "train_sft"}))
    with pytest.raises(UserError, match=r"config\.json: has no model"):
        stored_model(folder)


def test_a_fork_s_model_code_is_stored_and_its_runs_need_it(tmp_path, monkeypatch):
    assert "model_code" not in describe_run(Config("r"), "train_sft", None)
    folder = save(tmp_path / "root", "train_sft", {"w": jnp.ones(2)})
    theirs = save(
        tmp_path / "theirs", "mine/train_sft", {"w": jnp.ones(2)}, model_code="mine/model.py"
    )
    for read in (stored_model, load_params):
        with pytest.raises(UserError, match=r"made with mine/model\.py") as fault:
            read(theirs)
        told = str(fault.value)
        assert "but this command uses the root's model.py; run this command as" in told
        assert f"PYTHONPATH=mine:. python -P {command_name()} ..." in told

    # In the fork itself it is read, and so are runs of the root, which a fork may start from.
    fork = SimpleNamespace(__file__=str(ROOT / "mine" / "model.py"))
    monkeypatch.setitem(sys.modules, "model", fork)
    assert describe_run(Config("r"), "s", None)["model_code"] == "mine/model.py"
    assert stored_model(theirs) == stored_model(folder) == PRESETS["tiny"]


@pytest.mark.slow
def test_a_forked_model_trains_resumes_and_is_refused_by_the_root(tmp_path):
    """From a folder with copies of train_sft.py and model.py, as docs/forking.md says."""
    fork = tmp_path / "fork"
    fork.mkdir()
    for name in ("train_sft.py", "model.py"):
        shutil.copy(ROOT / name, fork)

    def start(*command, path):
        environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ONE_DEVICE}
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    made = start(
        fork / "train_sft.py", *TINY, "--optimizer.warmup=0", f"--run={tmp_path}/run", path="."
    )
    assert made.returncode == 0, made.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["script"] == f"{fork}/train_sft" and config["model_code"] == f"{fork}/model.py"
    generate = ["generate.py", f"--run={tmp_path}/run", "--prompt=a", "--max_new_tokens=2"]
    refused = start(*generate, path=".")
    assert refused.returncode == 2 and f"{fork}/model.py" in refused.stderr
    assert f"PYTHONPATH={fork}:. python -P generate.py" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert start("-P", *generate, path=f"{fork}:.").returncode == 0
    with pytest.raises(UserError, match="python -P"):
        run(train_sft, *TINY, f"--init={tmp_path}/run", f"--run={tmp_path}/next")
