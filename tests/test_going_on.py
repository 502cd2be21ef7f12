"""Runs that are started again, in their own folder or from another run's checkpoint."""

import json
import shutil

import pytest
from llamafactory_video.train.checkpoint import CheckpointError
from runs import BATCH, LORA, train


def test_a_finished_run_that_is_started_again_changes_nothing(keys, tmp_path):
    again = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    lines = train(keys, tmp_path, **again)
    files = ("model.safetensors", "checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt")
    before = [(tmp_path / name).read_bytes() for name in files]
    assert train(keys, tmp_path, **again) == lines
    assert [(tmp_path / name).read_bytes() for name in files] == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "train_results.json").read_text())["train_steps_per_second"] == 0
    with pytest.raises(ValueError, match="checkpoint-3 is of another finetuning_type than lora"):
        train(keys, tmp_path, **again, **LORA)


def test_a_resumed_run_says_what_has_changed(keys, tmp_path, told):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(keys, tmp_path, max_steps=2, **saving)
    with pytest.raises(CheckpointError, match=r"would have no effect:\n  learning_rate: 0.002 -> 0.001\nGive another"):
        train(keys, tmp_path, max_steps=3, learning_rate=1e-3, **saving)
    assert not told
    lines = train(keys, tmp_path, max_steps=4, warmup_steps=0, lr_scheduler_type="linear", **saving)
    assert len(told) == 1 and "resuming at step 2 from" in told[0] and "warmup_steps: 3 -> the default" in told[0]
    # The rate of the next step was set before the run was cut short.
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([2e-3 * 2 / 3, 2e-3 * 1 / 4])


@pytest.fixture(scope="module")
def another_run(keys, tmp_path_factory):
    """Two steps, a checkpoint after each."""
    output = tmp_path_factory.mktemp("another") / "run"
    train(keys, output, max_steps=2, save_strategy="steps", save_steps=1)
    return output


def test_another_runs_rates_are_refused(keys, another_run, tmp_path):
    """In a folder of its own as in the run's own: the optimizer's state brings them along."""
    checkpoint = str(another_run / "checkpoint-1")
    other = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.9}
    with pytest.raises(CheckpointError, match="would have no effect") as caught:
        train(keys, tmp_path, max_steps=3, resume_from_checkpoint=checkpoint, **other)
    for line in ("learning_rate: 0.002 -> 0.001", "weight_decay: 0.01 -> 0.1", "adam_beta2: the default -> 0.9"):
        assert f"\n  {line}" in str(caught.value)
    assert not (tmp_path / "run.json").exists()


def test_rates_are_compared_where_a_run_left_no_record(keys, another_run, tmp_path):
    origin = shutil.copytree(another_run, tmp_path / "stock")
    (origin / "run.json").unlink()
    checkpoint = str(origin / "checkpoint-1")
    assert len(train(keys, tmp_path / "same", max_steps=2, resume_from_checkpoint=checkpoint)) == 2
    with pytest.raises(CheckpointError, match=r"vision_tower: rate 0\.0002 and .* in the recipe 0\.0003 and"):
        train(keys, tmp_path / "new", max_steps=2, resume_from_checkpoint=checkpoint, vision_tower_lr=3e-4)


def test_another_runs_checkpoint_with_nothing_left_to_train_is_refused(keys, another_run, tmp_path):
    checkpoint = str(another_run / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"of another run: this recipe has 2 steps, so nothing would be trained"):
        train(keys, tmp_path, dataset="clips", max_steps=2, resume_from_checkpoint=checkpoint)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_finished_run_on_other_data_is_refused_in_its_own_folder(keys, another_run, tmp_path):
    output = shutil.copytree(another_run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"of other data: this recipe has 2 steps, so nothing would be trained"):
        train(keys, output, dataset="clips", max_steps=2, save_strategy="steps", save_steps=1)


def test_going_on_from_another_run_is_told_and_recorded(keys, another_run, tmp_path, told):
    checkpoint = str(another_run / "checkpoint-1")
    lines = train(keys, tmp_path, dataset="clips", max_steps=3, resume_from_checkpoint=checkpoint)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len(told) == 1 and f"resuming at step 1 from {checkpoint} with a changed recipe" in told[0]
    assert "dataset: mixed -> clips" in told[0] and "data.train.records" in told[0]
    record, earlier = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path, another_run))
    (resumed,) = record["history"]
    assert resumed["from_step"] == 1 and resumed["run_started"] == earlier["started"]
    assert resumed["changed"]["dataset"] == {"before": "mixed", "now": "clips"}
    assert "resumed from step 1" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("run", r"run is the folder of a run, not of a checkpoint; give .*run/checkpoint-2"),
        ("nothing", "there is no folder .*nothing"),
        ("run/runs", r"runs has no trainer_state\.json, so it is not a complete checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_said(keys, another_run, tmp_path, checkpoint, message):
    (another_run / "runs").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        train(keys, tmp_path, max_steps=3, resume_from_checkpoint=str(another_run.parent / checkpoint))


def test_resume_from_checkpoint_true_takes_the_last_whole_one(keys, another_run, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint is true, but .* has no complete checkpoint"):
        train(keys, tmp_path / "none", max_steps=3, resume_from_checkpoint=True)
    output = shutil.copytree(another_run, tmp_path / "run")
    (output / "checkpoint-2" / "trainer_state.json").write_text("{cut")
    assert len(train(keys, output, max_steps=2, resume_from_checkpoint=True)) == 2


def test_another_shape_of_adapter_is_refused(keys, tmp_path):
    train(keys, tmp_path / "a", max_steps=1, save_strategy="steps", save_steps=1, **LORA)
    with pytest.raises(ValueError, match="was trained with lora_rank 4, and the recipe has 8"):
        checkpoint = str(tmp_path / "a" / "checkpoint-1")
        train(keys, tmp_path / "b", max_steps=2, resume_from_checkpoint=checkpoint, **{**LORA, "lora_rank": 8})


def test_weights_alone_are_nothing_to_go_on_from(keys, tmp_path):
    train(keys, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds only weights .*`model_name_or_path: .*checkpoint-2`"):
        train(keys, tmp_path, max_steps=4)


def test_an_overwritten_run_leaves_nothing_to_go_on_from(keys, tmp_path, told):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(keys, tmp_path, max_steps=4, **saving)
    keep = tmp_path / "checkpoint-best"
    keep.mkdir()
    train(keys, tmp_path, max_steps=2, overwrite_output_dir=True, **saving)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-best"]
    assert told == [f"overwrite_output_dir: removed {tmp_path / 'checkpoint-2'}, {tmp_path / 'checkpoint-4'}"]


def test_speeds_are_of_the_steps_that_were_made(keys, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(keys, tmp_path, max_steps=2, **saving)
    train(keys, tmp_path, max_steps=4, **saving)
    last = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][-1]
    assert last["train_samples_per_second"] == pytest.approx(2 * BATCH / last["train_runtime"], rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vision_tower_lr": "2e-6x"},
            'vision_tower_lr must be a number of at least 0; found the text "2e-6x"; YAML reads 1e-6',
        ),
        ({"mm_projector_lr": -1e-6}, "mm_projector_lr must be a number of at least 0; found -1e-06$"),
        ({"freeze_vision_tower": True}, "vision_tower_lr is given, but no parameter of the vision_tower trains"),
    ],
)
def test_rates_that_cannot_be_are_refused(keys, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(keys, tmp_path, **overrides)
