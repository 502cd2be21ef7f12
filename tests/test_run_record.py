"""The record of a run: from real arguments, a real processor, data sets and model."""

import getpass
import hashlib
import json
import shutil
import socket
import subprocess
import time

import datasets
import pytest
import torch
import yaml
from conftest import write_clip
from huggingface_hub import ModelCard
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train.tuner import run_exp
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host.recipe import resolved_recipe
from llamafactory_video.host.rows import FEATURES
from llamafactory_video.train import model_card, run_record
from llamafactory_video.train.fingerprint import describe_data
from PIL import Image
from processes import run
from torch.utils.data import IterableDataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

RECIPE = {
    "template": "qwen3_vl_video",
    "dataset": "clips",
    "do_train": True,
    "stage": "sft",
    "finetuning_type": "full",
    "video_sampling": "qwen_finetune",
    "video_fps": 4,
    "video_max_frames": 32,
    "video_max_pixels": 1003520,
    "image_max_pixels": 602112,
    "learning_rate": 2e-5,
    "vision_tower_lr": 2e-6,
    "cutoff_len": 4096,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "seed": 7,
    "report_to": "tensorboard",
    "use_cpu": True,
    "bf16": True,
    "freeze_vision_tower": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    for i in range(3):
        write_clip(folder / "data" / f"片段{i}.mp4", seed=i)
        Image.effect_noise((64, 64), 60 + i).convert("RGB").save(folder / "data" / f"{i}.png")
    records = [
        {"video": f"片段{i}.mp4", "conversations": [turn("human", "<video>描述"), turn("gpt", {"标签": [f"凯{i}"]})]}
        for i in range(3)
    ]
    records.append(
        {
            "video": {"path": "片段0.mp4", "start": 0.5},
            "image": "0.png",
            "conversations": [turn("human", "<video><image>比较"), turn("gpt", "一样")],
        }
    )
    frames = {"frames": ["1.png", "2.png"], "frame_rate": 2}
    records.append({"video": frames, "conversations": [turn("human", "<video>描述"), turn("gpt", "噪声")]})
    (folder / "data" / "clips.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    info = {"clips": {"file_name": "clips.json", "formatting": "video_conversation"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    return folder


def turn(who, value):
    return {"from": who, "value": value}


def arguments(home, out, **keys):
    paths = {
        "model_name_or_path": str(home / "model"),
        "dataset_dir": str(home / "data"),
        "output_dir": str(out / "out"),
        "cache_dir": str(out / "cache"),
    }
    return get_train_args({**RECIPE, **paths, **keys})


def loaded(home, out, **keys):
    """Arguments, processor and the data sets as the Trainer has them."""
    parsed = arguments(home, out, **keys)
    module = load_tokenizer(parsed[0])
    template = get_template_and_fix_tokenizer(module["tokenizer"], parsed[1])
    return parsed, module, get_dataset(template, *parsed[:3], stage="sft", **module)


def described(home, out, earlier=None, step=0, **keys):
    parsed, module, data = loaded(home, out, **keys)
    model = load_model(module["tokenizer"], parsed[0], parsed[3], is_trainable=True)
    sets = [data["train_dataset"], data.get("eval_dataset")]
    return run_record.describe_run(
        resolved_recipe(parsed), *parsed[:3], model, module["processor"], *sets, earlier=earlier, step=step
    )


# --- Recipe ----------------------------------------------------------------------------------------------------------


def test_the_recipe_is_what_was_given(home, tmp_path):
    recipe = resolved_recipe(arguments(home, tmp_path))
    given = RECIPE | {k: recipe[k] for k in ("model_name_or_path", "dataset_dir", "output_dir", "cache_dir")}
    given |= {"report_to": ["tensorboard"]}
    usual = ("lr_scheduler_type", "bf16", "stage")  # may be defaults
    assert {k: v for k, v in recipe.items() if k not in usual} == {
        k: v for k, v in given.items() if k not in (*usual, "learning_rate")
    } | {"learning_rate": 2e-5}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "lora_rank": 4, "neat_packing": True},
        {"eval_dataset": "clips", "eval_strategy": "steps", "eval_steps": 5, "report_to": "none", "bf16": False},
        {"accelerator_config": {"dispatch_batches": False}, "optim": "adafactor", "lr_scheduler_kwargs": {"a": 1.5}},
        {"video_maxlen": 32, "video_max_frames": None, "video_min_pixels": 65536, "debug": "underflow_overflow"},
        {"streaming": True, "max_steps": 2, "media_dir": "elsewhere", "include_num_input_tokens_seen": True},
    ],
    ids=str,
)
def test_a_recorded_recipe_parsed_again_gives_the_same_record(home, tmp_path, keys):
    first = arguments(home, tmp_path, **keys)
    recipe = resolved_recipe(first)
    again = get_train_args(yaml.safe_load(yaml.safe_dump(recipe, allow_unicode=True)))
    assert resolved_recipe(again) == recipe
    for one, other in zip(first[:2] + first[3:], again[:2] + again[3:], strict=True):
        assert vars(one) == vars(other)
    assert first[2].to_dict() == again[2].to_dict()
    assert all(recipe[key] == value for key, value in keys.items() if key in ("lora_target", "lora_rank", "optim"))


def test_no_secret_is_written(home, tmp_path):
    secrets = {
        "hf_hub_token": "hf_geheim1",
        "ms_hub_token": "geheim2",
        "om_hub_token": "geheim3",
        "hub_token": "geheim4",
        "swanlab_api_key": "geheim5",
        "swanlab_lark_webhook_url": "https://x/geheim6",
        "ray_init_kwargs": {"runtime_env": {"WANDB_API_KEY": "geheim7"}, "address": "ray://me:geheim8@host:1"},
    }
    recipe = resolved_recipe(arguments(home, tmp_path, **secrets))
    text = json.dumps(recipe)
    assert "geheim" not in text
    assert [recipe[key] for key in list(secrets)[:6]] == ["(given)"] * 6
    assert recipe["ray_init_kwargs"]["address"] == "ray://(given)@host:1"
    none = resolved_recipe(arguments(home, tmp_path))
    assert "(given)" not in json.dumps(none)
    tokens = resolved_recipe(arguments(home, tmp_path, max_new_tokens=5, add_tokens="<甲>"))
    assert (tokens["max_new_tokens"], tokens["add_tokens"]) == (5, "<甲>")  # no secrets, for all their names


def test_config_files_that_the_recipe_names_are_told(tmp_path):
    config = {"zero_optimization": {"stage": 3}, "wandb": {"api_key": "geheim"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    hidden = {"zero_optimization": {"stage": 3}, "wandb": {"api_key": "(given)"}}
    name = str(tmp_path / "ds.json")
    assert run_record._config_files({"deepspeed": name}) == {name: hidden}
    assert run_record._config_files({"deepspeed": config}) == run_record._config_files({}) == {}


def test_an_fsdp_file_is_read_into_the_recipe(home, tmp_path):
    """In its own process: transformers sets up FSDP for the process that parses it."""
    (tmp_path / "fsdp.json").write_text(json.dumps({"fsdp_version": 2, "reshard_after_forward": True}))
    code = """
import sys, yaml
from llamafactory.hparams import get_train_args
from llamafactory_video.host.recipe import resolved_recipe
keys = dict(model_name_or_path="a/b", template="qwen3_vl_video", dataset="clips", output_dir=sys.argv[2],
            stage="sft", do_train=True, use_cpu=True, fsdp="full_shard auto_wrap", fsdp_config=sys.argv[1])
recipe = resolved_recipe(get_train_args(keys))
print(recipe["fsdp"], recipe["fsdp_config"]["version"], recipe["fsdp_config"]["reshard_after_forward"])
print(resolved_recipe(get_train_args(yaml.safe_load(yaml.safe_dump(recipe)))) == recipe)
"""
    done = run("-c", code, str(tmp_path / "fsdp.json"), str(tmp_path / "out"))
    said = [line for line in done.stdout.splitlines() if not line.startswith("[")]
    assert said == ["full_shard auto_wrap 2 True", "True"], done.stdout + done.stderr


# --- Data ------------------------------------------------------------------------------------------------------------


def fingerprint(home, out, **keys):
    parsed, _, data = loaded(home, out, **keys)
    return describe_data(data["train_dataset"], parsed[1].media_dir)


def test_records_clips_and_pictures_are_counted(home, tmp_path):
    found = fingerprint(home, tmp_path)
    files = [home / "data" / name for name in ("片段0.mp4", "片段1.mp4", "片段2.mp4", "0.png", "1.png", "2.png")]
    assert (found["records"], found["clips"], found["pictures"], found["files"]) == (5, 4, 1, 6)
    assert found["files_bytes"] == sum(file.stat().st_size for file in files)
    lines = sorted(f"{file.name}\t{file.stat().st_size}\n" for file in files)
    assert found["files_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_hash_is_that_of_the_records_as_json(home, tmp_path):
    """Made again by pyarrow's and json's plain means, as `hashes_cover` tells."""
    parsed, _, data = loaded(home, tmp_path)
    rows = []
    for row in data["train_dataset"].with_format(None):
        videos, images = (
            row[key] and [item.replace(f"{home / 'data'}/", "") for item in row[key]] for key in ("_videos", "_images")
        )
        row = {**row, "_videos": videos, "_images": images}
        del row["_source"]
        rows.append([row[key] for key in sorted(row)])
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"), sort_keys=False)
    found = describe_data(data["train_dataset"], parsed[1].media_dir)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_the_same_data_elsewhere_has_the_same_fingerprint(home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "moved" / "other")
    there = fingerprint(home, tmp_path, dataset_dir=str(tmp_path / "moved" / "other"))
    assert there == fingerprint(home, tmp_path)
    media = fingerprint(home, tmp_path, media_dir=f"{home}/data/")
    assert media == there


def test_a_changed_record_or_clip_changes_it(home, tmp_path):
    before = fingerprint(home, tmp_path)
    folder = tmp_path / "changed"
    shutil.copytree(home / "data", folder)
    write_clip(folder / "片段1.mp4", frames=18, seed=9)
    clip = fingerprint(home, tmp_path, dataset_dir=str(folder))
    assert clip["sha256"] == before["sha256"] and clip["files_sha256"] != before["files_sha256"]
    text = (folder / "clips.json").read_text(encoding="utf-8")
    (folder / "clips.json").write_text(text.replace("凯2", "凯3"), encoding="utf-8")
    record = fingerprint(home, tmp_path, dataset_dir=str(folder))
    assert record["sha256"] != before["sha256"] and record["files_sha256"] == clip["files_sha256"]
    (folder / "片段2.mp4").rename(folder / "片段9.mp4")
    (folder / "clips.json").write_text(text.replace("片段2", "片段9"), encoding="utf-8")
    renamed = fingerprint(home, tmp_path, dataset_dir=str(folder))
    assert renamed["sha256"] != before["sha256"] and renamed["files_sha256"] != clip["files_sha256"]


def rows(count: int) -> datasets.Dataset:
    text = "描述这个视频并进行打标,使用json输出标签" * 4
    columns = {
        "_prompt": [[{"content": f"<video>{text}{i}", "role": "user"}] for i in range(count)],
        "_response": [[{"content": f"{text}{i}", "role": "assistant"}] for i in range(count)],
        "_system": [""] * count,
        "_tools": [""] * count,
        "_images": [None] * count,
        "_videos": [[f"data/{i % 100}/{i}.mp4"] for i in range(count)],
        "_audios": [None] * count,
        "_unlearnt": [None] * count,
        "_source": [f"line {i}" for i in range(count)],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def test_order_and_number_count_and_parts_are_parts():
    """Over more than one batch of rows, with and without a list of chosen ones before the table."""
    whole = rows(2500)
    found = describe_data(whole, "data")
    assert describe_data(whole.select(range(2500)[::-1]).select(range(2500)[::-1]), "data") == found
    assert describe_data(whole.shuffle(seed=1), "data")["sha256"] != found["sha256"]
    part = describe_data(whole.select(range(700, 1900)), "data")
    assert part == describe_data(whole.select(range(700, 1900)).flatten_indices(), "data")
    assert (part["records"], part["files_missing"]) == (1200, 1200)
    assert part["sha256"] != found["sha256"]


def test_packed_rows_have_a_fingerprint(home, tmp_path):
    # As many records a row as fit; the packing of LLaMA-Factory is the same at every run.
    one, other = (fingerprint(home, tmp_path / name, neat_packing=True, cutoff_len=4096) for name in "ab")
    assert one == other
    assert one["clips"] == 4 and one["records"] < 5
    alone = fingerprint(home, tmp_path / "c", neat_packing=True, cutoff_len=4096, train_on_prompt=True)
    assert alone["sha256"] != one["sha256"]  # other labels


def test_a_stream_has_none_and_says_why(home, tmp_path):
    _, _, data = loaded(home, tmp_path, streaming=True, max_steps=2)
    assert isinstance(data["train_dataset"], IterableDataset)
    found = describe_data(data["train_dataset"], "data")
    assert found["records"] is None and "streaming" in found["why"]


def test_many_records_take_seconds():
    """A tenth of 200,000, within a tenth of 3 seconds of a core and some for other processes."""
    whole = rows(20_000)
    start = time.process_time()
    describe_data(whole, "data")
    assert time.process_time() - start < 0.9


# --- The whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(home, tmp_path_factory):
    return described(home, tmp_path_factory.mktemp("run"), eval_dataset="clips")


def test_the_record_tells_what_made_the_model(home, record):
    assert record["sampling"]["clips"]["dialect"] == "qwen_finetune"
    assert record["sampling"]["clips"]["fps"] == 4 and record["sampling"]["clips"]["max_pixels"] == 1003520
    assert record["sampling"]["images"]["max_pixels"] == 602112
    assert record["data"]["train"] == record["data"]["eval"]
    assert record["seeds"]["seed"] == 7 and record["seeds"]["full_determinism"] is False
    assert record["versions"]["torch"] == torch.__version__ and "llamafactory-video" in record["versions"]
    assert record["machine"] == {"device": "cpu", "gpus": {}, "processes": 1, "nodes": 1}
    config = (home / "model" / "config.json").read_bytes()
    assert record["model"]["config_sha256"] == hashlib.sha256(config).hexdigest()
    modules = record["model"]["modules"]
    assert sum(part["parameters"] for part in modules.values()) == record["model"]["parameters"]
    assert modules["vision_tower"]["trained"] == modules["vision_tower"]["parameters"] > 0
    assert modules["mm_projector"]["trained"] == 0 < modules["mm_projector"]["parameters"]
    assert record["finished"] is None and record["history"] == []
    assert json.loads(json.dumps(record, ensure_ascii=False)) == record


def test_nothing_names_the_machine(record):
    outside = json.dumps({key: value for key, value in record.items() if key not in ("recipe", "model")})
    for name in (socket.gethostname(), f"/{getpass.getuser()}/", str(run_record.Path.cwd()), "/tmp"):
        assert name not in outside


def test_git_is_told_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert run_record._git() is None

    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=b@c")
        return subprocess.run(["git", *who, *command], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert run_record._git() is None  # no revision yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "one")
    assert run_record._git() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("b")
    assert run_record._git()["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert run_record._git() is None


def test_a_resumed_run_keeps_its_history(home, record, tmp_path):
    run_record.write_run_record(tmp_path, {**record, "started": "2026-01-01T00:00:00+00:00"})
    earlier = run_record.read_run_record(tmp_path)
    again = described(home, tmp_path, earlier=earlier, step=5, eval_dataset="clips", learning_rate=1e-5, seed=8)
    assert again["started"] == "2026-01-01T00:00:00+00:00"
    (resumed,) = again["history"]
    assert resumed["from_step"] == 5
    changed = resumed["changed"]
    assert changed["learning_rate"] == {"before": 2e-5, "now": 1e-5}
    assert changed["seed"] == changed["seeds.seed"] == {"before": 7, "now": 8}
    assert set(changed) == {"learning_rate", "seed", "seeds.seed", "output_dir", "cache_dir"}
    third = described(home, tmp_path, earlier=again, step=9, eval_dataset="clips", learning_rate=1e-5, seed=8)
    assert [entry["from_step"] for entry in third["history"]] == [5, 9]
    assert third["history"][1]["changed"] == {}
    anew = described(home, tmp_path, earlier=again, step=0)
    assert anew["history"] == [] and anew["started"] != again["started"]


def test_a_real_run_that_is_resumed(home, tmp_path):
    """Nothing that the run itself sets counts as changed."""
    keys = {"save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "bf16": False, "report_to": "none"}
    folder = tmp_path / "out"

    def run(max_steps):
        paths = {"model_name_or_path": str(home / "model"), "dataset_dir": str(home / "data")}
        paths |= {"output_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
        run_exp({**RECIPE, **paths, **keys, "max_steps": max_steps})
        return run_record.read_run_record(folder)

    first, second = run(2), run(4)
    assert first["history"] == [] and first["results"]["train_loss"] > 0
    (resumed,) = second["history"]
    assert resumed["from_step"] == 2 and resumed["changed"] == {"max_steps": {"before": 2, "now": 4}}
    assert (second["started"], second["steps"]) == (first["started"], 4)
    assert first["recipe"] == resolved_recipe(arguments(home, tmp_path, max_steps=2, **keys))
    card = ModelCard.load(folder / "README.md").data
    assert card.base_model is None  # which was a folder, and no name on a hub
    assert {"llama-factory", "full", "llamafactory-video"} <= set(card.tags)
    assert (folder / "README.md").read_text(encoding="utf-8").count("## How this model was made") == 1


def test_the_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    assert run_record.read_run_record(tmp_path) is None
    run_record.write_run_record(tmp_path / "out", {"标签": "凯"})
    assert "凯" in (tmp_path / "out" / "run.json").read_text(encoding="utf-8")
    assert run_record.read_run_record(tmp_path / "out") == {"标签": "凯"}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run_record.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run_record.write_run_record(tmp_path / "out", {"标签": "曹操"})
    assert run_record.read_run_record(tmp_path / "out") == {"标签": "凯"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    (tmp_path / "out" / "run.json").write_text('{"cut')
    assert run_record.read_run_record(tmp_path / "out") is None


# --- Model card ------------------------------------------------------------------------------------------------------


def transformers_card(folder):
    """As Trainer.create_model_card writes it."""
    model = AutoModelForImageTextToText.from_pretrained(folder.parent / "model")
    trainer = Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none"))
    Trainer.create_model_card(trainer, license="other", tags=["llama-factory"], finetuned_from="王者/模型")
    return folder / "README.md"


def test_the_card_holds_the_record_once_and_gives_the_hub_what_transformers_told_it(home, record):
    readme = transformers_card(home / "card")
    before = ModelCard.load(readme).data
    ended = run_record.finished(record, 12, {"train_loss": 0.25})
    model_card.add_to_model_card(readme, record)
    model_card.add_to_model_card(readme, ended)
    text = readme.read_text(encoding="utf-8")
    card = ModelCard.load(readme).data
    assert (card.license, card.library_name) == (before.license, before.library_name) == ("other", "transformers")
    assert card.tags == ["llama-factory", "generated_from_trainer", "llamafactory-video"]
    assert card.pipeline_tag == "video-text-to-text" and "More information needed" not in text
    assert text.count("## How this model was made") == 1
    assert "| train_loss | 0.25 |" in text and "| steps | 12 |" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == record["recipe"]


def test_what_stands_around_the_section_stays(tmp_path, record):
    readme = tmp_path / "README.md"
    model_card.add_to_model_card(readme, record)
    own = readme.read_text(encoding="utf-8")
    readme.write_text(f"---\nlicense: other\n---\n\n# 凯\n\n{own}\nafter\n", encoding="utf-8")
    model_card.add_to_model_card(readme, run_record.finished(record, 3, {}))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: other\n---\n\n# 凯\n\n<!-- ") and text.endswith("-->\n\nafter\n")
    assert "| steps | 3 |" in text


def test_values_cannot_break_the_card(tmp_path, record):
    """Marks of tables, of code and of our own section inside values."""
    wild = json.loads(json.dumps(record))
    wild["recipe"]["run_name"] = f"a|b ```` {model_card._END} 凯"
    wild["results"] = {"a|b<br>\nc": 1}
    readme = tmp_path / "README.md"
    for _ in range(2):
        model_card.add_to_model_card(readme, wild)
    text = readme.read_text(encoding="utf-8")
    assert text.count(model_card._END) == text.count(model_card._BEGIN) == 1
    assert r"| a\|b&lt;br> c | 1 |" in text
    assert "`````yaml\n" in text and "凯" in text
