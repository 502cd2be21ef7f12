"""The recipes: LLaMA-Factory's parser takes each, and a shrunken form of each trains what it says.

Shrunken means another model, data set, batch and length; what trains, the rates, the precision and the sampling stay as
the recipe has them. The data set is the example shipped with the project, over clips written here.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import write_clip
from jsonschema import Draft202012Validator
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import export_model, run_exp
from llamafactory_video.demo.tiny_model import build_config, build_tokenizer, save_tiny_model
from llamafactory_video.records.schema import schema_of_answers
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ZERO = sorted((ROOT / "recipes").glob("deepspeed_zero*.json"))
EXAMPLES = sorted((ROOT / "dataset_info").glob("*_example.json"))


def recipe(name: str, **overrides) -> dict:
    """A recipe as `llamafactory-cli train recipes/<name>.yaml key=value …` reads it."""
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(ROOT / "recipes" / f"{name}.yaml"), overrides))


# What a recipe asks of a GPU, and what stands for it here.
ON_A_CPU = {"wzry_full_bf16": {"pure_bf16": False, "optim": "adamw_torch"}}


def is_training(keys: dict) -> bool:
    return bool(keys.get("do_train") or keys.get("do_predict"))


def parse(name: str, **overrides):
    """The arguments that LLaMA-Factory makes of a recipe. DeepSpeed is left out: it wants to be started by torchrun."""
    keys = recipe(name)
    if not is_training(keys):
        return get_infer_args(recipe(name, **overrides))
    if keys.get("deepspeed"):
        overrides["deepspeed"] = None
    if keys.get("bf16"):
        overrides["use_cpu"] = True  # without it, bf16 is an error where there is no GPU
    return get_train_args(recipe(name, **ON_A_CPU.get(name, {}), **overrides))


# --- As they stand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_llamafactory_parses_the_recipe(path, tmp_path):
    keys = recipe(path.stem)
    # Models and adapters that other recipes make are not there yet; any folder stands for them.
    folders = [
        key for key in ("model_name_or_path", "adapter_name_or_path") if keys.get(key, "").startswith("output/")
    ]
    if is_training(keys):
        folders.append("output_dir")
    model_args, data_args, *_ = parse(path.stem, **dict.fromkeys(folders, str(tmp_path)))
    # Training says how clips are sampled; what uses a model leaves it to the model's folder.
    assert model_args.video_sampling == ("qwen_finetune" if keys.get("do_train") else None)
    assert data_args.template == "qwen3_vl_video"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_opens_with_its_command(path):
    opening = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    assert any("Needs:" in line for line in opening)
    command = "train" if is_training(recipe(path.stem)) else path.stem.removeprefix("wzry_")
    assert any(f"llamafactory-cli {command} recipes/{path.name}" in line for line in opening)


def test_wzry_full_is_the_official_command(tmp_path):
    model, data, training, finetuning, _ = parse("wzry_full", output_dir=str(tmp_path))
    official = {
        "model_name_or_path": (model, "Qwen/Qwen3-VL-4B-Instruct"),
        "finetuning_type": (finetuning, "full"),
        "freeze_vision_tower": (finetuning, False),  # --tune_mm_vision True
        "freeze_multi_modal_projector": (finetuning, False),  # --tune_mm_mlp True
        "freeze_language_model": (finetuning, False),  # --tune_mm_llm True
        "learning_rate": (training, 2e-5),
        "mm_projector_lr": (finetuning, 4e-5),
        "vision_tower_lr": (finetuning, 2e-6),
        "weight_decay": (training, 0.01),
        "bf16": (training, True),
        "disable_gradient_checkpointing": (model, False),
        "num_train_epochs": (training, 20),
        "per_device_train_batch_size": (training, 2),
        "gradient_accumulation_steps": (training, 4),
        "warmup_steps": (training, 0.03),  # --warmup_ratio
        "lr_scheduler_type": (training, "cosine"),
        "max_grad_norm": (training, 1.0),
        "cutoff_len": (data, 8192),  # --model_max_length
        "packing": (data, False),
        "video_sampling": (model, "qwen_finetune"),
        "video_fps": (model, 4),
        "video_min_frames": (model, 16),
        "video_max_frames": (model, 32),
        "video_max_pixels": (model, 1003520),
        "video_min_pixels": (model, 401408),
        "image_max_pixels": (model, 602112),
        "image_min_pixels": (model, 100352),
        "save_strategy": (training, "epoch"),
        "save_total_limit": (training, 3),
        "logging_steps": (training, 2),
        "report_to": (training, ["tensorboard"]),
        "dataloader_num_workers": (training, 4),
        "plot_loss": (finetuning, True),
    }
    found = {name: getattr(arguments, name) for name, (arguments, _) in official.items()}
    assert found == {name: value for name, (_, value) in official.items()}
    assert training.get_warmup_steps(1000) == 30
    assert recipe("wzry_full")["deepspeed"] == "recipes/deepspeed_zero3.json"


def test_one_gpu_trains_as_eight():
    eight, one = recipe("wzry_full"), recipe("wzry_full_1gpu")
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert one[batch[0]] * one[batch[1]] == eight[batch[0]] * eight[batch[1]] * 8
    differing = {key for key in eight | one if eight.get(key) != one.get(key)}
    assert differing == {*batch, "deepspeed", "dataloader_num_workers", "output_dir"}


def test_bf16_trains_as_float32():
    full, bf16 = recipe("wzry_full_1gpu"), recipe("wzry_full_bf16")
    assert {key for key in full | bf16 if full.get(key) != bf16.get(key)} == {
        "bf16",
        "pure_bf16",
        "optim",
        "output_dir",
    }
    assert bf16["pure_bf16"] is True
    assert "8bit" in bf16["optim"]


def test_dora_trains_as_lora():
    lora, dora = recipe("wzry_lora"), recipe("wzry_dora")
    assert {key for key in lora | dora if lora.get(key) != dora.get(key)} == {"use_dora", "output_dir"}
    assert dora["use_dora"] is True


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_zero_leaves_numbers_and_optimizer_to_the_recipe(path):
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == int(path.stem[len("deepspeed_zero")])
    assert not {"optimizer", "scheduler"} & config.keys()  # DeepSpeed's would replace the rates by module
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[key] for key in auto] == ["auto"] * 4
    assert config["bf16"]["enabled"] == "auto"
    offloaded = [key for key in config["zero_optimization"] if key.startswith("offload_")]
    assert bool(offloaded) == path.stem.endswith("_offload")
    if offloaded:
        assert config["zero_force_ds_cpu_optimizer"] is False  # else DeepSpeed's own Adam replaces the rates by module
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    filled = HfTrainerDeepSpeedConfig(config)
    filled.trainer_config_process(parse("wzry_full")[2])
    assert [filled.config[key] for key in auto] == [8, 2, 4, 1.0]
    assert filled.config["bf16"]["enabled"] is True


@pytest.mark.parametrize("fsdp, offloads", [("auto_wrap", False), (["auto_wrap", "offload"], True)])
def test_fsdp2_cuts_the_model_into_its_layers(fsdp, offloads, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # parsing sets some
    config = str(ROOT / "recipes" / "fsdp2.json")
    training = parse("wzry_full", output_dir=str(tmp_path), fsdp=fsdp, fsdp_config=config)[2]
    plugin = FullyShardedDataParallelPlugin(**training.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)  # parts of it would be no model that others can load
    assert plugin.reshard_after_forward is True  # as ZeRO-3: weights are given back after use
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offloads
    assert training.fsdp_config["activation_checkpointing"] is False  # LLaMA-Factory's own is on
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(build_tokenizer()))
    plugin.set_auto_wrap_policy(model)
    layers = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    cut = [name for name, module in model.named_modules() if type(module) in layers]
    assert {name.rpartition(".")[0] for name in cut} == {"model.visual.blocks", "model.language_model.layers"}


# --- Running ---------------------------------------------------------------------------------------------------------

# Places of Qwen3-VL's weights, by a part of their names.
VISION = {"visual.patch_embed", "visual.pos_embed", "visual.blocks"}
PROJECTOR = {"visual.merger", "visual.deepstack_merger_list"}
LANGUAGE = {"language_model.embed_tokens", "language_model.layers", "language_model.norm"}
LINEAR = {"visual.blocks", "language_model.layers"} | PROJECTOR  # where LoRA can stand

FULL_RATES = {"language": 2e-5, "projector": 4e-5, "vision": 2e-6}
TRAINING = {
    "wzry_full": (VISION | PROJECTOR | LANGUAGE, FULL_RATES),
    "wzry_full_1gpu": (VISION | PROJECTOR | LANGUAGE, FULL_RATES),
    "wzry_full_bf16": (VISION | PROJECTOR | LANGUAGE, FULL_RATES),
    "wzry_frozen_vision": (PROJECTOR | LANGUAGE, FULL_RATES),
    "wzry_projector_only": (PROJECTOR, {"projector": 1e-4}),
    "wzry_lora": ({"language_model.layers"}, {"language": 1e-4}),
    "wzry_dora": ({"language_model.layers"}, {"language": 1e-4}),
    "wzry_lora_vision": (LINEAR, {"language": 1e-4, "projector": 1e-4, "vision": 2e-5}),
}


def place(name: str) -> str:
    return next(place for place in VISION | PROJECTOR | LANGUAGE if place in name)


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory):
    """What replaces a recipe's model, data and lengths, by key."""
    folder = tmp_path_factory.mktemp("recipes")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    # In bfloat16, as the published weights are.
    AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(
        folder / "model"
    )
    text = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES)
    for seed, name in enumerate(sorted(set(re.findall(r"wzry/[\w/]+\.\w+", text)))):
        if name.endswith(".mp4"):
            write_clip(folder / "media" / name, frames=126, seed=seed)  # 21 s: the records name times up to 20 s
        else:
            (folder / "media" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((96, 64), 60 + seed).convert("RGB").save(folder / "media" / name)
    model = {"model_name_or_path": str(folder / "model")}
    data = {"dataset_dir": str(ROOT / "dataset_info"), "media_dir": str(folder / "media")}
    run = {"cache_dir": str(folder / "cache"), "use_cpu": True, "dataloader_num_workers": 0}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "logging_steps": 1}
    return SimpleNamespace(model=model, data={**data, **run}, batch=batch)


class Watch(TrainerCallback):
    """Keeps the weights before training, and the optimizer's groups."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.model = model
        self.before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.groups = optimizer.param_groups

    def moved(self) -> set[str]:
        return {name for name, weight in self.model.named_parameters() if not torch.equal(weight, self.before[name])}


@pytest.fixture(scope="module")
def train(shrunken, tmp_path_factory):
    """Runs two steps of a recipe's shrunken form, once for all tests that ask for the same."""
    runs = {}

    def run(name: str, **overrides) -> SimpleNamespace:
        key = (name, *overrides.items())
        if key not in runs:
            output = tmp_path_factory.mktemp(name)
            keys = {**shrunken.model, **shrunken.data, **shrunken.batch, "dataset": "wzry_example", **overrides}
            watch = Watch()
            keys |= ON_A_CPU.get(name, {})
            run_exp(recipe(name, **keys, deepspeed=None, output_dir=str(output)), [watch])
            runs[key] = SimpleNamespace(output=output, watch=watch)
        return runs[key]

    return run


@pytest.mark.parametrize("name", TRAINING)
def test_what_the_recipe_trains(train, name):
    places, rates = TRAINING[name]
    run = train(name)
    moved = run.watch.moved()
    assert {place(weight) for weight in moved} == places
    assert run.watch.model.is_gradient_checkpointing
    if recipe(name)["finetuning_type"] == "lora":
        assert all("lora_" in weight for weight in moved)
    assert any("magnitude" in weight for weight in moved) == (name == "wzry_dora")

    names = {id(weight): weight_name for weight_name, weight in run.watch.model.named_parameters()}
    found = {}
    for group in run.watch.groups:
        for weight in group["params"]:
            weight_name = names[id(weight)]
            part = "projector" if "merger" in weight_name else "vision" if "visual" in weight_name else "language"
            found.setdefault(part, set()).add(group["initial_lr"])
            assert group["weight_decay"] == (0.0 if weight.ndim == 1 else 0.01), weight_name
    assert found == {part: {rates[part]} for part in found}
    assert {place(names[id(weight)]) for group in run.watch.groups for weight in group["params"]} == places


@pytest.mark.parametrize("name", TRAINING)
def test_what_the_recipe_leaves_behind(train, name):
    output = train(name).output
    assert (output / "training_loss.png").is_file()
    assert list(output.rglob("events.out.tfevents.*"))
    losses = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["loss"] > 0 for line in losses if "loss" in line] == [True, True]
    assert (output / "checkpoint-2" / "trainer_state.json").is_file()
    if recipe(name)["finetuning_type"] == "lora":
        saved = load_file(output / "adapter_model.safetensors")
        assert {place(weight) for weight in saved} == TRAINING[name][0]


# fps, frames and pixels that the training recipes ask for.
SAMPLING = (4, 16, 32, 401408, 1003520)


def saved_sampling(folder: Path) -> tuple:
    """The same of a folder's processor, as plain transformers loads it."""
    processor = AutoProcessor.from_pretrained(folder).video_processor
    size = processor.size
    return processor.fps, processor.min_frames, processor.max_frames, size.shortest_edge, size.longest_edge


@pytest.mark.parametrize("name", ["wzry_chat", "wzry_api"])
def test_chat_samples_as_training_did(train, name):
    output = train("wzry_full_1gpu").output
    assert saved_sampling(output) == saved_sampling(output / "checkpoint-2") == SAMPLING
    model_args = get_infer_args(recipe(name, model_name_or_path=str(output)))[0]
    sampling = load_tokenizer(model_args)["processor"].clip_reader.sampling
    assert sampling.dialect == "qwen_finetune"
    used = (sampling.fps, sampling.min_frames, sampling.max_frames, sampling.min_pixels, sampling.max_pixels)
    assert used == SAMPLING


def test_export_merges_the_adapter(train, shrunken, tmp_path):
    adapter = train("wzry_lora", learning_rate=0.05).output  # a rate whose steps bfloat16 can show
    keys = {**shrunken.model, "adapter_name_or_path": str(adapter), "export_dir": str(tmp_path)}
    export_model(recipe("wzry_export", **keys))

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    base = AutoModelForImageTextToText.from_pretrained(shrunken.model["model_name_or_path"]).state_dict()
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    assert changed == {name[len(prefix) : -len(suffix)] + ".weight" for name in factors if name.endswith(suffix)}
    for name in changed:
        a, b = (factors[f"{prefix}{name[: -len('.weight')]}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(merged[name], (base[name] + 2 * (b @ a)).bfloat16(), atol=0.01, rtol=0.01)
    assert saved_sampling(tmp_path) == SAMPLING


def test_predict_answers_every_example(shrunken, tmp_path):
    examples = ",".join(path.stem for path in EXAMPLES)
    keys = {**shrunken.model, **shrunken.data, "eval_dataset": examples, "max_new_tokens": 4}
    run_exp(recipe("wzry_predict", **keys, output_dir=str(tmp_path)))
    lines = (tmp_path / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == sum(len(json.loads(path.read_text(encoding="utf-8"))) for path in EXAMPLES)
    assert '\\"tags\\": [\\"游戏直播\\", \\"王者荣耀\\", \\"凯\\", \\"击杀\\"]' in lines[0]
    assert json.loads(lines[0])["predict"] != json.loads(lines[0])["label"]
    assert {"predict_rouge-l", "predict_bleu-4"} <= json.loads((tmp_path / "predict_results.json").read_text()).keys()


def test_predict_holds_answers_to_the_schema_that_training_answers_tell(shrunken, tmp_path):
    """Of a random model: each parses, and has no tag that was not taught."""
    answers = [{"video_description": "好", "tags": ["凯", "击杀"]}, {"video_description": "坏", "tags": []}]
    turns = [[{"from": "human", "value": "问"}, {"from": "gpt", "value": answer}] for answer in answers]
    example = tmp_path / "taught.json"
    example.write_text(json.dumps([{"conversations": each} for each in turns], ensure_ascii=False), encoding="utf-8")
    keys = {**shrunken.model, **shrunken.data, "eval_dataset": "wzry_example", "max_new_tokens": 80}
    schema = {"json_schema_from": str(example), "json_schema_vocabulary": "tags"}
    run_exp(recipe("wzry_predict", **keys, **schema, output_dir=str(tmp_path)))
    told = schema_of_answers(example, ["tags"])
    lines = (tmp_path / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        Draft202012Validator(told).validate(json.loads(json.loads(line)["predict"]))
    assert len(lines) > 1
    with pytest.raises(ValueError, match=r"no file .*gone\.json"):
        run_exp(
            recipe("wzry_predict", **keys, json_schema=str(tmp_path / "gone.json"), output_dir=str(tmp_path / "x"))
        )
