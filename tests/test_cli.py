"""The commands as a person runs them: train, kill and resume, several processes, chat, check."""

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import processes
import pytest
import yaml
from conftest import write_clip
from llamafactory_video.demo.tiny_model import save_tiny_model
from processes import Run, run, run_anew


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, three clips, a text and a picture in one data set, and a recipe."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model")
    records = []
    for i in range(3):
        write_clip(folder / f"{i}.mp4", seed=i)
        turns = [{"from": "human", "value": "<video>\n描述"}, {"from": "gpt", "value": {"标签": [f"凯{i}"]}}]
        records.append({"video": f"{i}.mp4", "conversations": turns})
    records += [
        {"conversations": [{"from": "human", "value": f"问{i}"}, {"from": "gpt", "value": f"答{i}"}]} for i in range(5)
    ]
    (folder / "mixed.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    info = {"mixed": {"file_name": "mixed.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def recipe(home: Path, name: str, **keys) -> tuple[str, Path]:
    """A recipe file, and its output folder."""
    out = home / name
    values = {
        "model_name_or_path": str(home / "model"),
        "template": "qwen3_vl_video",
        "dataset": "mixed",
        "dataset_dir": str(home),
        "cache_dir": str(home / "cache"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "video_sampling": "qwen_finetune",
        "mm_projector_lr": 1e-3,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 1,
        "max_steps": 10,
        "logging_steps": 1,
        "save_steps": 4,
        "output_dir": str(out),
        "report_to": "none",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        **keys,
    }
    (home / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return str(home / f"{name}.yaml"), out


def losses(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(home):
    """By a real start of the command."""
    file, out = recipe(home, "whole")
    result = run_anew("llamafactory-cli", "train", file)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_a_run_cut_short_while_it_saved_goes_on_to_the_same_end(home, trained):
    out = shutil.copytree(trained, home / "cut")
    for name in ("model.safetensors", "train_results.json", "trainer_state.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-10")
    (out / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    file, _ = recipe(home, "cut")
    result = run("llamafactory-cli", "train", file)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Resuming training from {out}/checkpoint-4" in result.stdout + result.stderr
    assert losses(out) == pytest.approx(losses(trained), rel=1e-5)
    assert len(losses(out)) == 10


@pytest.mark.thorough
def test_two_processes_that_torchrun_starts(home):
    """Each process gets its own mix of clips and texts; none waits for the other's vision tower."""
    file, out = recipe(home, "two", max_steps=4, per_device_train_batch_size=2, ddp_timeout=60)
    result = run_anew("llamafactory-cli", "train", file, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(losses(out)) == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_streaming(home, processes):
    keys = {"streaming": True, "max_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    file, out = recipe(home, f"stream{processes}", **keys, buffer_size=4)
    started = Run(yaml.safe_load(Path(file).read_text()), out, processes)
    assert started.end() == [0] * processes, started.log()[-3000:]
    assert len(losses(out)) == 2


def test_chat_about_a_clip(home, trained):
    clip = f"<video>{home / '0.mp4'}</video>"
    questions = (
        f"{clip}描述\n再说\n<video>gone.mp4</video>\n<video>file://{home / '0.mp4'}</video>还有呢\n<video>没关\nexit\n"
    )
    options = ["--template", "qwen3_vl_video", "--video_sampling", "qwen_finetune", "--max_new_tokens", "4"]
    result = run_anew("llamafactory-cli", "chat", "--model_name_or_path", str(trained), *options, stdin=questions)
    # Not its exit code: LLaMA-Factory ends with its threads still running, and now and then the process aborts there.
    answers = result.stdout.split("Assistant: ")[1:]
    assert len(answers) == 5
    assert [("error" in answer) for answer in answers] == [False, False, True, False, True]
    assert "[error: gone.mp4: cannot be opened (No such file or directory)]" in answers[2]
    assert "[error: a <video> without its end; write <video>path</video>]" in answers[4]


def test_long_records_stop_training_or_shrink(home):
    file, out = recipe(home, "long", cutoff_len=90, video_max_pixels=262144, video_min_pixels=131072, max_steps=2)
    result = run("llamafactory-cli", "train", file)
    assert result.returncode != 0
    assert "3 of 8 records cannot be used" in result.stderr
    assert "mixed.json, record 2 (line 1): " in result.stderr and "or set " in result.stderr
    assert not list(out.glob("*.safetensors"))
    result = run("llamafactory-cli", "train", file, "video_fit=shrink")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "clips of 3 of 8 records are made smaller to fit the cutoff" in result.stdout + result.stderr
    assert len((out / "shrunk_records_training.txt").read_text(encoding="utf-8").splitlines()) == 3
    checked = run("lmf-video", "check", file, "video_fit=shrink")
    assert checked.returncode == 0 and "records whose clips are made smaller to fit: 3" in checked.stdout


def test_the_cache_is_built_once_and_used_by_training(home):
    folder = home / "frames 帧"
    file, _ = recipe(home, "cached", video_cache_dir=str(folder), max_steps=2)
    result = run("lmf-video", "cache", "build", file, "--jobs", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    told = "3 clips decoded, 0 were there already, 0 records with a clip or picture that cannot be shown"
    assert told in result.stdout
    assert "Decoding mixed: 100%" in result.stderr
    (first, *_) = entries = sorted(folder.glob("frames/*/*"))
    assert len(entries) == 3
    first.unlink()  # as if the last call had been stopped
    result = run("lmf-video", "cache", "build", file)
    assert "1 clips decoded, 2 were there already" in result.stdout

    result = run("llamafactory-cli", "train", file)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Frame cache: {folder}, 3 clips in 0.00 GiB, may grow to" in result.stdout + result.stderr
    assert sorted(folder.glob("frames/*/*")) == entries
    result = run_anew("lmf-video", "cache", "info", file)
    assert f"{folder} holds 3 clips in 0.00 GiB, and what is known of 3 files" in result.stdout
    assert "removed 3 clips" in run("lmf-video", "cache", "clear", file).stdout
    assert "holds 0 clips" in run("lmf-video", "cache", "info", file).stdout
    assert "cache build needs a recipe" in run("lmf-video", "cache", "build").stderr
    assert "video_cache is false" in run("lmf-video", "cache", "build", file, "video_cache=false").stderr
    assert (
        "video_cache_gb must be a number above 0; found 0"
        in run("lmf-video", "cache", "build", file, "video_cache_gb=0").stderr
    )


def test_check_tells_what_training_would_see(home, tmp_path):
    home = shutil.copytree(home, tmp_path / "home")  # whose records are changed here
    file, _ = recipe(home, "check")
    result = run_anew("lmf-video", "check", file)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "mixed: 8 records" in result.stdout
    assert "records that cannot be trained on: 0" in result.stdout
    assert "<|video_pad|>*" in result.stdout and "凯" in result.stdout

    result = run("lmf-video", "check", file, "cutoff_len=30")
    assert result.returncode == 1
    assert "records that cannot be trained on: 3" in result.stdout
    assert "mixed.json, record 1 (line 1): " in result.stdout

    broken = home / "broken.mp4"
    broken.write_text("no video")
    record = {
        "video": "broken.mp4",
        "conversations": json.loads((home / "mixed.json").read_text())[0]["conversations"],
    }
    (home / "mixed.json").write_text(json.dumps([record]))
    result = run("lmf-video", "check", file)
    assert result.returncode == 1
    assert "mixed.json, record 1 (line 1): " in result.stdout and "broken.mp4: is not a video" in result.stdout
    # Wrong records and clips that cannot be read are told in one go.
    (home / "sub").mkdir()
    (home / "sub" / "more.json").write_text(json.dumps([{}, {**record, "video": str(broken)}]))
    info = {"file_name": "sub/more.json", "formatting": "video_conversation"}
    (home / "dataset_info.json").write_text(json.dumps({"mixed": info}))
    result = run("lmf-video", "check", file)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "record 1 (line 1): conversations: missing" in result.stdout
    assert "broken.mp4: is not a video" in result.stdout

    (home / "dataset_info.json").write_text(json.dumps({"mixed": {"file_name": "sub/more.json"}}))
    result = run("lmf-video", "check", file)
    assert result.returncode == 1 and 'give it "formatting": "video_conversation"' in result.stdout
    assert "Nothing of mixed can be trained on" in result.stdout and "records in all" not in result.stdout
    result = run("lmf-video", "check", file, "model_name_or_path=output/gone")
    assert result.returncode == 1 and "no folder output/gone" in result.stderr
    file, _ = recipe(home, "nothing", dataset=None, do_train=False)
    result = run("lmf-video", "check", file)
    assert result.returncode == 1 and "names no data set; give a training recipe" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_misspelt_is_told_beside_what_is_meant(home):
    file, _ = recipe(home, "misspelt")
    for words, message in (
        (["video_sampeling=qwen_finetune"], "unknown key video_sampeling; is video_sampling meant?"),
        (["dataset=mixd"], "no data set mixd in "),
        (["dataset=mixd"], "is mixed meant?; it has "),
        (["dataset", "mixed"], "dataset is no override; write key=value, such as dataset=wzry"),
    ):
        result = run("lmf-video", "check", file, *words)
        assert result.returncode == 1
        assert message in result.stderr, result.stderr[-500:]
        assert "Traceback" not in result.stderr
    told = run("lmf-video", "--version")
    assert told.returncode == 0
    assert all(f"{name} {version(name)}" in told.stdout for name in ("llamafactory-video", "llamafactory", "torch"))


def test_a_reader_that_has_seen_enough_is_no_error():
    """As `lmf-video map … | head -1`."""
    command = [processes.BIN / "lmf-video", "map", "--", "--video_fps", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
