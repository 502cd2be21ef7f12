"""Installed beside runs that have nothing to do with it, the plugin changes nothing: losses with and without, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import THOROUGH
from llamafactory_video.demo.tiny_model import build_config, build_tokenizer, save_tiny_model
from PIL import Image
from processes import run
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

# Runs two steps of each case in this interpreter and prints what came of it: the log, the weights, and an error if any.
SCRIPT = """
import json, sys
from pathlib import Path

import torch
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

torch.set_num_threads(1)


class Watch(TrainerCallback):
    def __init__(self):
        self.found = {"log": [], "weights": {}, "error": ""}

    def on_log(self, args, state, control, logs, **kwargs):
        self.found["log"].append({k: v for k, v in logs.items() if "_second" not in k and "runtime" not in k})

    def on_train_end(self, args, state, control, model, **kwargs):
        self.found["weights"] = {n: w.double().abs().sum().item() for n, w in model.named_parameters()}


folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, keys in cases.items():
    watch = Watch()
    try:
        run_exp({**keys, "output_dir": str(folder / name)}, [watch])
    except Exception as error:
        watch.found["error"] = type(error).__name__
    print("RESULT", json.dumps({name: watch.found}), flush=True)
"""
FAMILIES = {"qwen3_vl": "qwen3_vl_nothink", "qwen2_5_vl": "qwen2_vl"}
# What `make test` runs of them.
FEW = [
    ("qwen2_5_vl", "pt", "lora", "text"),
    ("qwen3_vl", "sft", "full", "picture"),
    ("qwen2_5_vl", "rm", "lora", "picture"),
    ("qwen3_vl", "dpo", "full", "picture"),
    ("qwen2_5_vl", "kto", "full", "text"),
]
STAGES = {"pt": "texts", "sft": "asked", "rm": "ranked", "dpo": "ranked", "kto": "judged"}


def save_qwen2_5_vl(folder: Path) -> None:
    """A small model of another family, beside the same tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    tokenizer = build_tokenizer()
    like = build_config(tokenizer, hidden_size=32, layers=2, heads=2)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": like.text_config.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        **{f"{kind}_token_id": getattr(like, f"{kind}_token_id") for kind in ("image", "video", "vision_start")},
        vision_end_token_id=like.vision_end_token_id,
    )
    import torch

    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).image_processor.patch_size == 14


def cases(folder: Path) -> dict[str, dict]:
    """Recipes by name: every stage, full and LoRA, on texts and on pictures, in two families; by default a part of them."""
    found = {}
    for family, template in FAMILIES.items():
        for stage, data in STAGES.items():
            for kind in ("full", "lora"):
                for what in ("text", "picture"):
                    if not THOROUGH and (family, stage, kind, what) not in FEW:
                        continue
                    found[f"{family}-{stage}-{kind}-{what}"] = {
                        "model_name_or_path": str(folder / family),
                        "template": template,
                        "stage": stage,
                        "dataset": f"{data}_{what}",
                        "dataset_dir": str(folder),
                        "media_dir": str(folder),
                        "cutoff_len": 512,
                        "do_train": True,
                        "finetuning_type": kind,
                        "freeze_vision_tower": False,
                        "freeze_multi_modal_projector": False,
                        "lora_rank": 4,
                        "learning_rate": 1e-3,
                        "max_steps": 2,
                        "logging_steps": 1,
                        "per_device_train_batch_size": 2,
                        "report_to": "none",
                        "save_strategy": "no",
                        "use_cpu": True,
                        "image_max_pixels": 16384,
                        **({"packing": False} if stage == "pt" else {}),
                    }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    save_tiny_model(folder / "qwen3_vl", hidden_size=32, layers=2, heads=2)
    save_qwen2_5_vl(folder / "qwen2_5_vl")
    Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "a.png")
    info = {}
    columns = {"messages": "conversations", "images": "images"}
    for what, mark in (("text", ""), ("picture", "<image>")):
        human = [{"from": "human", "value": f"{mark}问{i}"} for i in range(4)]
        gpt = [{"from": "gpt", "value": "好" * (1 + i)} for i in range(4)]
        shown = {"images": ["a.png"]} if mark else {}
        records = {
            "texts": [{"conversations": [h, g], **shown} for h, g in zip(human, gpt, strict=True)],
            "asked": [{"conversations": [h, g], **shown} for h, g in zip(human, gpt, strict=True)],
            "ranked": [
                {"conversations": [h], "chosen": g, "rejected": gpt[0], **shown}
                for h, g in zip(human, gpt, strict=True)
            ],
            "judged": [
                {"conversations": [h, g], "label": i % 2 == 0, **shown}
                for i, (h, g) in enumerate(zip(human, gpt, strict=True))
            ],
        }
        for name, rows in records.items():
            (folder / f"{name}_{what}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
            info[f"{name}_{what}"] = {
                "file_name": f"{name}_{what}.json",
                "formatting": "sharegpt",
                "ranking": name == "ranked",
                "columns": {
                    **(columns if shown else {"messages": "conversations"}),
                    **({"chosen": "chosen", "rejected": "rejected"} if name == "ranked" else {}),
                    **({"kto_tag": "label"} if name == "judged" else {}),
                },
            }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def results(folder: Path, disabled: bool) -> dict:
    out = folder / f"disabled{disabled}"
    out.mkdir()
    recipes = {name: {**keys, "cache_dir": str(out / "cache")} for name, keys in cases(folder).items()}
    command = ["-c", SCRIPT, str(out), json.dumps(recipes)]
    if disabled:  # before anything is imported
        environment = {**os.environ, "LLAMAFACTORY_VIDEO_DISABLE": "1"}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    else:
        done = run(*command)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found |= json.loads(line.removeprefix("RESULT "))
    assert found.keys() == recipes.keys(), done.stderr[-3000:]
    return found


def test_stock_runs_are_the_same_with_and_without_the_plugin(folder):
    without, with_plugin = results(folder, True), results(folder, False)
    for name, found in without.items():
        assert with_plugin[name] == found, name
    # Stock fails by itself where it saves a value head beside tied weights, and for KTO on Qwen3-VL.
    trained = {name for name, found in without.items() if found["log"] and found["weights"]}
    assert without.keys() - trained <= {name for name in without if name.startswith("qwen3_vl-kto")}


def test_what_the_projector_is_stays_llamafactorys_for_other_templates(folder, tmp_path):
    """With a frozen vision tower the deepstack mergers stay frozen in stock, and train in ours."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    trained = {}
    for template in ("qwen3_vl_nothink", "qwen3_vl_video"):
        keys = {
            **cases(folder)["qwen3_vl-sft-full-picture"],
            "template": template,
            "freeze_vision_tower": True,
            "output_dir": str(tmp_path),
        }
        model_args, _, _, finetuning_args, _ = get_train_args(keys)
        model = load_model(load_tokenizer(model_args)["tokenizer"], model_args, finetuning_args, is_trainable=True)
        trained[template] = {n for n, weight in model.named_parameters() if weight.requires_grad and "visual" in n}
    assert trained["qwen3_vl_nothink"] and not any("deepstack" in name for name in trained["qwen3_vl_nothink"])
    assert any("deepstack" in name for name in trained["qwen3_vl_video"])


def test_another_runs_checkpoints_are_found_as_llamafactory_finds_them(tmp_path):
    from llamafactory.hparams import parser
    from llamafactory_video.train.run_record import FILE

    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4").mkdir()  # cut short
    assert parser.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    (tmp_path / FILE).write_text("{}")
    assert parser.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
