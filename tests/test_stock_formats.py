"""Data sets of LLaMA-Factory's own formats under our template: its rows, checked before training as ours are."""

import json
import logging

import pytest
from conftest import write_clip
from datasets import Dataset, Features, Image, List, Value
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host.recipe import recipe_data
from llamafactory_video.records.report import DatasetError
from llamafactory_video.tools.cli import check
from PIL import Image as Pillow
from runs import train

USER, GPT = "user", "assistant"
SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "videos": "videos"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": USER, "assistant_tag": GPT},
}


def turns(*texts, first=USER):
    roles = (USER, GPT) if first == USER else (GPT, USER)
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock_formats")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    for i in range(2):
        write_clip(folder / f"media/{i}.mp4", frames=12 + 6 * i, seed=i)
    for i in range(4):
        Pillow.effect_noise((96, 64), 60).convert("RGB").save(folder / f"media/{i}.png")
    return folder


@pytest.fixture
def keys(folder, tmp_path):
    return {
        "model_name_or_path": str(folder / "model"),
        "template": "qwen3_vl_video",
        "dataset_dir": str(tmp_path),
        "media_dir": str(folder / "media"),
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
        "video_cache": False,
        "video_maxlen": 4,
        "stage": "sft",
        "do_train": True,
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }


def write(folder, **sets):
    """Each set is (how it is registered, its records)."""
    info = {}
    for name, (how, records) in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", **how}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def load(keys, **more):
    """What LLaMA-Factory trains on, and its tokenizer."""
    model_args, data_args, training_args, _, _ = get_train_args({**keys, **more})
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
    return data["train_dataset"], module["tokenizer"]


def texts(keys, **more):
    """The texts of all that is trained on, without what lays out the prompt."""
    rows, tokenizer = load(keys, **more)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


ALPACA = {
    "formatting": "alpaca",
    "columns": {"prompt": "ask", "query": "more", "response": "say", "history": "before"},
}
ORDERS = [
    {"messages": turns("问一", "答一")},
    {"messages": turns("嗨", "问二", "答二", first=GPT)},
    {"messages": []},
    {"messages": turns("问四", "答四", "问五")},
    {"messages": [{"role": "system", "content": "说"}, *turns("问六", "答六", "问七", "答七")]},
    {"messages": turns("问八", "答八")},
]


@pytest.mark.parametrize(
    ("how", "records"),
    [
        ({**SHAREGPT, "columns": {"messages": "messages"}}, ORDERS),
        (
            ALPACA,
            [
                {"ask": "问一", "more": "", "say": "答一", "before": [["先问", "先答"]]},
                {"ask": "问二", "more": "再问", "say": None, "before": None},
                {"ask": "问三", "more": "再问", "say": "答三", "before": []},
            ],
        ),
    ],
    ids=["sharegpt", "alpaca"],
)
def test_the_same_rows_are_trained_on_as_in_llamafactory(keys, tmp_path, how, records, caplog):
    write(tmp_path, mine=(how, records))
    said = []
    stock = texts(keys, dataset="mine", template="qwen3_vl_nothink")
    logging.getLogger("llamafactory").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    try:
        ours = texts(keys, dataset="mine")
    finally:
        logging.getLogger("llamafactory").removeHandler(handler)
    assert [text.strip() for text in ours] == [text.strip() for text in stock] and len(ours) < len(records)
    told = [line for line in said if "is left out, as LLaMA-Factory does" in line]
    assert told and "first in" in told[0] and "record 2" in told[0]


def test_frames_clips_with_settings_and_our_own_records_go_together(keys, folder, tmp_path):
    """Lists of frames are clips, as in LLaMA-Factory, and clips may have the settings that ours have."""
    frames = {"messages": turns("<video>\n看图", "答"), "videos": [[f"{i}.png" for i in range(4)]]}
    part = {"messages": turns("<video>\n看段", "答"), "videos": [{"path": "1.mp4", "start": 1.0, "fps": None}]}
    own = {"video": "0.mp4", "messages": turns("<video>\n看片", "答")}
    formats = ("frames", SHAREGPT, [frames]), ("part", SHAREGPT, [part])
    write(
        tmp_path,
        own=({"formatting": "video_conversation"}, [own]),
        **{name: (how, records) for name, how, records in formats},
    )
    data = recipe_data(*recipe(keys, tmp_path, dataset="frames,part,own"))
    wrong, parts, encoder = data.wrong, data.parts, data.encoder
    conversations = [part[0] for part in parts.values()]
    assert not wrong and [len(clip.frames) for (clip,) in (c.videos for c in conversations)] == [4, 0, 0]
    assert conversations[1].videos[0].start == 1.0
    # The newline after a clip is stripped, as it is where the model is asked.
    assert all(text.startswith("<video>看") for ((_, text), _) in (c.messages for c in conversations))
    assert encoder.encode(conversations[0]).clips[0].plan.indices == (0, 1, 2, 3)
    losses = train({**keys, "dataset": "frames,part,own", "finetuning_type": "lora"}, tmp_path / "run")
    assert len(losses) == 1


def recipe(keys, folder, **more):
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({**keys, **more}))
    return file, []


PLAIN = {"messages": turns("<video>问", "答"), "videos": ["0.mp4"]}


@pytest.mark.parametrize(
    ("good", "wrong", "message"),
    [
        (PLAIN, {"videos": ["gone.mp4"]}, 'videos[0]: no file "gone.mp4"'),
        (PLAIN, {"videos": []}, "videos: 0 video(s) and 1 <video> in the turns"),
        (PLAIN, {"messages": turns("<video>问", "<|im_end|>")}, "messages[1].content: holds <|im_end|>"),
        (
            {**PLAIN, "videos": [{"path": "0.mp4", "start": 0.5}]},
            {"videos": [{"path": "0.mp4", "start": -1.0}]},
            "videos[0].start: -1.0; it must be at least 0",
        ),
        ({"messages": turns("文字", "答"), "videos": []}, PLAIN, '"columns": {"videos": …}'),
    ],
    ids=["missing", "count", "token", "setting", "column"],
)
def test_wrong_records_are_listed_before_training(keys, tmp_path, good, wrong, message, capsys):
    columns = {"messages": "messages"} if "columns" in message else SHAREGPT["columns"]
    write(tmp_path, mine=({**SHAREGPT, "columns": columns}, [good, good, {**good, **wrong}, good]))
    with pytest.raises(DatasetError) as error:
        train({**keys, "dataset": "mine"}, tmp_path / "run")
    assert "mine.json, record 3: " in str(error.value) and message in str(error.value)
    assert check(*recipe(keys, tmp_path, dataset="mine")) == 1
    assert message in capsys.readouterr().out
    rows, _ = load(keys, dataset="mine", skip_wrong_records=True, skip_wrong_share=0.25)
    assert len(rows) == 3


def test_what_cannot_be_loaded_is_named(keys, tmp_path):
    pairs = [{"messages": turns("问"), "chosen": turns("好", first=GPT)[0], "rejected": turns("坏", first=GPT)[0]}]
    objects = [{"messages": [turns("问")[0], {"role": GPT, "content": value}]} for value in ({"tags": ["a"]}, "b")]
    write(
        tmp_path,
        ranked=({**SHAREGPT, "ranking": True}, pairs),
        judged=(
            {**SHAREGPT, "columns": {"messages": "messages", "kto_tag": "label"}},
            [{"messages": turns("问", "答"), "label": True}],
        ),
        fields=({"formatting": "sharegpt"}, [{"messages": turns("问", "答")}]),
        objects=(SHAREGPT, objects),
    )
    for name, message in (
        ("ranked", "ranked has chosen and rejected answers .*use LLaMA-Factory's template qwen3_vl with `stage: dpo`"),
        ("judged", "all of its 1 records are left out"),
        ("fields", "fields: .*its records have no field 'conversations'. Name its fields under \"columns\""),
        ("objects", 'objects: .*"formatting": "video_conversation"'),
    ):
        with pytest.raises(DatasetError, match=message):
            load(keys, dataset=name)


def test_pictures_inside_a_hubs_table(keys, folder, tmp_path):
    """A table whose pictures lie in it, as LLaMA-Factory reads it: rows and pictures stay together."""
    pictures = [(folder / f"media/{name}.png").read_bytes() for name in range(4)]
    rows = [
        {"messages": turns(f"<image>问{name}", "答"), "images": [{"bytes": picture, "path": None}]}
        for name, picture in enumerate(pictures)
    ]
    rows[1]["messages"] = rows[1]["messages"][1:]
    roles = List({"role": Value("string"), "content": Value("string")})
    hub = Dataset.from_list(rows, features=Features({"messages": roles, "images": List(Image())}))
    (tmp_path / "hub").mkdir()
    hub.to_parquet(tmp_path / "hub/train.parquet")
    how = {**SHAREGPT, "columns": {"messages": "messages", "images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"hub": {"hf_hub_url": str(tmp_path / "hub"), **how}}))
    data = recipe_data(*recipe(keys, tmp_path, dataset="hub"))
    parts, encoder = data.parts, data.encoder
    conversations = list(parts["hub"])
    assert [c.messages[0][1] for c in conversations] == ["<image>问0", "<image>问2", "<image>问3"]
    shown = [c.images[0].tobytes() for c in conversations]
    assert shown == [Pillow.open(folder / f"media/{name}.png").tobytes() for name in "023"]
    assert encoder.encode(conversations[0]).images
