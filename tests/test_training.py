"""Training against a plain torch loop, on one process and on two: loss, gradient, rates and weights of 20 steps in fp32.

The loop takes one record at a time, without padding and without what the trainer adds to a batch; positions are left to
the model. What it shares with the trainer is the record's own ids, labels and patches, tested elsewhere.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import write_clip
from llamafactory.train.tuner import run_exp
from llamafactory_video.data.loader import DatasetError
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.hooks import recipe_data
from llamafactory_video.model.template import token_type_ids, vision_inputs
from llamafactory_video.model.vision import call_vision_once
from llamafactory_video.train.audit import GradientAudit, GradientError
from llamafactory_video.train.checkpoint import CheckpointError
from llamafactory_video.train.trainer import VideoTrainer
from PIL import Image
from processes import Run
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForImageTextToText, TrainerCallback

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and data sets over clips and a picture."""
    folder = tmp_path_factory.mktemp("training")
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


@pytest.fixture(scope="module")
def keys(folder):
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


@pytest.fixture
def told(monkeypatch):
    """What the trainer tells the person who runs it."""
    lines = []
    prepare = VideoTrainer.__init__
    monkeypatch.setattr(
        VideoTrainer, "__init__", lambda self, *args, log, **kwargs: prepare(self, *args, log=lines.append, **kwargs)
    )
    return lines


def module(name: str) -> str:
    return "projector" if "merger" in name else "vision" if "visual" in name else "language"


def plain_loop(model: torch.nn.Module, keys: dict, folder: Path) -> list[dict[str, float]]:
    """Train `model` on the data set in order; what the trainer logs, by step."""
    _, parts, encoder = recipe_data(write_recipe(keys, folder), [])
    rates = {"language": 2e-3, "projector": 4e-3, "vision": 2e-4}
    groups = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups.setdefault((module(name), weight.ndim > 1), []).append(weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "lr": rates[part], "weight_decay": 0.01 if decays else 0.0}
            for (part, decays), weights in groups.items()
        ]
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [weight for weights in groups.values() for weight in weights]
    rows = parts["mixed"].with_format(None)
    lines = []
    model.train()
    for step in range(STEPS):
        # Linear warmup over 3 steps, then half a cosine.
        factor = step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        samples = [encoder.encode(rows[i]) for i in range(step * BATCH, (step + 1) * BATCH)]
        supervised = sum(label != -100 for sample in samples for label in sample["labels"])
        total = 0.0
        for sample in samples:
            ids = torch.tensor([sample["input_ids"]])
            shown = vision_inputs(sample["images"] or [], sample["videos"] or [], encoder.processor, encoder.reader)
            types = token_type_ids(ids, encoder.processor)
            logits = model(input_ids=ids, mm_token_type_ids=types, **shown).logits[0]
            loss = F.cross_entropy(logits[:-1], torch.tensor(sample["labels"][1:]), reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": total, "grad_norm": norm, "factor": factor})
    return lines


def write_recipe(keys: dict, output: Path) -> Path:
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump({**keys, "output_dir": str(output)}, allow_unicode=True), encoding="utf-8")
    return file


def assert_same(lines: list[dict], plain: list[dict], learning_rate: float = 2e-3) -> None:
    assert len(lines) == STEPS
    for line, expected in zip(lines, plain, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["learning_rate"] == pytest.approx(2e-3 * expected["factor"])
        assert line["mm_projector_lr"] == pytest.approx(4e-3 * expected["factor"])
        assert line["vision_tower_lr"] == pytest.approx(2e-4 * expected["factor"])


LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lora_target": "all"}


@pytest.fixture(scope="module")
def plain(keys, folder):
    """The loop's lines and weights, by kind of fine-tuning. LoRA starts from the matrices that the trainer drew."""
    found = {}

    def run(kind: str, before: torch.nn.Module | None = None):
        if kind not in found:
            model = before or AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
            found[kind] = plain_loop(model, keys, folder), dict(model.named_parameters())
        return found[kind]

    return run


# Micro-batches of a step: one, two of two, four of one.
@pytest.mark.parametrize("size", [pytest.param(4, marks=pytest.mark.thorough), 2, 1])
def test_twenty_steps_equal_a_plain_loop(keys, folder, plain, tmp_path, size):
    lines = train(keys, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=BATCH // size)
    expected, weights = plain("full")
    assert_same(lines, expected)
    saved = load_file(tmp_path / "model.safetensors")
    for name in saved:
        torch.testing.assert_close(saved[name], weights[name], rtol=1e-3, atol=1e-5)
    start = load_file(folder / "model" / "model.safetensors")
    assert not any(torch.allclose(saved[name], start[name], atol=1e-4) for name in saved if saved[name].ndim > 1)


def test_twenty_steps_of_lora_equal_a_plain_loop(keys, plain, tmp_path):
    start = Start()
    lines = train(keys, tmp_path, start, per_device_train_batch_size=2, gradient_accumulation_steps=2, **LORA)
    expected, weights = plain("lora", start.before)
    assert_same(lines, expected)
    trained = {name: weight for name, weight in start.model.named_parameters() if weight.requires_grad}
    assert {module(name) for name in trained} == {"language", "vision", "projector"}
    for name, weight in trained.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-5)


def test_two_processes_whose_batches_differ_in_kind_equal_a_plain_loop(keys, plain, tmp_path):
    """One record a batch: while one process has a text, the other has a picture, or a clip with a picture beside one."""
    run = Run(keys, tmp_path / "two", 2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert run.end() == [0, 0], run.log()[-3000:]
    expected, weights = plain("full")
    assert_same(steps(tmp_path / "two"), expected)
    for name, weight in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-5)


def test_llamafactorys_own_loss_is_the_mean_of_means(keys, tmp_path):
    by_token = train(keys, tmp_path / "a", max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    own = {"loss_normalization": "micro_batches", "max_steps": 1, "logging_steps": 1}
    whole = train(keys, tmp_path / "b", **own)
    cut = train(keys, tmp_path / "c", per_device_train_batch_size=1, gradient_accumulation_steps=4, **own)
    assert whole[0]["loss"] == pytest.approx(by_token[0]["loss"], rel=1e-5)
    assert abs(cut[0]["loss"] - by_token[0]["loss"]) > 1e-3


@pytest.mark.parametrize("size", [1, 3, 16])
def test_evaluation_tells_the_mean_over_tokens_however_it_is_batched(keys, folder, tmp_path, size):
    overrides = {"do_train": False, "do_eval": True, "eval_dataset": "clips", "per_device_eval_batch_size": size}
    run_exp({**keys, "output_dir": str(tmp_path), **overrides})
    found = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()
    _, parts, encoder = recipe_data(write_recipe({**keys, "dataset": "clips"}, tmp_path), [])
    total = tokens = 0
    for row in parts["clips"].with_format(None):
        sample = encoder.encode(row)
        ids = torch.tensor([sample["input_ids"]])
        shown = vision_inputs(sample["images"] or [], sample["videos"], encoder.processor, encoder.reader)
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=token_type_ids(ids, encoder.processor), **shown).logits[0]
        total += F.cross_entropy(logits[:-1], torch.tensor(sample["labels"][1:]), reduction="sum").item()
        tokens += sum(label != -100 for label in sample["labels"])
    assert found == pytest.approx(total / tokens, rel=1e-5)


# --- The audit -------------------------------------------------------------------------------------------------------


class Cut(TrainerCallback):
    """Cuts the gradient of what a module returns, as wrong freezing or checkpointing would."""

    def __init__(self, name: str, change) -> None:
        self.name, self.change = name, change

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.get_submodule(self.name).register_forward_hook(lambda module, inputs, output: self.change(output))


def test_modules_without_a_gradient_stop_the_run_by_name(keys, tmp_path):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    with pytest.raises(GradientError) as caught:
        train(keys, tmp_path, cut, dataset="clips")
    text = str(caught.value)
    assert "after step 1" in text and "gradient missing: " in text and "model.visual.merger.linear_fc1" in text
    assert "model.language_model" not in text and "deepstack" not in text
    assert "gradient_check: warn" in text


def test_zero_gradients_and_those_that_are_not_finite_are_told_apart(keys, tmp_path):
    with pytest.raises(GradientError, match=r"gradient zero: .*model\.visual\.merger\.linear_fc2"):
        train(keys, tmp_path / "zero", Cut("model.visual.merger", lambda output: output * 0), dataset="clips")
    with pytest.raises(GradientError, match=r"gradient not finite: .*model\.visual\.patch_embed\.proj"):
        broken = Cut("model.visual.merger", lambda output: output * torch.inf)
        train(keys, tmp_path / "inf", broken, dataset="clips")


def test_a_run_goes_on_without_a_gradient_where_it_is_allowed(keys, tmp_path, told):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    lines = train(keys, tmp_path, cut, dataset="clips", gradient_check="warn", max_steps=2)
    assert len(lines) == 2
    assert len(told) == 1 and "gradient missing: " in told[0] and "model.visual.merger.linear_fc1" in told[0]


def test_vision_is_judged_once_something_is_shown(keys, tmp_path):
    """Texts alone give the vision tower no gradient, and that is right."""
    assert len(train(keys, tmp_path / "texts", dataset="texts", max_steps=2)) == 2
    cut = Cut("model.visual", lambda output: type(output)(**{k: _cut(v) for k, v in output.items()}))
    with pytest.raises(GradientError, match="after step 4"):  # 8 texts first, in batches of 4; asked at 1, 2, 4, 8, …
        train(keys, tmp_path / "later", cut, dataset="texts,clips", max_samples=8, max_steps=4)


def _cut(value):
    return [_cut(item) for item in value] if isinstance(value, list | tuple) else value.detach()


def test_a_run_that_diverges_stops_before_it_is_saved(keys, tmp_path):
    rates = {"learning_rate": 1e30, "mm_projector_lr": 1e30, "vision_tower_lr": 1e30}
    with pytest.raises(GradientError, match=r"training has diverged \(loss nan.* Lower the learning rates"):
        train(keys, tmp_path, **rates, logging_steps=5, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("logging", "saving"),
    [
        ({"logging_steps": 500}, {"save_strategy": "steps", "save_steps": 4}),
        pytest.param({"logging_steps": 500}, {"save_strategy": "no"}, marks=pytest.mark.thorough),
        pytest.param(
            {"logging_strategy": "no"}, {"save_strategy": "steps", "save_steps": 4}, marks=pytest.mark.thorough
        ),
        ({"logging_strategy": "no"}, {"save_strategy": "no"}),
    ],
)
def test_it_is_not_saved_where_no_line_of_the_log_tells(keys, tmp_path, logging, saving):
    rates = {"learning_rate": 1e30, "mm_projector_lr": 1e30, "vision_tower_lr": 1e30}
    with pytest.raises(GradientError, match=r"training has diverged \(loss nan"):
        train(keys, tmp_path, **rates, **logging, **saving, max_steps=6)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_hooks_are_gone_once_all_is_judged(keys, tmp_path):
    """DeepSpeed asks for the optimizer twice."""
    start, ask = Start(), VideoTrainer.create_optimizer
    with mock.patch.object(VideoTrainer, "create_optimizer", lambda self: (ask(self), ask(self))[1]):
        train(keys, tmp_path, start, dataset="clips", max_steps=1)
    assert not any(weight._backward_hooks for weight in start.model.parameters())


def test_a_layer_keeps_its_name_when_it_is_wrapped():
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    audit = GradientAudit(inner.named_parameters(), from_hooks=False)
    wrapped = torch.compile(torch.nn.Sequential(checkpoint_wrapper(inner[0])), backend="eager")
    wrapped(torch.ones(1, 2)).sum().backward()
    audit.take(wrapped.named_parameters())
    assert audit.check(torch.device("cpu")) == {} and audit.pending == []


# --- Started again ---------------------------------------------------------------------------------------------------


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
        ("run/runs", r"runs has no trainer_state\.json, so it is no whole checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_said(keys, another_run, tmp_path, checkpoint, message):
    (another_run / "runs").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        train(keys, tmp_path, max_steps=3, resume_from_checkpoint=str(another_run.parent / checkpoint))


def test_resume_from_checkpoint_true_takes_the_last_whole_one(keys, another_run, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint is true, and .* holds no whole checkpoint"):
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
    with pytest.raises(ValueError, match=r"checkpoint-2 holds weights alone .*`model_name_or_path: .*checkpoint-2`"):
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


def test_what_is_frozen_stands_in_the_table(keys, tmp_path):
    train(keys, tmp_path, max_steps=1, vision_tower_lr=None, freeze_vision_tower=True)
    rows = [line.split() for line in (tmp_path / "trained_modules.txt").read_text().splitlines()]
    assert [row[:1] + row[2:] for row in rows if "frozen" in row] == [["vision_tower", "frozen"]]
    assert [row[0] for row in rows].count("language_model") == 2  # with and without weight decay


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vision_tower_lr": "2e-6x"},
            'vision_tower_lr must be a number of at least 0; found the text "2e-6x"; YAML takes 1e-6',
        ),
        ({"mm_projector_lr": -1e-6}, "mm_projector_lr must be a number of at least 0; found -1e-06$"),
        ({"freeze_vision_tower": True}, "vision_tower_lr is given, but no parameter of the vision_tower trains"),
    ],
)
def test_rates_that_cannot_be_are_refused(keys, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(keys, tmp_path, **overrides)


def test_the_word_off_is_what_yaml_makes_of_it(keys, tmp_path):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    assert len(train(keys, tmp_path, cut, dataset="clips", gradient_check=False, max_steps=1)) == 1


# --- One call of the vision tower ------------------------------------------------------------------------------------


def test_images_and_clips_go_through_the_vision_tower_together(keys, folder):
    _, parts, encoder = recipe_data(write_recipe(keys, folder), [])
    sample = encoder.encode(parts["mixed"].with_format(None)[2])
    ids = torch.tensor([sample["input_ids"]])
    inputs = {"input_ids": ids, "mm_token_type_ids": token_type_ids(ids, encoder.processor)}
    inputs |= vision_inputs(sample["images"], sample["videos"], encoder.processor, encoder.reader)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float64)
    inputs |= {name: value.double() for name, value in inputs.items() if value.is_floating_point()}
    calls, found = [], []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        output = model(**inputs, labels=ids)
        output.loss.backward()
        found.append((len(calls), output.logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
        calls.clear()
        call_vision_once(model.model)
    (twice, logits, gradients), (once, new_logits, new_gradients) = found
    assert (twice, once) == (2, 1)
    torch.testing.assert_close(new_logits, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(new_gradients[name], gradient)


# --- Failing together ------------------------------------------------------------------------------------------------


def test_a_record_that_fails_on_one_process_stops_both_with_its_name(keys, tmp_path):
    run = Run(keys, tmp_path / "two", 2, dataset="bad", per_device_train_batch_size=1, max_steps=40)
    assert 0 not in run.end()
    for rank in range(2):
        assert "bad.json, record 14 (line 1): " in run.log(rank) and "bad.mp4: is not a video" in run.log(rank)


@pytest.mark.thorough
def test_a_process_that_failed_may_be_started_anew(tmp_path):
    script = tmp_path / "once.py"
    script.write_text(
        "import os, time\n"
        "from llamafactory_video.train.failure import stopping_together\n"
        "with stopping_together():\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        if os.environ['RANK'] == '1': raise OSError('for once')\n"
        "        time.sleep(60)\n"
        "    time.sleep(2)\n"
        "    os.write(1, f'ended {os.environ[\"RANK\"]}\\n'.encode())\n"
        "    raise SystemExit(0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(run.stdout.split("\n")) == ["", "ended 0", "ended 1"]


def test_a_record_that_fails_stops_the_run(keys, tmp_path):
    with pytest.raises(DatasetError, match=r"record 14 .*bad\.mp4"):
        train(keys, tmp_path, dataset="bad", max_steps=40)
