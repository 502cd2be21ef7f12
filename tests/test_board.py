"""LLaMA-Board's fields and recipes, without a browser (test_board_page.py has one)."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from llamafactory.hparams import get_train_args
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host.board_fields import FIELD_OF, VIDEO_FIELDS, entered, plan_of_example, told
from llamafactory_video.host.board_recipes import cleaned, recipe_text, template_of
from llamafactory_video.host.keys import own_keys
from llamafactory_video.host.known import shipped
from transformers import Qwen3VLVideoProcessor

REPOSITORY = Path(__file__).parents[1]
RECIPES = [file.name for file in shipped("recipes") if "do_train: true" in file.read_text(encoding="utf-8")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to work in, as after `lmf-video init`."""
    for name in ("recipes", "dataset_info"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def board(home, monkeypatch):
    from llamafactory.webui import interface

    engines = []
    engine_of = interface.Engine
    monkeypatch.setattr(interface, "Engine", lambda **keys: engines.append(engine_of(**keys)) or engines[0])
    interface.create_ui()
    return engines[0]


def page(board, **chosen) -> dict:
    """What the page sends: its fields as they are at first, but for those of `top` and `train` that are chosen."""
    fields = {element: getattr(element, "value", None) for element in board.manager.get_elem_list()}
    start = {
        "top__lang": "en",
        "top__model_name": "Custom",
        "top__model_path": "tiny",
        "top__template": "qwen3_vl_video",
    }
    start |= {"train__dataset": ["wzry_example"], "train__dataset_dir": "dataset_info", "train__output_dir": "run"}
    for name, value in (start | chosen).items():
        fields[board.manager.get_elem_by_id(name.replace("__", "."))] = value
    return fields


def previewed(board, fields: dict, do_train: bool = True) -> dict:
    """The recipe that the page shows."""
    (shown,) = list((board.runner.preview_train if do_train else board.runner.preview_eval)(fields))
    (text,) = shown.values()
    assert "```yaml\n" in text, text
    return yaml.safe_load(text.partition("```yaml\n")[2].removesuffix("```"))


# LLaMA-Board's own, whatever the recipe says; and what holds the time of the start.
ITS_OWN = {"trust_remote_code", "ddp_timeout", "logging_dir", "run_name"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_loaded_runs_as_it_stands(board, name):
    if name == "demo.yaml":  # which trains what `make demo` makes
        Path("output/demo/base").mkdir(parents=True)
        Path("output/demo/dataset_info.json").write_text('{"demo_train": {}}')
    loaded = board.runner.load_args("en", f"recipes/{name}")
    fields = page(board) | {element: value for element, value in loaded.items() if element in page(board)}
    ran = previewed(board, fields)
    given = yaml.safe_load(Path("recipes", name).read_text(encoding="utf-8"))
    assert ran["output_dir"] == given["output_dir"] and ran["model_name_or_path"] == given["model_name_or_path"]
    Path("tiny").mkdir(exist_ok=True)
    one, other = (get_train_args(dict(keys)) for keys in (given, ran))
    for wanted, found in zip(one, other, strict=True):
        wanted, found = dataclasses.asdict(wanted), dataclasses.asdict(found)
        different = {key: (wanted[key], found[key]) for key in wanted if wanted[key] != found[key]}
        assert not {k: v for k, v in different.items() if k not in ITS_OWN}


def test_what_is_shown_is_what_is_run_with_every_false(board):
    extra = {"video_cache": True, "compile_layers": False, "gradient_checkpointing": False, "bf16": False}
    fields = page(board, train__video_cache=False, train__extra_args=json.dumps({**extra, "video_fps": 3}))
    shown = previewed(board, fields)
    assert shown["video_cache"] is True and shown["compile_layers"] is False and shown["video_fps"] == 3
    assert "bf16" not in shown and "use_unsloth" not in shown  # which are false unless they are given
    from llamafactory.webui import runner

    args = board.runner._parse_train_args(fields)
    assert yaml.safe_load(Path(runner.save_cmd(args)).read_text(encoding="utf-8")) == shown
    assert previewed(board, page(board, train__video_cache=False))["video_cache"] is False


def test_a_model_that_is_not_listed_has_its_fields_too(board):
    chosen = {f"train__freeze_{name}": False for name in ("vision_tower", "multi_modal_projector", "language_model")}
    chosen |= {
        "train__video_max_pixels": "1003520",
        "train__video_min_pixels": "256*256",
        "train__vision_tower_lr": "2e-6",
    }
    shown = previewed(board, page(board, top__finetuning_type="full", train__media_dir="数据", **chosen))
    assert shown["freeze_vision_tower"] is shown["freeze_multi_modal_projector"] is False
    assert (shown["video_max_pixels"], shown["video_min_pixels"]) == (1003520, 65536)
    assert shown["vision_tower_lr"] == 2e-6 and shown["media_dir"] == "数据"
    # What is left empty is not sent: LLaMA-Board's 256 * 256 would be the budget of a whole clip.
    empty = dict.fromkeys(("train__video_max_pixels", "train__video_min_pixels"), "")
    assert not {"video_max_pixels", "video_min_pixels", "video_fps"} & previewed(board, page(board, **empty)).keys()


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"train__video_fps": "four"}, "Frames per second (video_fps): a number is needed; found four"),
        ({"train__video_max_pixels": "256x256"}, "video_max_pixels): a whole number is needed; found 256x256"),
        ({"train__extra_args": '{"video_sampeling": "pts"}'}, "unknown key video_sampeling; is video_sampling meant?"),
        ({"train__dataset": ["wzyr_example"]}, "no data set wzyr_example in dataset_info"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(board, chosen, told):
    (answer,) = list(board.runner.preview_train(page(board, **chosen)))
    assert told in next(iter(answer.values()))


def test_a_recipe_that_is_wrong_is_not_loaded(board):
    Path("mine.yaml").write_text("template: qwen3_vl_video\nvideo_fpss: 2\n", encoding="utf-8")
    (text,) = board.runner.load_args("en", "mine.yaml").values()
    assert text == "unknown key video_fpss; is video_fps meant?"
    Path("list.yaml").write_text("- a\n", encoding="utf-8")
    assert "lines of `key: value` are needed" in next(iter(board.runner.load_args("en", "list.yaml").values()))


def test_evaluation_has_a_media_dir_and_the_likeliest_answer(board):
    chosen = {"eval__dataset": ["wzry_example"], "eval__dataset_dir": "dataset_info", "eval__output_dir": "run"}
    shown = previewed(board, page(board, **chosen, eval__temperature=0, eval__media_dir="data"), do_train=False)
    assert shown["do_sample"] is False and shown["media_dir"] == "data"
    assert not {"temperature", "top_p", "preprocessing_num_workers"} & shown.keys()
    shown = previewed(board, page(board, **chosen, eval__temperature=0.5), do_train=False)
    assert shown["temperature"] == 0.5 and "do_sample" not in shown


def test_answers_that_are_json_are_judged_by_their_fields(board, tmp_path):
    from llamafactory.webui import runner

    label = json.dumps({"tags": ["凯", "团战"]}, ensure_ascii=False)
    half = json.dumps({"tags": ["凯", "推塔"]}, ensure_ascii=False)
    lines = [
        {"source": f"r{i}", "clips": [f"{i}.mp4"], "label": label, "predict": said}
        for i, said in enumerate((label, half))
    ]
    (tmp_path / "generated_predictions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "all_results.json").write_text('{"predict_bleu-4": 50.0}')
    shown = runner.load_eval_results(str(tmp_path / "all_results.json"))
    assert "tags.f1" in shown and "0.750" in shown and "predict_bleu-4" in shown
    (tmp_path / "all_results.json").write_text('{"eval_loss": 1.0}')  # of a run that generates nothing
    assert "tags.f1" not in runner.load_eval_results(str(tmp_path / "all_results.json"))


def test_extra_arguments_that_stand_over_a_field_are_told(board, monkeypatch):
    from llamafactory.webui import runner

    told = []
    monkeypatch.setattr(runner.gr, "Info", told.append)
    fields = page(
        board, train__extra_args='{"warmup_steps": 0.03, "video_fps": 2, "optim": "sgd"}', train__video_fps="4"
    )
    assert previewed(board, fields)["video_fps"] == 2
    assert told == ["Extra arguments stand over fields: warmup_steps 0.03 (field: 0), video_fps 2 (field: 4)"]


def test_what_recipes_have_written_can_be_chosen(board, home):
    from llamafactory.webui import control

    for name in ("saves/Custom/lora/one/adapter_model.safetensors", "output/wzry_lora/adapter_model.safetensors"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch()
    for name in ("output/demo/tuned", "output/demo/tuned/checkpoint-2"):
        (home / name).mkdir(parents=True)
        (home / name / "model.safetensors.index.json").touch()
    choices = [[c for _, c in control.list_checkpoints("Custom", kind).choices] for kind in ("lora", "full")]
    assert choices == [["one", "output/wzry_lora"], ["output/demo/tuned"]]


def test_models_and_templates_belong_together(board, home):
    from llamafactory.webui import common

    assert common.get_template("Qwen3-VL-4B-Instruct") == "qwen3_vl_video"
    assert common.get_template("Qwen3-VL-30B-A3B-Thinking") == "qwen3_vl_video_thinking"
    assert common.get_template("Qwen2.5-VL-7B-Instruct") == "qwen2_vl"
    save_tiny_model(home / "tiny", hidden_size=32, layers=2, heads=2)
    assert template_of("tiny") == "qwen3_vl_video" and template_of("recipes") is None
    (home / "tiny" / "run.json").write_text('{"recipe": {"template": "qwen3_vl_video_thinking"}}')
    assert template_of("tiny") == "qwen3_vl_video_thinking"
    common.save_config("en", None, "Custom", "tiny")
    assert common.get_template("Custom") == "qwen3_vl_video_thinking"


def test_the_chat_says_why_a_model_cannot_be_loaded(board):
    """As it was: the template that LLaMA-Board chose by itself, and a key of ours."""
    chosen = {"top__template": "qwen3_vl_nothink", "infer__extra_args": '{"video_sampling": "qwen_finetune"}'}
    chosen |= {"infer__infer_backend": "huggingface", "infer__infer_dtype": "auto"}
    *_, last = board.chatter.load_model(page(board, **chosen))
    assert last == "❌ video_sampling works with `template: qwen3_vl_video`; found template qwen3_vl_nothink"
    assert not board.chatter.loaded


def test_the_export_says_why_it_failed(board):
    from llamafactory.webui.components.export import save_model

    keys = (5, "none", "", "cpu", False, "merged", "", "{}")
    *_, last = save_model("en", "Custom", "nothing/here", "lora", ["run"], "qwen3_vl_video", *keys)
    assert last.startswith("❌ no folder saves/Custom/lora/run")


def test_a_budget_that_leaves_little_of_a_clip_is_told():
    processor = Qwen3VLVideoProcessor()
    keys = {"video_sampling": "qwen_finetune", "video_fps": 4.0, "video_min_frames": 16, "video_max_frames": 32}
    plan = plan_of_example({**keys, "video_max_pixels": 1003520, "video_min_pixels": 401408}, processor)
    assert "32 frames of 224 × 128, 448 visual tokens" in told(plan, "en") and "⚠" not in told(plan, "en")
    few = plan_of_example({**keys, "video_max_pixels": 65536, "video_min_pixels": 256}, processor)
    assert "⚠" in told(few, "en") and "⚠" in told(few, "zh") and "个视觉 token" in told(few, "zh")


def test_the_fields_are_keys_and_have_places_on_the_page(board):
    assert set(VIDEO_FIELDS) <= own_keys() | {"media_dir"}
    for where in FIELD_OF.values():
        board.manager.get_elem_by_id(where)
    for lang in ("en", "ru", "zh", "ko", "ja"):
        board.change_lang(lang)
    assert entered("video_max_pixels", "32*768*768") == 32 * 768 * 768 and entered("video_max_pixels", "9") == 9
    assert entered("video_max_pixels", "768*768") == 768 * 768 and entered("video_fps", "") is None
    assert cleaned({"packing": False, "use_dora": False, "plot_loss": None}) == {"packing": False}
    assert "中文" in recipe_text({"media_dir": "中文"})
