"""What a wrong recipe is told, when, and without a traceback."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import write_clip
from llamafactory.hparams import get_infer_args, get_train_args, parser
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host import start
from llamafactory_video.host.chat import take_inline_media
from llamafactory_video.host.known import known_keys
from llamafactory_video.records.json_text import read_json
from llamafactory_video.records.report import DatasetError
from omegaconf import OmegaConf
from processes import run, run_anew

TURNS = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": "塔"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model, an adapter's folder, and a data set whose second clip is no clip."""
    home = tmp_path_factory.mktemp("start")
    save_tiny_model(home / "model", hidden_size=32, layers=1, heads=2)
    (home / "lora").mkdir()
    (home / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(home / "model")}))
    for number in (2, 6, 10):
        checkpoint = home / f"run/checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        for name in ("trainer_state.json", "adapter_config.json"):
            (checkpoint / name).write_text("{}")
    (home / "run/adapter_config.json").write_text("{}")
    write_clip(home / "a.mp4")
    (home / "bad.mp4").write_bytes(b"no video")
    records = {"good": ["a.mp4"] * 4, "bad": ["a.mp4", "bad.mp4"], "gone": ["a.mp4", "gone.mp4"]}
    for name, clips in records.items():
        lines = [json.dumps({"video": clip, "conversations": TURNS}) for clip in clips]
        (home / f"{name}.jsonl").write_text("\n".join(lines))
    info = {name: {"file_name": f"{name}.jsonl", "formatting": "video_conversation"} for name in records}
    (home / "dataset_info.json").write_text(json.dumps(info))
    return home


def recipe(home, **keys):
    usual = {
        "model_name_or_path": str(home / "model"),
        "template": "qwen3_vl_video",
        "dataset": "good",
        "dataset_dir": str(home),
        "output_dir": str(home / "out"),
        "video_cache": False,
        "stage": "sft",
        "do_train": True,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "report_to": "none",
        "disable_shuffling": True,
        "save_strategy": "no",
    }
    return {**usual, **keys}


def test_known_keys_are_those_of_the_parser():
    classes = (*parser._TRAIN_ARGS, *parser._INFER_ARGS, *parser._EVAL_ARGS)
    assert set(known_keys()) == {field.name for cls in classes for field in fields(cls) if field.init}
    assert sum(hint is not None for hint in known_keys().values()) > 350


WRONG = [
    ({"video_sampeling": "x"}, "unknown key video_sampeling; is video_sampling meant?"),
    ({"learning_rat": 1e-5, "zzz": 1}, "unknown key learning_rat; is learning_rate meant?, zzz"),
    ({"video_sampling": "qwen"}, 'video_sampling must be one of llamafactory, .*; found the text "qwen"'),
    ({"learning_rate": "1e-5"}, 'learning_rate must be a number; found the text "1e-5"; YAML reads 1e-6 as text'),
    ({"learning_rate": "fast"}, 'learning_rate must be a number; found the text "fast"$'),
    ({"cutoff_len": -3}, "cutoff_len must be a whole number above 0; found -3"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number above 0; found 0"),
    ({"num_train_epochs": None}, "num_train_epochs must be a number; found nothing"),
    ({"video_max_frames": 2.5}, "video_max_frames must be a whole number; found 2.5"),
    ({"save_total_limit": "2"}, 'save_total_limit must be a whole number; found the text "2"'),
    ({"freeze_vision_tower": "maybe"}, 'freeze_vision_tower must be true or false; found the text "maybe"'),
    ({"finetuning_type": "lorra"}, 'must be one of lora, oft, freeze, full; found the text "lorra"; is lora meant?'),
    (
        {"optim": "adamw_torchh"},
        'optim must be one of the known ones; found the text "adamw_torchh"; is adamw_torch m',
    ),
    ({"lr_scheduler_type": "cosin"}, 'found the text "cosin"; is cosine meant?'),
    ({"eval_strategy": "epochs"}, "eval_strategy must be one of no, steps, epoch; .* is epoch meant?"),
    ({"save_strategy": False}, 'found false; YAML reads the word no as false; write "no"'),
    ({"report_to": "tensorbord"}, 'found the text "tensorbord"; is tensorboard meant?'),
    ({"deepspeed": "gone.json"}, "deepspeed: no file gone.json"),
    ({"dataset": "godo"}, "no data set godo in .*dataset_info.json; is good meant?; it has good, bad, gone"),
    ({"template": "qwen3_vl_vido"}, "there is no template qwen3_vl_vido; is qwen3_vl_video meant?"),
    ({"eval_strategy": "steps"}, "eval_dataset be provided or val_size"),  # LLaMA-Factory's own
    (
        {"resume_from_checkpoint": "{home}/run"},
        "is the folder of a run, not of a checkpoint; give .*run/checkpoint-10",
    ),
    ({"resume_from_checkpoint": "runs/nothing"}, "there is no folder runs/nothing"),
    (
        {"model_name_or_path": "{home}/lora"},
        "lora holds an adapter of .*model; give that model there, and `adapter_na",
    ),
    ({"model_name_or_path": ""}, "model_name_or_path is empty"),
    ({"model_name_or_path": "output/gone"}, "no folder output/gone"),
    ({"skip_wrong_share": -1}, "skip_wrong_share must be a number of at least 0; found -1"),
]


@pytest.mark.parametrize(
    ("keys", "message"), WRONG, ids=[next(iter(keys)) + str(i) for i, (keys, _) in enumerate(WRONG)]
)
def test_wrong_values_are_told_with_what_would_be_right(home, keys, message):
    keys = {key: value.format(home=home) if isinstance(value, str) else value for key, value in keys.items()}
    for number in (2, 6, 10):
        (home / f"run/checkpoint-{number}/optimizer.pt").touch()
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        get_train_args(recipe(home, **keys))
    # Raised by our code, so it is for a person, without a traceback.
    assert start.for_a_person(error.value, error.tb) == str(error.value)


def test_right_values_of_all_kinds_are_taken(home):
    keys = {
        **{
            "save_strategy": "no",
            "eval_strategy": "no",
            "learning_rate": 1,
            "logging_steps": 0.5,
            "lr_scheduler_kwargs": {},
        },
        **{"bf16": False, "flash_attn": "auto", "lora_target": "q_proj,v_proj", "report_to": "tensorboard", "seed": 3},
    }
    assert get_train_args(recipe(home, **keys))[2].seed == 3
    recipes = Path(__file__).parents[1] / "recipes"
    for file in recipes.glob("*.yaml"):
        start.check_given(OmegaConf.to_container(OmegaConf.load(file)))


def test_an_adapters_folder_may_be_asked_by_itself(home):
    keys = {"model_name_or_path": str(home / "lora"), "template": "qwen3_vl_video", "finetuning_type": "full"}
    model_args, _, finetuning_args, _ = get_infer_args(keys)
    assert model_args.model_name_or_path == str(home / "model")
    assert model_args.adapter_name_or_path == [str(home / "lora")] and finetuning_args.finetuning_type == "lora"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("video_sampling: qwen\ntemplate: qwen3_vl_video", [], "video_sampling must be one of"),
        ("template: qwen3_vl_video\ndataset: x\ndataset_dir: {home}", [], "no data set x in"),
        (
            "template: qwen3_vl_video\ndataset: x\ndataset_dir: /gone",
            [],
            "no file /gone/dataset_info.json, which would",
        ),
        ("template: qwen3_vl_video", ["cutoff_len=x"], "cutoff_len must be a whole number above 0"),
        ("template: qwen3_vl_video", ["cutoff_len"], "cutoff_len is no override; write key=value"),
        ("template: qwen3-vl-video", [], "there is no template qwen3-vl-video; is qwen3_vl_video meant?"),
        ("template: [", [], "not YAML: "),
        ("- a", [], "lines of `key: value` are needed"),
        (None, [], "there is no such file; is recipe.yaml meant?"),
    ],
)
def test_the_command_tells_it_before_anything_heavy_is_imported(home, tmp_path, text, words, message):
    file = tmp_path / ("recipe.yaml" if text is not None else "recipes.yaml")
    (tmp_path / "recipe.yaml").write_text((text or "").format(home=home))
    code = (
        "import atexit, sys\n"
        "heavy = ('transformers', 'datasets', 'llamafactory.hparams')\n"
        "atexit.register(lambda: print('imported:', [name for name in heavy if name in sys.modules]))\n"
        f"sys.argv = ['llamafactory-cli', 'train', {str(file)!r}, *{words!r}]\n"
        "from llamafactory.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "imported: []" in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"llamafactory-cli: {file}: ") and message in line


def train(home, tmp_path, env=None, **keys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(home, output_dir=str(tmp_path / "out"), **keys)))
    return run_anew("llamafactory-cli", "train", str(file), **(env or {}))


def test_what_a_person_can_mend_has_no_traceback(home, tmp_path):
    """Records, clips, clips met by a worker, and a model that was not downloaded."""
    for keys, message in (
        ({"dataset": "gone"}, 'video: no file "gone.mp4"'),
        ({"dataset": "bad", "dataloader_num_workers": 1}, "bad.jsonl, record 2 (line 2): "),
        (
            {"model_name_or_path": "Qwen/Qwen3-VL-None"},
            "Qwen/Qwen3-VL-None was not downloaded before, and HF_HUB_OFFLINE",
        ),
    ):
        done = train(home, tmp_path, **keys)
        assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
        assert "\nllamafactory-cli: " in "\n" + done.stderr and message in done.stderr
    told = train(home, tmp_path, dataset="gone", env={"LLAMAFACTORY_VERBOSITY": "DEBUG"})
    assert "Traceback" in told.stderr


def test_several_processes_tell_it_without_tracebacks(home, tmp_path):
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = train(home, tmp_path, env=env, dataset="gone", use_cpu=True)
    assert done.returncode == 1 and 'video: no file "gone.mp4"' in done.stderr
    ours = [block for block in done.stderr.split("Traceback")[1:] if "llamafactory_video" in block]
    assert not ours and "a process of the run ended with status 1; its error stands above" in done.stderr


def test_which_processes_are_the_commands():
    assert all(
        map(
            start.is_command,
            ("/x/bin/llamafactory-cli", "lmf", "/x/llamafactory/cli.py", "/x/llamafactory/launcher.py"),
        )
    )
    assert not any(map(start.is_command, ("", "-c", "lmf-video", "/x/train.py", "/llamafactory/launcher")))


def test_what_is_a_fault_of_the_program_keeps_its_traceback():
    def caught(raise_it):
        try:
            raise_it()
        except Exception as error:
            return start.for_a_person(error, error.__traceback__)

    assert caught(lambda: int("x")) is None and caught(lambda: {}["x"]) is None

    def own():
        raise DatasetError("records are wrong")

    def of_a_worker():
        name = f"{DatasetError.__module__}.DatasetError"
        raise DatasetError(
            f"Caught DatasetError in worker.\nOriginal Traceback (most recent call last):\n x\n{name}: no\n"
        )

    def of_a_package():
        raise ImportError("This needs `awq`. Please install it: `pip install awq`\n")

    assert caught(of_a_package) == "This needs `awq`. Please install it: `pip install awq`"
    assert caught(lambda: __import__("no_such_package")) is None
    assert caught(own) == "records are wrong" and caught(of_a_worker) == "no"


def test_a_recipe_for_a_gpu_runs_without_one(home, tmp_path):
    """In float32, which is said, and without advice to compute in 16 bits."""
    done = train(home, tmp_path, bf16=True, deepspeed=str(Path(__file__).parents[1] / "recipes/deepspeed_zero3.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No GPU is found: this runs on the CPU in float32, without bf16, deepspeed." in done.stdout + done.stderr
    assert "mixed precision training" not in done.stdout + done.stderr
    record = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert record["recipe"].get("bf16") is None and record["recipe"]["use_cpu"] is True


def test_fields_that_json_does_not_have_are_named():
    assert read_json('{"a": [1, {"b": NaN}], "c": -Infinity}')[1] == [
        "a[1].b is NaN, which is no JSON; write null",
        "c is -Infinity, which is no JSON; write null",
    ]
    assert read_json('{"a": "NaN"}')[1] == []


def test_paths_typed_into_chat_are_taken_as_people_type_them():
    text = "<video>~/a.mp4</video><video>'/b c.mp4'</video><video> file:///d.mp4 </video><image>\"~/e.png\"</image>"
    _, videos, images = take_inline_media([{"role": "user", "content": text}])
    home = os.path.expanduser("~")
    assert (videos, images) == ([f"{home}/a.mp4", "/b c.mp4", "/d.mp4"], [f"{home}/e.png"])


def test_the_commands_own_words_are_explained():
    done = run("lmf-video", "check")
    assert done.returncode == 2 and "the following arguments are required: recipe\n" in done.stderr
    assert "unrecognized arguments: --nothing" in run("lmf-video", "check", "x.yaml", "--nothing").stderr
