"""`eval_generate`: answers of the evaluation set while a model trains, which change nothing in training."""

import json

import pytest
import yaml
from conftest import write_clip
from llamafactory.hparams import get_train_args
from llamafactory_video import Decoding, VideoModel
from llamafactory_video.evaluate.measures import judge
from llamafactory_video.records.question import read_questions
from llamafactory_video.records.report import DatasetError
from processes import Run
from runs import make_folder, recipe_keys, steps, train
from test_left_out import damage

STEPS, COUNT = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("eval_generate"))
    records = []
    for i in range(9):
        human = {"from": "human", "value": ["<video>看", "文字", "<image>图"][i % 3] + str(i)}
        media = [{"video": f"{i % 4}.mp4"}, {}, {"image": "a.png"}][i % 3]
        records.append({**media, "conversations": [human, {"from": "gpt", "value": {"tags": ["凯", f"第{i}"]}}]})
    (folder / "held.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["held"] = {"file_name": "held.json", "formatting": "video_conversation"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def keys(folder):
    own = {
        **{"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 2, "max_steps": STEPS, "max_new_tokens": 6},
        **{"per_device_eval_batch_size": 2, "dataset": "mixed"},
    }
    return {**recipe_keys(folder), **own}


def evaluations(output):
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [line for line in log if "eval_loss" in line]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_is_the_same_with_and_without(keys, tmp_path, lora):
    """Losses and gradients, bit for bit, with dropout, whose random numbers answering must not take."""
    if lora:
        keys |= {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.3, "lora_target": "all"}
    without = train(keys, tmp_path / "without")
    found = train(keys, tmp_path / "with", eval_generate=COUNT)
    told = [(line["loss"], line["grad_norm"]) for line in found]
    assert told == [(line["loss"], line["grad_norm"]) for line in without] and len(told) == STEPS
    before, after = evaluations(tmp_path / "without"), evaluations(tmp_path / "with")
    assert [line["eval_loss"] for line in before] == [line["eval_loss"] for line in after] and len(after) == 2
    assert {"eval_json", "eval_score", "eval_tags_f1", "eval_exact"} <= after[0].keys() and "eval_score" not in before[
        0
    ]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A model that has learnt to write objects, and the last evaluation of its run."""
    output = tmp_path_factory.mktemp("trained") / "run"
    own = {"dataset": "held", "eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 30, "max_steps": 30}
    own |= {"learning_rate": 5e-3, "mm_projector_lr": None, "vision_tower_lr": None, "warmup_steps": 0}
    own |= {"lr_scheduler_type": "constant", "max_new_tokens": 24, "per_device_eval_batch_size": 2, "eval_generate": 9}
    train({**recipe_keys(folder), **own}, output)
    (last,) = evaluations(output)
    assert last["eval_json"] > 0 and last["eval_score"] > 0
    return output, last


def test_measures_are_those_of_the_saved_model(folder, trained):
    """What the log says at the end is what `VideoModel` answers from the folder, judged."""
    output, last = trained
    model = VideoModel.load(str(output), video_cache=False)
    asked = list(read_questions(folder / "held.json", folder / "media"))
    answers = dict(model.ask_many([each.conversation for each in asked], Decoding(max_new_tokens=24)))
    scored = judge([each.label for each in asked], [answers[i] for i in range(9)])
    for name in ("json", "score", "tags.f1"):
        value = float(scored.figures[name].values([[1.0] * 9])[0])
        assert last[f"eval_{name.replace('.', '_')}"] == pytest.approx(value, abs=1e-5)


def test_the_best_model_is_told_by_a_measure(keys, tmp_path):
    keys |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "eval_score",
        "greater_is_better": True,
    }
    train(keys, tmp_path / "run", eval_generate=COUNT, load_best_model_at_end=True)
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["best_metric"] == max(line["eval_score"] for line in evaluations(tmp_path / "run"))


def test_two_processes_judge_the_same_answers(keys, trained, tmp_path):
    """Of the same weights, since the learning rate is 0: the measures are those of one process."""
    output, last = trained
    keys |= {"model_name_or_path": str(output), "learning_rate": 0.0, "mm_projector_lr": None, "vision_tower_lr": None}
    keys |= {"max_steps": 2, "max_new_tokens": 24}
    run = Run(keys, tmp_path / "two", 2, eval_generate=9, per_device_train_batch_size=1)
    assert run.end() == [0, 0], run.log(0)[-3000:]
    (two,) = evaluations(tmp_path / "two")
    names = [name for name in last if name.startswith("eval_") and not name.endswith(("runtime", "second"))]
    assert len(names) > 4 and [two[name] for name in names] == pytest.approx([last[name] for name in names], abs=1e-4)
    assert len(steps(tmp_path / "two")) == 2


def test_a_damaged_clip_of_the_evaluation_set_is_left_out_or_stops_the_run(keys, folder, tmp_path):
    damage(write_clip(folder / "media/damaged.mp4", frames=12))
    records = json.loads((folder / "held.json").read_text(encoding="utf-8"))
    records[3]["video"] = "damaged.mp4"
    (folder / "hurt.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "hurt": {**info["held"], "file_name": "hurt.json"}}))
    keys |= {"eval_dataset": "hurt", "eval_generate": 9, "max_steps": 2}
    with pytest.raises(DatasetError, match=r"hurt\.json, record 4 .*damaged\.mp4"):
        train(keys, tmp_path / "stops")
    train(keys, tmp_path / "goes on", skip_wrong_records=True, skip_wrong_share=0.2)
    assert len(evaluations(tmp_path / "goes on")) == 1
    assert "record 4 " in (tmp_path / "goes on/left_out_records_evaluation.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_strategy": "no"}, "eval_generate: nothing is evaluated; set eval_strategy"),
        ({"streaming": True}, "it does not go with streaming: true"),
        ({"eval_generate": 0}, "eval_generate must be a whole number above 0; found 0"),
    ],
)
def test_what_does_not_go_together_is_said(keys, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        get_train_args({**keys, "output_dir": str(tmp_path), "eval_generate": 3, **more})
    assert yaml.safe_dump(keys)
