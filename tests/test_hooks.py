"""The plugin inside LLaMA-Factory: loading, switching off, and its data path."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_clip
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host import core, places

PACKAGE = Path(importlib.util.find_spec("llamafactory").submodule_search_locations[0])


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_importing_torch_costs_next_to_nothing():
    """What the entry point adds to `import torch`: a compiled import and one list insertion, best of five."""
    code = """
import torch, sys, time
times = []
for _ in range(5):
    for name in [n for n in sys.modules if n.startswith("llamafactory_video")]:
        del sys.modules[name]
    start = time.perf_counter()
    from llamafactory_video import _autoload
    _autoload()
    times.append(time.perf_counter() - start)
assert not any(n.startswith(("llamafactory.", "llamafactory_video.")) for n in sys.modules)
print(min(times))
"""
    assert float(python(code).stdout) < 0.005


@pytest.mark.thorough
def test_loading_and_switching_off():
    """The commands of test_cli.py load it, and the next test begins without it."""
    code = """
import torch
from llamafactory.data.template import TEMPLATES
print("qwen3_vl_video" in TEMPLATES, "qwen3_vl_video_thinking" in TEMPLATES)
"""
    assert python(code).stdout.strip() == "True True"
    assert python(code, LLAMAFACTORY_VIDEO_DISABLE="1").stdout.strip() == "False False"


def test_register_after_llamafactory_was_imported():
    """As in a notebook: names that other modules have imported already are replaced there too."""
    code = """
import llamafactory.train.tuner, llamafactory.chat.chat_model
import llamafactory.chat.hf_engine, llamafactory.api.app, llamafactory.webui.interface
from llamafactory.data.template import TEMPLATES
assert "qwen3_vl_video" not in TEMPLATES
import os; del os.environ["LLAMAFACTORY_VIDEO_DISABLE"]
import llamafactory_video
llamafactory_video.register(); llamafactory_video.register()
assert "qwen3_vl_video" in TEMPLATES
from llamafactory_video.host import places
import llamafactory.train.sft.workflow as workflow, llamafactory.model.loader as loader
import llamafactory.train.sft.trainer as trainer, llamafactory.data.loader as data
ours = [workflow.SFTDataCollatorWith4DAttentionMask, loader.patch_processor, trainer.create_custom_optimizer,
        data._load_single_dataset, data.PackedSupervisedDatasetProcessor]
assert all(f.__module__.startswith("llamafactory_video.host.") for f in ours), ours
assert set(places.TABLE) <= places.installed
print("done")
"""
    run = python(code, LLAMAFACTORY_VIDEO_DISABLE="1")
    assert run.stdout.strip().endswith("done"), run.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("train/trainer_utils.py", "def create_custom_optimizer", "def make_optimizer", "create_custom_optimizer"),
        ("data/loader.py", "dataset_attr", "attributes", r"_load_single_dataset\(dataset_attr=…\)"),
        ("train/sft/trainer.py", "def save_predictions", "def write", "CustomSeq2SeqTrainer.save_predictions"),
        ("data/mm_plugin.py", "def process_token_ids", "def expand", "BasePlugin.process_token_ids"),
        ("model/model_utils/visual.py", 'model_type="qwen3_vl"', 'model_type="other"', 'model_type="qwen3_vl"'),
        ("chat/chat_model.py", None, None, "chat_model.run_chat"),
    ],
)
def test_a_missing_place_is_named(tmp_path, file, old, new, named):
    copy = shutil.copytree(PACKAGE, tmp_path / "llamafactory", ignore=shutil.ignore_patterns("v1", "__pycache__"))
    if old:
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    else:
        (copy / file).unlink()
    with pytest.raises(core.UnsupportedLlamaFactory, match=named) as error:
        places.check_places(copy)
    assert "works with LLaMA-Factory 0.9.5" in str(error.value)


def test_with_a_missing_place_nothing_is_installed(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "llamafactory", ignore=shutil.ignore_patterns("v1", "__pycache__"))
    (copy / "chat" / "chat_model.py").unlink()
    run = python("import torch, llamafactory.data.mm_plugin", PYTHONPATH=str(tmp_path))
    assert run.returncode and "UnsupportedLlamaFactory" in run.stderr


# --- The data path ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, clips, and data sets of several formats."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model")
    for i in range(3):
        write_clip(folder / f"{i}.mp4", seed=i)
    answers = [{"标签": ["凯"]}, {"分数": 1.50}, "文字", ["甲", {"乙": None}], {"标签": "x"}, {"深": {"更深": 1e3}}]
    clips = [
        {
            "video": f"{i % 3}.mp4",
            "conversations": [{"from": "human", "value": "<video>\n描述"}, {"from": "gpt", "value": answer}],
        }
        for i, answer in enumerate(answers)
    ]
    (folder / "clips.json").write_text(json.dumps(clips, ensure_ascii=False), encoding="utf-8")
    alpaca = [{"instruction": f"问{i}", "input": "", "output": f"答{i}"} for i in range(4)]
    (folder / "texts.json").write_text(json.dumps(alpaca, ensure_ascii=False), encoding="utf-8")
    calls = [{"function": {"name": "seek", "arguments": {}}}] * 2
    tools = [
        {"role": "user", "content": "找"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "甲"},
        {"role": "tool", "content": "乙"},
        {"role": "assistant", "content": "在"},
    ]
    (folder / "tools.json").write_text(json.dumps([{"messages": tools}]))
    (folder / "hub").mkdir()
    texts = [
        {**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": "文"}]} for record in clips
    ]
    (folder / "hub" / "train.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (folder / "objects").mkdir()
    (folder / "objects" / "train.jsonl").write_text("\n".join(map(json.dumps, [clips[0], clips[1]])))
    info = {
        "tools": {"file_name": "tools.json", "formatting": "video_conversation"},
        "hub": {"hf_hub_url": str(folder / "hub"), "formatting": "video_conversation"},
        "objects": {"hf_hub_url": str(folder / "objects"), "formatting": "video_conversation"},
        "clips": {"file_name": "clips.json", "formatting": "video_conversation"},
        "few": {"file_name": "clips.json", "formatting": "video_conversation", "num_samples": 2},
        "many": {"file_name": "clips.json", "formatting": "video_conversation", "num_samples": 9},
        "texts": {"file_name": "texts.json"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def dataset(home, tmp_path, **keys):
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    recipe = {
        "model_name_or_path": str(home / "model"),
        "template": "qwen3_vl_video",
        "dataset": "clips",
        "dataset_dir": str(home),
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
        "stage": "sft",
        "video_sampling": "qwen_finetune",
        "cache_dir": str(tmp_path / "cache"),
        "report_to": "none",
        **keys,
    }
    model_args, data_args, training_args, _, _ = get_train_args(recipe)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return get_dataset(template, model_args, data_args, training_args, stage="sft", **module), module, template


def said(module, sample):
    return module["tokenizer"].decode([label for label in sample["labels"] if label >= 0])


def test_records_with_different_answers_stay_themselves(home, tmp_path):
    data, module, _ = dataset(home, tmp_path)
    samples = [data["train_dataset"][i] for i in range(6)]
    assert [said(module, s) for s in samples] == [
        '{"标签": ["凯"]}<|im_end|>\n',
        '{"分数": 1.5}<|im_end|>\n',
        "文字<|im_end|>\n",
        '["甲", {"乙": null}]<|im_end|>\n',
        '{"标签": "x"}<|im_end|>\n',
        '{"深": {"更深": 1000.0}}<|im_end|>\n',
    ]


def test_the_batch_holds_a_feature_for_every_visual_token(home, tmp_path):
    """Through LLaMA-Factory's collator, mixed with a text-only batch, which gets a hidden picture."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask
    from transformers import AutoModelForImageTextToText

    data, module, template = dataset(home, tmp_path, dataset="clips,texts")
    model = AutoModelForImageTextToText.from_pretrained(home / "model")
    collator = SFTDataCollatorWith4DAttentionMask(
        template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=-100, **module
    )
    train = data["train_dataset"]
    assert len(train) == 10
    for chosen in ([0, 1, 2], [5, 6], [7, 8]):
        batch = collator([train[i] for i in chosen])
        for kind, token in (
            ("image", module["processor"].image_token_id),
            ("video", module["processor"].video_token_id),
        ):
            grids = batch.get(f"{kind}_grid_thw")
            features = 0 if grids is None else int(grids.prod(-1).sum()) // 4
            assert features == int((batch["input_ids"] == token).sum())
        assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
        assert model(**batch).loss.isfinite()


def test_settings_of_llamafactory_on_data(home, tmp_path):
    def lengths(**keys):
        data, _, _ = dataset(home, tmp_path, **keys)
        return {name: len(part) for name, part in data.items()}

    assert lengths(max_samples=3) == {"train_dataset": 3}
    assert lengths(val_size=0.5) == {"train_dataset": 3, "eval_dataset": 3}
    assert lengths(eval_dataset="clips", max_samples=4) == {"train_dataset": 4, "eval_dataset": 4}
    assert lengths(dataset="few") == {"train_dataset": 2}
    assert lengths(dataset="many") == {"train_dataset": 9}
    assert lengths(preprocessing_num_workers=2, dataset="clips,texts") == {"train_dataset": 10}
    assert lengths(mix_strategy="interleave_over", dataset="clips,texts")["train_dataset"] >= 10


def test_streaming(home, tmp_path):
    data, module, _ = dataset(home, tmp_path, streaming=True, max_steps=2, buffer_size=1)
    samples = list(data["train_dataset"])
    assert len(samples) == 6
    assert said(module, samples[0]) == '{"标签": ["凯"]}<|im_end|>\n'


def test_neat_packing_packs_what_we_encode(home, tmp_path):
    """Every sample whole, tool conversations with two results too, and each attends to itself alone."""
    alone, _, _ = dataset(home, tmp_path, dataset="clips,tools")
    samples = [alone["train_dataset"][i] for i in range(7)]
    cutoff = sum(len(sample["input_ids"]) for sample in samples) + 1
    data, _, _ = dataset(home, tmp_path, dataset="clips,tools", neat_packing=True, cutoff_len=cutoff)
    (packed,) = data["train_dataset"]
    bounds = packed["packing_params"]["sequence_boundaries"]
    spans = list(itertools.pairwise(bounds[:-1]))
    key = ("input_ids", "labels")
    assert sorted([packed[k][a:b] for k in key] for a, b in spans) == sorted([s[k] for k in key] for s in samples)
    for number, (a, b) in enumerate(spans, start=1):
        assert set(packed["attention_mask"][a:b]) == {number}


def test_too_long_is_said_and_never_cut(home, tmp_path):
    from llamafactory_video.records.report import DatasetError

    with pytest.raises(
        DatasetError, match=r"clips.json, record 1 \(line \d+\): \d+ tokens, \d+ of them visual, are more than cutoff"
    ):
        dataset(home, tmp_path, cutoff_len=16)
    with pytest.raises(DatasetError, match="more than cutoff"):
        dataset(home, tmp_path, cutoff_len=16, neat_packing=True)


@pytest.mark.parametrize("keys", [{}, {"neat_packing": True}, {"streaming": True, "max_steps": 2}], ids=str)
def test_what_is_shrunk_is_told_in_every_mode(home, tmp_path, keys):
    from llamafactory_video.records.report import DatasetError

    keys = {"cutoff_len": 90, "video_min_pixels": 131072, "video_max_pixels": 262144, **keys}
    with pytest.raises(DatasetError, match="training: 6 of 6 records cannot be used"):
        dataset(home, tmp_path, **keys)
    data, _, _ = dataset(home, tmp_path, video_fit="shrink", **keys)
    report = (tmp_path / "out" / "shrunk_records_training.txt").read_text(encoding="utf-8")
    assert len(report.splitlines()) == 6
    assert not (tmp_path / "out" / "too_long_records_training.txt").exists()
    assert all(len(sample["input_ids"]) <= 91 for sample in data["train_dataset"])


def collator(module, template):
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    return SFTDataCollatorWith4DAttentionMask(
        template=template, pad_to_multiple_of=8, label_pad_token_id=-100, block_diag_attn=True, **module
    )


def test_packed_prompts_and_pixels_agree_or_stop(home, tmp_path):
    """A clip replaced after its prompt was made, by one of as many tokens and other times."""
    media = tmp_path / "media"
    media.mkdir()
    for clip in home.glob("*.mp4"):
        write_clip(media / clip.name)
    keys = {"neat_packing": True, "media_dir": str(media), "cutoff_len": 90}
    data, module, template = dataset(home, tmp_path, **keys)
    packed = list(data["train_dataset"])
    assert collator(module, template)([dict(packed[0])])["video_grid_thw"].numel()
    for clip in media.glob("*.mp4"):
        write_clip(clip, frames=24, fps=2)
    with pytest.raises(ValueError, match="was replaced or found damaged after its prompt was built"):
        collator(module, template)([dict(packed[0])])


def test_lengths_are_asked_for_without_decoding(home, tmp_path, monkeypatch):
    """As `group_by_length` and the saving of predictions do."""
    from llamafactory_video.video import reader as clip_module

    decoded = []
    decode = clip_module.decode_frames
    monkeypatch.setattr(clip_module, "decode_frames", lambda *args: decoded.append(args) or decode(*args))
    data, module, template = dataset(home, tmp_path, video_cache=False)
    items = [data["train_dataset"][i] for i in range(6)]
    assert all(item["input_ids"] for item in items)
    assert not decoded
    batch = collator(module, template)(items[:2])
    assert decoded and len(batch["video_grid_thw"]) == len(decoded)


def test_other_templates_have_no_cache(home, tmp_path, capfd):
    with pytest.raises(ValueError, match="video_cache_dir works with `template: qwen3_vl_video`"):
        dataset(home, tmp_path, template="qwen3_vl", video_sampling=None, video_cache_dir="x", dataset="texts")
    _, module, _ = dataset(home, tmp_path, template="qwen3_vl", video_sampling=None, dataset="texts")
    assert not hasattr(module["processor"], "clip_reader")
    assert "Frame cache" not in capfd.readouterr().out


def test_a_cache_that_cannot_be_used_stops_nothing(home, tmp_path):
    (tmp_path / "file").touch()
    data, _, _ = dataset(home, tmp_path, video_cache_dir=str(tmp_path / "file" / "cache"))
    assert data["train_dataset"][0]["load"]()["videos"]


def test_answers_in_lines(home, tmp_path):
    data, module, _ = dataset(home, tmp_path, answer_json_indent=2)
    assert said(module, data["train_dataset"][0]) == '{\n  "标签": [\n    "凯"\n  ]\n}<|im_end|>\n'


def test_supervision_switches(home, tmp_path):
    plain, module, _ = dataset(home, tmp_path)
    prompt, _, _ = dataset(home, tmp_path, train_on_prompt=True)
    plain, prompt = plain["train_dataset"][0], prompt["train_dataset"][0]
    assert plain["input_ids"] == prompt["input_ids"]
    text = [token for token in prompt["input_ids"] if token != module["processor"].video_token_id]
    assert [label for label in prompt["labels"] if label >= 0] == text[1:]  # nothing stands before the first
    turns, _, _ = dataset(home, tmp_path, dataset="tools")
    last, _, _ = dataset(home, tmp_path, dataset="tools", mask_history=True)
    assert "tool_call" in said(module, turns["train_dataset"][0])
    assert said(module, last["train_dataset"][0]) == "在<|im_end|>\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"packing": True}, "neat_packing: true"),
        ({"split_special_tokens": True}, "split_special_tokens takes the marks of clips"),
        ({"use_asft_loss": True}, "LLaMA-Factory shows no clips; use_dft_loss needs none"),
        ({"max_samples": 0}, "the data set is empty"),
        ({"tokenized_path": "x"}, "tokenized_path is not supported"),
        ({"template": "qwen3_vl"}, "video_sampling works with `template: qwen3_vl_video`"),
        (
            {"loss_normalization": "token"},
            'loss_normalization must be one of tokens, micro_batches; found the text "token"',
        ),
        ({"gradient_check": "no"}, 'gradient_check must be one of error, warn, off; found the text "no"'),
        ({"video_max_frames": 8, "video_maxlen": 9}, "two names for one setting"),
        ({"video_max_frames": 8, "video_min_frames": 9}, "video_min_frames is 9 and video_max_frames 8"),
        ({"image_max_pixels": 100}, "image_min_pixels is 65536 and image_max_pixels 100"),
        ({"template": "qwen3_vl_video_thinking"}, "is `template: qwen3_vl_video` meant"),
    ],
)
def test_settings_that_cannot_work_are_refused(home, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        dataset(home, tmp_path, **keys)


def test_llamafactorys_defaults_keep_their_meaning(home, tmp_path):
    """Without video_sampling, keys mean what they mean in LLaMA-Factory: pixels of one frame, 128 frames at most."""
    _, module, _ = dataset(home, tmp_path, video_sampling="llamafactory")
    sampling = module["processor"].clip_reader.sampling
    assert (sampling.fps, sampling.max_frames, sampling.min_pixels, sampling.max_pixels) == (2.0, 128, 256, 65536)
    _, module, _ = dataset(home, tmp_path, video_max_frames=32, video_min_pixels=401408)
    sampling, video = module["processor"].clip_reader.sampling, module["processor"].video_processor
    assert (sampling.fps, sampling.min_frames, sampling.max_frames) == (2, 4, 32)
    assert (video.size.shortest_edge, video.max_frames) == (401408, 32)


def test_nothing_is_tokenized_ahead(home, tmp_path, monkeypatch):
    """A million records would start at once: only the example that is printed is encoded."""
    from llamafactory_video.prompt.encoder import Encoder

    encoded = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, row: encoded.append(row) or encode(self, row))
    data, _, _ = dataset(home, tmp_path, cutoff_len=100000)
    assert len(encoded) == 1
    data["train_dataset"][5]
    assert len(encoded) == 2


def test_data_sets_from_a_hub(home, tmp_path):
    """A local folder stands for the hub: LLaMA-Factory loads both through datasets.load_dataset."""
    from llamafactory_video.records.report import DatasetError

    data, module, _ = dataset(home, tmp_path, dataset="hub,clips")
    assert len(data["train_dataset"]) == 12
    assert said(module, data["train_dataset"][0]) == "文<|im_end|>\n"
    with pytest.raises(DatasetError, match="objects: a hub's loader .* download the files and register them"):
        dataset(home, tmp_path, dataset="objects")


def test_what_is_wrong_with_all_data_sets_is_said_at_once(home, tmp_path):
    from llamafactory_video.records.report import DatasetError

    info = json.loads((home / "dataset_info.json").read_text())
    for name in ("one", "two"):
        (home / f"{name}.json").write_text(json.dumps([{"video": f"{name}.mp4"}]))
        info[name] = {"file_name": f"{name}.json", "formatting": "video_conversation"}
    (home / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError) as error:
        dataset(home, tmp_path, dataset="one,clips", eval_dataset="two")
    assert "one.json: 1 of 1" in str(error.value) and "two.json: 1 of 1" in str(error.value)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "wrong_records_one.txt",
        "wrong_records_two.txt",
    ]


def test_texts_about_tags_and_odd_inputs_in_chat(home, tmp_path):
    from llamafactory_video.prompt.tokens import TemplateError

    _, module, template = dataset(home, tmp_path)
    processor, plugin = module["processor"], template.mm_plugin
    asked = [{"role": "user", "content": "what does <video> mean in HTML?"}]
    with pytest.raises(TemplateError, match="1 <video> in the messages and 0 given"):  # as a record is refused
        plugin.process_messages(asked, [], [], [], processor)
    history = [
        {"role": "user", "content": "<video>?"},
        {"role": "assistant", "content": "use the <video> tag"},
        {"role": "user", "content": "why"},
    ]
    for videos in ([str(home / "0.mp4")], (str(home / "0.mp4"),), [home / "0.mp4"]):
        placed = plugin.process_messages(history, [], videos, [], processor)
        assert placed[1]["content"] == "use the <video> tag" and "seconds>" in placed[0]["content"]
    with pytest.raises(TemplateError, match="1 <video> in the messages and 2 given"):
        plugin.process_messages(history, [], [str(home / "0.mp4")] * 2, [], processor)
    with pytest.raises(ValueError, match="a int is no video"):
        plugin.process_messages(history, [], [7], [], processor)
