"""Runs made before fields were renamed: read by today's code, never resumed by it."""

import json
import pathlib

import numpy as np
import pytest
from running import run

import train_sft
from runtime import run_folder
from runtime.errors import UserError
from runtime.run_folder import RENAMED, identity_hash, load_config
from train_state import load_params

FLAGS = ["--model.preset=tiny", "--model.vocab=512", "--steps=2", "--optimizer.warmup=1"]
FLAGS += ["--eval_every=0"]


def made_before_the_renaming(folder: pathlib.Path) -> None:
    """Give config.json and the manifests of a run the old names of fields."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for old, new in RENAMED.items():
        part, _, old_field = old.rpartition(".")
        new_field = new.rpartition(".")[2]
        fields = config[part] if part else config
        if new_field in fields and old_field not in fields:
            fields[old_field] = fields.pop(new_field)
    path.write_text(json.dumps(config))
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        body = json.loads(manifest.read_text())
        del body["self"]
        body["config"] = identity_hash(config)
        manifest.write_bytes(run_folder._seal(body))


@pytest.fixture
def old_run(tmp_path) -> pathlib.Path:
    run(train_sft, *FLAGS, f"--run={tmp_path}/old")
    params = load_params(f"{tmp_path}/old")
    made_before_the_renaming(tmp_path / "old")
    stored = json.loads((tmp_path / "old" / "config.json").read_text())
    assert "hidden" in stored["model"] and "keep" in stored  # control: the names are the old ones
    np.savez(tmp_path / "embed.npz", embed=params["decoder"]["embed"])
    return tmp_path / "old"


def test_an_old_run_is_read_with_todays_names(old_run):
    model = load_config(str(old_run))["model"]
    assert model["mlp_width"] == 64 and "hidden" not in model
    embed = load_params(str(old_run))["decoder"]["embed"]
    np.testing.assert_array_equal(embed, np.load(old_run.parent / "embed.npz")["embed"])
    run(train_sft, *FLAGS[2:], f"--init={old_run}", f"--run={old_run.parent}/new")


def test_an_old_run_is_not_resumed(old_run):
    with pytest.raises(UserError, match=r"config.json: made before .* was renamed to .*--init"):
        run(train_sft, *FLAGS, "--steps=4", f"--run={old_run}")


@pytest.mark.parametrize("gemma", [True, False])
def test_gemma_was_one_switch_and_is_three_settings(tmp_path, gemma):
    old = {"script": "train_sft", "model": {"gemma": gemma, "hidden": 8}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_config(str(tmp_path))["model"] == {
        "activation": "gelu" if gemma else "silu",
        "scale_embedding": gemma,
        "zero_centered_norm": gemma,
        "mlp_width": 8,
    }
