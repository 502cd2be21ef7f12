"""Training runs of a small model on clips, pictures and texts drawn here, in this process; for several test files."""

import copy
import json
from pathlib import Path

import yaml
from conftest import write_clip
from llamafactory.train.tuner import run_exp
from llamafactory_video.demo.tiny_model import save_tiny_model
from PIL import Image
from transformers import TrainerCallback

STEPS, BATCH = 20, 4


def record(number: int) -> dict:
    """Texts, images, clips and both at once in turn; answers of 1 to 13 tokens."""
    answer = {"from": "gpt", "value": "好" * (1 + 5 * number % 13)}
    text, given = [
        (f"文字{number}", {}),
        (f"<image>图{number}", {"image": "a.png"}),
        (f"<video><image>看{number}", {"video": f"{number % 3}.mp4", "image": "a.png"}),
        (f"<video>看{number}", {"video": f"{number % 4}.mp4"}),
    ][number % 4]
    return {**given, "conversations": [{"from": "human", "value": text}, answer]}


def make_folder(folder: Path) -> Path:
    """A model, and data sets over clips and a picture."""
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    for i in range(4):
        write_clip(folder / f"media/{i}.mp4", frames=12 + 6 * i, seed=i)
    Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "media/a.png")
    (folder / "media/bad.mp4").write_bytes(b"no video")
    mixed = [record(i) for i in range(STEPS * BATCH)]
    sets = {
        "mixed": mixed,
        "clips": [row for row in mixed if "video" in row],
        "texts": [row for row in mixed if row.keys() == {"conversations"}],
        "bad": [
            {**row, "video": "bad.mp4"} if i == 13 else row for i, row in enumerate(map(record, range(3, 200, 4)))
        ],
    }
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json", "formatting": "video_conversation"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def recipe_keys(folder: Path) -> dict:
    """A recipe with rates of its own for each module, in fp32, without shuffling."""
    return {
        "model_name_or_path": str(folder / "model"),
        "template": "qwen3_vl_video",
        "dataset": "mixed",
        "dataset_dir": str(folder),
        "media_dir": str(folder / "media"),
        "cache_dir": str(folder / "cache"),
        "cutoff_len": 1024,
        "video_sampling": "qwen_finetune",
        "video_min_frames": 4,
        "video_max_frames": 8,
        "video_min_pixels": 10000,
        "video_max_pixels": 40000,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "learning_rate": 2e-3,
        "mm_projector_lr": 4e-3,
        "vision_tower_lr": 2e-4,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 1.0,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "disable_shuffling": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }


class Start(TrainerCallback):
    """Keeps a copy of the model as it is before the first step, and the model that trains."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.model, self.before = model, copy.deepcopy(model)
        self.state = state


def train(keys: dict, output: Path, callback: TrainerCallback | None = None, **overrides) -> list[dict]:
    """Run LLaMA-Factory in this process; the lines of the log that tell a step."""
    run_exp({**keys, "output_dir": str(output), **overrides}, [] if callback is None else [callback])
    return steps(output)


def steps(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [line for line in history if "loss" in line]


def write_recipe(keys: dict, output: Path) -> Path:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump({**keys, "output_dir": str(output)}, allow_unicode=True), encoding="utf-8")
    return file


LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lora_target": "all"}
