"""Runs that are killed: the next start goes on from the last whole checkpoint, to the same losses and weights.

Each run is a group of real processes that SIGKILL ends together, at random moments and while a checkpoint is being
written.
"""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import write_clip
from llamafactory_video.demo.tiny_model import save_tiny_model
from processes import Run
from safetensors.torch import load_file

STEPS = 24


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A recipe of 24 steps over three epochs of shuffled clips, with dropout where there is LoRA."""
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    rows = []
    for i in range(31):
        if i < 4:
            write_clip(folder / f"{i}.mp4", frames=12, seed=i)
        turns = [{"from": "human", "value": f"<video>看{i}"}, {"from": "gpt", "value": "好" * (1 + i % 5)}]
        rows.append({"video": f"{i % 4}.mp4", "conversations": turns})
    (folder / "clips.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {"clips": {"file_name": "clips.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "template": "qwen3_vl_video",
        "dataset": "clips",
        "dataset_dir": str(folder),
        "media_dir": str(folder),
        "cache_dir": str(folder / "cache"),
        "video_sampling": "qwen_finetune",
        "video_min_frames": 4,
        "video_max_frames": 4,
        "video_min_pixels": 10000,
        "video_max_pixels": 20000,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "learning_rate": 1e-3,
        "vision_tower_lr": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
    }


LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.2, "lora_target": "all"}


def whole_steps(output: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*"))


def history(output: Path) -> list[dict]:
    """What the log tells about learning, by step; how fast it went is another matter."""
    lines = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "vision_tower_lr", "train_loss")
    return [{name: line[name] for name in names if name in line} for line in lines]


def test_a_run_that_llama_board_aborts_goes_on_where_it_stopped(keys, tmp_path):
    """As its button Abort does it, between two checkpoints; workers that read clips are aborted too."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    overrides = {"save_steps": 1000, "logging_steps": 1, "dataloader_num_workers": 1}
    assert Run(keys, whole, **overrides).end() == [0]
    board = {"LLAMABOARD_ENABLED": "1", "LLAMABOARD_WORKDIR": str(output)}
    output.mkdir()
    run = Run(keys, output, own_env=board, **overrides)
    log = output / "trainer_log.jsonl"
    assert run.wait_for(lambda: log.is_file() and log.stat().st_size > 0)
    run.signal(signal.SIGABRT)
    assert run.end() == [0], run.log()[-3000:]
    (step,) = whole_steps(output)
    assert 0 < step < STEPS
    run = Run(keys, output, own_env=board, **overrides)
    assert run.end() == [0], run.log()[-3000:]
    assert f"holds a run that was stopped at step {step} of {STEPS}; this one resumes" in run.log()
    assert history(output) == history(whole)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert all(line["clips_per_second"] > 0 for line in lines if "loss" in line)


def kill_often(keys: dict, output: Path, count: int, kills: int, seed: int, **overrides) -> int:
    """Start, kill and start again until the run has ended by itself; how many kills met a checkpoint being written."""
    moments, met = random.Random(seed), 0
    for number in range(kills):
        run = Run(keys, output, count, **overrides)
        before = whole_steps(output)
        if not run.wait_for(lambda before=before: whole_steps(output) != before):
            break  # it came to its end
        if number % 2:
            time.sleep(moments.uniform(0, 0.4))
        else:
            # Held still, so that it is met however fast it writes and however busy the machine is.
            while run.wait_for((output / "unfinished").exists):
                run.signal(signal.SIGSTOP)
                if (output / "unfinished").exists():
                    break
                run.signal(signal.SIGCONT)
        met += (output / "unfinished").exists()
        run.kill()
        for step in whole_steps(output):  # each is whole: it can be used by itself
            assert (output / f"checkpoint-{step}" / "processor_config.json").is_file()
            assert (output / f"checkpoint-{step}" / "trainer_state.json").is_file()
    run = Run(keys, output, count, **overrides)
    assert run.end() == [0] * count, run.log()[-3000:]
    return met


def assert_same_run(output: Path, whole: Path, weights: str, steps: int) -> None:
    lines, expected = history(output), history(whole)
    assert [line.pop("train_loss", None) for line in lines][-1] == pytest.approx(expected[-1].pop("train_loss"))
    assert lines == expected
    # A line every third step and at every checkpoint, each second one.
    assert {2, 3, steps - 1, steps} - {line["step"] for line in lines} == {steps - 1}
    found, wanted = load_file(output / weights), load_file(whole / weights)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


CASES = [("full", {}, 1), ("lora", LORA, 2), ("lora", LORA, 1), ("full", {}, 2)]


def _check_killed_run(keys, folder, kind, overrides, count, kills):
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert Run(keys, folder / "whole", count, **overrides).end() == [0] * count
    met = kill_often(keys, folder / "killed", count, kills, seed=count, **overrides)
    assert met
    steps = keys["max_steps"]
    assert_same_run(folder / "killed", folder / "whole", weights, steps)
    assert whole_steps(folder / "killed") == [steps - 2, steps]
    assert not (folder / "killed" / "unfinished").exists()


def test_a_killed_run_ends_as_one_that_was_not(keys, tmp_path):
    """Killed twice: at a random moment, and while a checkpoint is written."""
    _check_killed_run({**keys, "max_steps": 12}, tmp_path, "lora", LORA, 1, kills=2)


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "overrides", "count"), CASES, ids=["full-1", "lora-2", "lora-1", "full-2"])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(keys, tmp_path, kind, overrides, count):
    more = {"max_steps": STEPS, "dataloader_num_workers": 2}
    _check_killed_run({**keys, **more}, tmp_path, kind, overrides, count, kills=10)


@pytest.mark.parametrize("overrides", [pytest.param({}, marks=pytest.mark.thorough), LORA], ids=["full", "lora"])
def test_two_runs_of_one_seed_are_identical(keys, tmp_path, overrides):
    overrides = {**overrides, "max_steps": 4}
    runs = [Run(keys, tmp_path / name, **overrides) for name in "ab"]
    assert [run.end() for run in runs] == [[0], [0]]
    other = Run(keys, tmp_path / "c", **overrides, seed=7)
    assert other.end() == [0]
    a, b, c = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert history(tmp_path / "a") == history(tmp_path / "b") != history(tmp_path / "c")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(keys, tmp_path, count):
    output, keys = tmp_path / "out", {**keys, "max_steps": 8}
    assert Run(keys, output, count, max_steps=2).end() == [0] * count
    for left in ("model.safetensors", "train_results.json"):  # the run was cut short here
        (output / left).unlink()
    before = {p: p.stat().st_mtime_ns for p in (output / "checkpoint-2").rglob("*")}
    size = (output / "checkpoint-2" / "optimizer.pt").stat().st_size
    run = Run(keys, output, count, largest_file=size // 2)
    assert 0 not in run.end()
    log = run.log()
    assert "checkpoint-4 could not be written" in log and "GiB are free" in log
    assert f"{output / 'checkpoint-2'} is complete: the next start resumes from there" in log
    assert {p: p.stat().st_mtime_ns for p in (output / "checkpoint-2").rglob("*")} == before
    assert whole_steps(output) == [2]
    assert Run(keys, output, count).end() == [0] * count
    assert whole_steps(output) == [6, 8]


@pytest.mark.thorough
def test_all_processes_load_the_best_checkpoint(keys, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    evaluated = {"eval_dataset": "clips", "eval_strategy": "steps", "eval_steps": 2}
    output = tmp_path / "out"
    run = Run(keys, output, 2, max_steps=6, save_total_limit=None, **best, **evaluated)
    assert run.end() == [0, 0]
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / "checkpoint-2")  # greater is better: the first, not the last
    found, wanted = (load_file(folder / "model.safetensors") for folder in (output, output / "checkpoint-2"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for rank in range(2):
        assert "Could not locate" not in run.log(rank)


def test_a_checkpoint_that_has_no_room_is_not_begun(keys, tmp_path, monkeypatch):
    from llamafactory_video.train import checkpoint

    whole = tmp_path / "checkpoint-2"
    whole.mkdir()
    (whole / "trainer_state.json").write_text("{}")
    (whole / "model.safetensors").write_bytes(bytes(1000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1001))
    with pytest.raises(checkpoint.CheckpointError, match="it needs 0.00 GiB, as .*checkpoint-2 does"):
        checkpoint.check_room(tmp_path, weights_only=False)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1002))
    checkpoint.check_room(tmp_path, weights_only=False)
    (whole / "optimizer.pt").write_bytes(bytes(1000))
    (whole / "global_step2").mkdir()
    (whole / "global_step2" / "part.pt").write_bytes(bytes(1000))
    checkpoint.check_room(tmp_path, weights_only=True)
    assert checkpoint.last_whole_checkpoint(tmp_path) == str(whole)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"cut')
    assert checkpoint.last_whole_checkpoint(tmp_path) == str(whole)
