"""Training against a plain torch loop, on one process and on two: loss, gradient, rates and weights of 20 steps in fp32.

The loop takes one record at a time, without padding and without what the trainer adds to a batch; positions are left to
the model. What it shares with the trainer is the record's own ids, labels and patches, tested elsewhere.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llamafactory.train.tuner import run_exp
from llamafactory_video.host.recipe import recipe_data
from llamafactory_video.model.flat import run_flat
from llamafactory_video.prompt.pixels import token_type_ids, vision_inputs
from llamafactory_video.records.report import DatasetError
from processes import Run
from runs import BATCH, LORA, STEPS, Start, steps, train, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText


def module(name: str) -> str:
    return "projector" if "merger" in name else "vision" if "visual" in name else "language"


def plain_loop(model: torch.nn.Module, keys: dict, folder: Path) -> list[dict[str, float]]:
    """Train `model` on the data set in order; what the trainer logs, by step."""
    data = recipe_data(write_recipe(keys, folder), [])
    parts, encoder = data.parts, data.encoder
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
    rows = parts["mixed"]
    lines = []
    model.train()
    for step in range(STEPS):
        # Linear warmup over 3 steps, then half a cosine.
        factor = step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        samples = [encoder.load(rows[i]) for i in range(step * BATCH, (step + 1) * BATCH)]
        supervised = sum(label != -100 for sample, _ in samples for label in sample.labels)
        total = 0.0
        for sample, clips in samples:
            ids = torch.tensor([sample.ids])
            shown = vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
            types = token_type_ids(ids, encoder.processor)
            logits = model(input_ids=ids, mm_token_type_ids=types, **shown).logits[0]
            loss = F.cross_entropy(logits[:-1], torch.tensor(sample.labels[1:]), reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"loss": total, "grad_norm": norm, "factor": factor})
    return lines


def assert_same(lines: list[dict], plain: list[dict], learning_rate: float = 2e-3) -> None:
    assert len(lines) == STEPS
    for line, expected in zip(lines, plain, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert line["learning_rate"] == pytest.approx(2e-3 * expected["factor"])
        assert line["mm_projector_lr"] == pytest.approx(4e-3 * expected["factor"])
        assert line["vision_tower_lr"] == pytest.approx(2e-4 * expected["factor"])


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


@pytest.mark.parametrize("loss", ["use_dft_loss", "use_eaft_loss"])
def test_llamafactorys_own_losses_are_those_of_padded_batches(keys, tmp_path, loss):
    own = {loss: True, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    flat, padded = (train(keys, tmp_path / str(is_flat), data_flatten=is_flat, **own) for is_flat in (True, False))
    for one, other in zip(flat, padded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    usual = train(keys, tmp_path / "usual", **{**own, loss: False})
    assert abs(usual[0]["loss"] - flat[0]["loss"]) > 1e-3


@pytest.fixture(scope="module")
def evaluated(keys, folder):
    """The plain loop's loss, a mean over tokens, and accuracy, a mean over records."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).eval()
    data = recipe_data(write_recipe({**keys, "dataset": "clips"}, folder), [])
    parts, encoder = data.parts, data.encoder
    total, tokens, right = 0.0, 0, []
    for row in parts["clips"]:
        sample, clips = encoder.load(row)
        ids, labels = torch.tensor([sample.ids]), torch.tensor(sample.labels[1:])
        shown = vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=token_type_ids(ids, encoder.processor), **shown).logits[0]
        total += F.cross_entropy(logits[:-1], labels, reduction="sum").item()
        learnt = labels != -100
        tokens += learnt.sum().item()
        right.append((logits[:-1].argmax(-1) == labels)[learnt].double().mean().item())
    return {"eval_loss": total / tokens, "eval_accuracy": sum(right) / len(right)}


EVALUATION = {"do_train": False, "do_eval": True, "eval_dataset": "clips"}


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("accuracy", [False, True], ids=["loss", "accuracy"])
def test_evaluation_tells_the_mean_over_tokens_however_it_is_batched(keys, evaluated, tmp_path, size, accuracy):
    overrides = {**EVALUATION, "per_device_eval_batch_size": size, "compute_accuracy": accuracy}
    run_exp({**keys, "output_dir": str(tmp_path), **overrides})
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-5)
    assert found.get("eval_accuracy") == (pytest.approx(evaluated["eval_accuracy"]) if accuracy else None)


@pytest.mark.parametrize("accuracy", [False, True], ids=["loss", "accuracy"])
def test_two_processes_evaluate_as_one_does(keys, evaluated, tmp_path, accuracy):
    """Whose batches are of different lengths: one record each."""
    run = Run(keys, tmp_path, 2, **EVALUATION, per_device_eval_batch_size=1, compute_accuracy=accuracy)
    assert run.end() == [0, 0], run.log()[-3000:]
    found = json.loads((tmp_path / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-5)
    assert found.get("eval_accuracy") == (pytest.approx(evaluated["eval_accuracy"]) if accuracy else None)


def test_two_processes_predict_as_one_does(keys, tmp_path):
    own = {
        "dataset": None,
        "eval_dataset": "clips",
        "do_train": False,
        "do_predict": True,
        "predict_with_generate": True,
    }
    own |= {"max_new_tokens": 8, "do_sample": False, "per_device_eval_batch_size": 3}
    found = []
    for count in (1, 2):
        run = Run(keys, tmp_path / str(count), count, **own)
        assert run.end() == [0] * count, run.log()[-3000:]
        lines = (tmp_path / str(count) / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([json.loads(line) for line in lines])
    assert found[0] == found[1] and len({line["source"] for line in found[0]}) == STEPS * BATCH // 2


# --- One call of the vision tower ------------------------------------------------------------------------------------


def test_images_and_clips_go_through_the_vision_tower_together(keys, folder):
    data = recipe_data(write_recipe(keys, folder), [])
    parts, encoder = data.parts, data.encoder
    sample, clips = encoder.load(parts["mixed"][2])
    ids = torch.tensor([sample.ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": token_type_ids(ids, encoder.processor)}
    inputs |= vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
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
        run_flat(model.model)
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
