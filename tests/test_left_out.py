"""Records whose clips or pictures cannot be shown: left out if the recipe says so, in all ways of training alike."""

import json

import numpy as np
import pytest
from conftest import write_clip
from llamafactory_video.prompt.left_out import LeftOut
from llamafactory_video.records.report import DatasetError
from llamafactory_video.tools.cli import build_cache, check
from PIL import Image
from processes import Run
from runs import LORA, make_folder, recipe_keys, train, write_recipe

STEPS = 4


def damage(file):
    """A video file with a whole header and no frame that can be decoded."""
    data = file.read_bytes()
    start = data.index(b"mdat") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    file.write_bytes(data[:start] + bytes(length) + data[start + length :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of each data set, records that cannot be used stand behind good ones, which `good` holds alone.

    `unreadable`: seen when they are planned. `damaged`: a clip and a picture that are damaged behind good headers.
    """
    folder = make_folder(tmp_path_factory.mktemp("left_out"))
    damage(write_clip(folder / "media/damaged.mp4", frames=12))
    Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "media/cut.jpg")
    picture = (folder / "media/cut.jpg").read_bytes()
    (folder / "media/cut.jpg").write_bytes(picture[: len(picture) // 2])

    def record(number, **media):
        marks = "".join(f"<{kind}>" for kind in media)
        turns = [{"from": "human", "value": f"{marks}看{number}"}, {"from": "gpt", "value": "好" * (1 + number % 5)}]
        return {**media, "conversations": turns, "weight": 1.50}

    good = [record(i, video=f"{i % 4}.mp4") for i in range(STEPS)]
    damaged = [record(9, video="damaged.mp4"), record(9, image="cut.jpg")]
    sets = {
        "good": good,
        "pictures": [record(1, image="a.png"), record(2, image="cut.jpg")],
        "unreadable": [each for one in good for each in (one, record(9, video="bad.mp4"))],
        "damaged": [each for i, one in enumerate(good) for each in (one, damaged[i % 2])],
        "mixture": [*good, record(9, video="bad.mp4"), *damaged],
    }
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    info = {name: {"file_name": f"{name}.jsonl", "formatting": "video_conversation"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture
def keys(folder, tmp_path):
    own = {"dataset": "good", "max_steps": STEPS, "per_device_train_batch_size": 1, "warmup_steps": 0, **LORA}
    return {**recipe_keys(folder), "video_cache_dir": str(tmp_path / "cache"), "unknown_fields": "ignore", **own}


SKIP = {"skip_wrong_records": True, "skip_wrong_share": 0.5}
KINDS = {
    "flat": {},
    "padded": {"data_flatten": False},
    # LLaMA-Factory shuffles streams, so there nothing is learnt, and losses are compared whatever their order.
    "streaming": {"streaming": True, "learning_rate": 0.0, "mm_projector_lr": None, "vision_tower_lr": None},
    "workers": {"dataloader_num_workers": 2},
    "packing": {"packing": True, "neat_packing": True, "cutoff_len": 256},
}


def losses(log):
    return [line["loss"] for line in log]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_clips_are_left_out_before_training(keys, tmp_path, kind):
    """The run is that on the good records alone."""
    own = {**KINDS[kind], **({"max_steps": 1} if kind == "packing" else {})}
    wanted = train(keys, tmp_path / "good", **own)
    found = train(keys, tmp_path / "skip", dataset="unreadable", **own, **SKIP)
    order = sorted if kind == "streaming" else list
    assert order(losses(found)) == order(losses(wanted)) and len(found) == own.get("max_steps", STEPS)
    listed = (tmp_path / "skip/left_out_records_training.txt").read_text(encoding="utf-8").splitlines()
    assert [f"record {2 * i + 2} (line {2 * i + 2}): " in line for i, line in enumerate(listed)] == [True] * STEPS
    assert all("bad.mp4: is not a video that can be read" in line for line in listed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_met_in_training_teaches_nothing(keys, tmp_path, kind):
    """In place of a clip or picture that proves damaged comes nothing: each step is that of the good record in it."""
    own = {**KINDS[kind], **({"max_steps": 1} if kind == "packing" else {})}
    wanted = train(keys, tmp_path / "good", **own)
    batch = {} if kind == "packing" else {"per_device_train_batch_size": 2}
    batch = {"max_steps": 2 * STEPS} if kind == "streaming" else batch
    found = losses(train(keys, tmp_path / "skip", dataset="damaged", **{**own, **SKIP, **batch}))
    if kind == "streaming":
        found = sorted(loss for loss in found if loss)
    np.testing.assert_allclose(found, sorted(losses(wanted)) if kind == "streaming" else losses(wanted), rtol=2e-4)
    listed = (tmp_path / "skip/left_out_records_training.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == STEPS and all(
        "damaged.mp4: " in line or "cut.jpg: is not a picture" in line for line in listed
    )


def test_each_evaluation_set_has_a_list_of_its_own(keys, tmp_path):
    own = {
        "eval_dataset": "unreadable,damaged",
        "eval_on_each_dataset": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    train(keys, tmp_path / "run", per_device_eval_batch_size=2, **own, **SKIP)
    lists = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "run").glob("left_out_records_*")}
    assert set(lists) == {f"left_out_records_evaluation_{name}.txt" for name in ("unreadable", "damaged")}
    assert all(
        f"{name}.jsonl, record " in text
        for name in ("unreadable", "damaged")
        for text in lists.values()
        if name in text
    )
    assert [len(text.splitlines()) for text in lists.values()] == [STEPS, STEPS]


def test_too_many_stop_the_run(keys, tmp_path):
    share = {**SKIP, "skip_wrong_share": 0.3}
    told = r"more than skip_wrong_share, 0\.3 of all, so none is left out"
    with pytest.raises(DatasetError, match=f"(?s)training: 4 of 8 records cannot be used:.*{told}"):
        train(keys, tmp_path / "planned", dataset="unreadable", **share)
    with pytest.raises(DatasetError, match=f"(?s)3 of 8 records cannot be used; they are listed in .*{told}"):
        train(keys, tmp_path / "met", dataset="damaged", per_device_train_batch_size=2, **share)


def test_a_step_without_any_good_record_changes_nothing(keys, folder, tmp_path):
    """Not even what the first step's gradients are judged by."""
    order = {"dataset": "damaged", "max_steps": 2 * STEPS, **SKIP}
    found = train(keys, tmp_path / "skip", **order)
    assert [loss == 0 for loss in losses(found)] == [False, True] * STEPS
    lines = (folder / "damaged.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)), encoding="utf-8")
    info = {"turned": {"file_name": "turned.jsonl", "formatting": "video_conversation"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    turned = {**order, "dataset": "turned", "dataset_dir": str(tmp_path)}
    assert [loss == 0 for loss in losses(train(keys, tmp_path / "first", **turned))] == [True, False] * STEPS


def test_two_processes_leave_out_the_same(keys, tmp_path):
    """The second reads damaged records alone, and goes along: the weights are those of the good records."""
    wanted = train(keys, tmp_path / "good", logging_steps=1)
    run = Run({**keys, **SKIP}, tmp_path / "two", 2, dataset="damaged", per_device_train_batch_size=1)
    assert run.end() == [0, 0], run.log(0)[-3000:] + run.log(1)[-3000:]
    state = json.loads((tmp_path / "two/trainer_state.json").read_text())
    found = [line["loss"] for line in state["log_history"] if "loss" in line]
    np.testing.assert_allclose(found, losses(wanted), rtol=1e-3)
    listed = (tmp_path / "two/left_out_records_training.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(listed)) == len(listed) == STEPS


def test_predictions_are_of_the_good_records(keys, tmp_path):
    own = {"dataset": None, "eval_dataset": "damaged", "do_train": False, "do_predict": True, "cutoff_len": 1024}
    train_free = {**own, "predict_with_generate": True, "max_new_tokens": 4, "finetuning_type": "full", **SKIP}
    from llamafactory.train.tuner import run_exp

    run_exp({**keys, **train_free, "output_dir": str(tmp_path / "predict")})
    lines = (tmp_path / "predict/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["label"].strip() for line in lines] == ["好" * (1 + i % 5) for i in range(STEPS)]


def test_check_and_cache_build_write_what_is_good(keys, folder, tmp_path, capsys):
    recipe = write_recipe({**keys, "dataset": "mixture"}, tmp_path / "run")
    readable, clean = tmp_path / "readable.jsonl", tmp_path / "clean.jsonl"
    assert check(recipe, []) == 1
    assert check(recipe, [], readable) == 0
    lines = (folder / "mixture.jsonl").read_text(encoding="utf-8").splitlines()
    assert readable.read_text(encoding="utf-8").splitlines() == [*lines[:STEPS], *lines[STEPS + 1 :]]
    capsys.readouterr()
    assert build_cache(recipe, [], 2) == 3
    told = capsys.readouterr().out
    assert "pictures read" not in told and "3 records with a clip or picture that cannot be shown" in told
    assert f"record {STEPS + 3} (line {STEPS + 3}): " in told and "cut.jpg: is not a picture" in told
    assert build_cache(recipe, [], 2, clean) == 0
    assert clean.read_text(encoding="utf-8") == (folder / "good.jsonl").read_text(encoding="utf-8") + "\n"
    assert "clean.jsonl: 4 records of mixture" in capsys.readouterr().out
    assert build_cache(recipe, ["dataset=pictures"], 2) == 1
    assert "1 pictures read, 1 records with a clip or picture that cannot be shown" in capsys.readouterr().out
    assert build_cache(recipe, ["skip_wrong_records=true", "skip_wrong_share=0.5"], 2) == 0
    assert check(recipe, ["skip_wrong_records=true", "skip_wrong_share=0.5"]) == 0
    assert check(recipe, ["skip_wrong_records=true", "skip_wrong_share=0.1"]) == 1
    with pytest.raises(ValueError, match="would replace the records that it is made from"):
        check(recipe, [], folder / "mixture.jsonl")
    with pytest.raises(ValueError, match="--write takes one data set"):
        check(recipe, ["dataset=good,mixture"], clean)


def test_the_list_holds_each_record_once(tmp_path):
    left_out = LeftOut(tmp_path / "new/list.txt", 10, 0.2)
    left_out.add("a: x")  # into a folder that is not there yet
    left_out.begin(["a: x"])
    for problem in ("b: y\nz", "b: y\nz", "a: x"):
        left_out.add(problem)
    assert left_out.file.read_text() == "a: x\nb: y z\n"
    with pytest.raises(DatasetError, match=r"c: w\n3 of 10 records cannot be used"):
        left_out.add("c: w")
    left_out.begin([])
    assert not left_out.file.exists()
