"""What was trained is what is used: sampling follows the model's folder, without being told."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_clip
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import get_infer_args, get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.train.tuner import export_model, run_exp
from llamafactory_video.demo.tiny_model import build_processor, save_tiny_model
from llamafactory_video.host.items import Items
from llamafactory_video.host.recipe import recipe_data
from llamafactory_video.video.contract import (
    FILE,
    Contract,
    agreed,
    difference,
    nearest,
    read_contract,
    write_contract,
)
from llamafactory_video.video.dialects import resolve_sampling
from llamafactory_video.video.plan import plan_frames
from llamafactory_video.video.sampling import ClipInfo, Sampling
from PIL import Image
from safetensors.torch import load_file

# Of each dialect: keys of a recipe, none of them the default.
DIALECTS = {
    "qwen_finetune": {
        "video_fps": 3,
        "video_min_frames": 4,
        "video_max_frames": 6,
        "video_min_pixels": 30000,
        "video_max_pixels": 60000,
        "image_min_pixels": 5000,
        "image_max_pixels": 20000,
    },
    "llamafactory": {"video_fps": 3.0, "video_maxlen": 5, "video_max_pixels": 8000, "image_max_pixels": 5000},
    "qwen_vl_utils": {
        "video_fps": 3.0,
        "video_max_frames": 6,
        "video_min_pixels": 4096,
        "video_max_pixels": 9000,
        "image_max_pixels": 9000,
    },
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


# --- The file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_contract_is_read_as_it_was_written(tmp_path, dialect):
    sampling = resolve_sampling(dialect, {"video_fps": 3.5}, build_processor().video_processor, "index")
    contract = Contract(sampling, (4096, 99999))
    write_contract(tmp_path, contract)
    assert read_contract(tmp_path / FILE) == contract
    assert "llamafactory-video samples so" in json.loads((tmp_path / FILE).read_text())["about"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: "no JSON", "Expecting value"),
        (lambda r: {**r, "format": 99}, "its format is 99, and this release reads 1; update the plugin"),
        (lambda r: {**r, "clips": {**r["clips"], "zoom": 2}}, "unknown settings zoom"),
        (lambda r: {k: v for k, v in r.items() if k != "images"}, "'images' is missing"),
        (lambda r: {**r, "clips": {**r["clips"], "fps": -1}}, "video_fps is -1"),
        (lambda r: [], "list indices"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, change, message):
    write_contract(tmp_path, Contract(Sampling(), (1, 2)))
    changed = change(json.loads((tmp_path / FILE).read_text()))
    (tmp_path / FILE).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=rf"video_sampling\.json: .*{message}"):
        read_contract(tmp_path / FILE)


def test_a_difference_is_shown_by_what_it_means_for_a_clip():
    before = Contract(
        Sampling(fps=4, min_frames=16, max_frames=32, min_pixels=401408, max_pixels=1003520), (1024, 4096)
    )
    assert difference(before, before) == ""
    after = Contract(replace(before.clips, fps=2, max_frames=768), before.image_pixels)
    assert difference(before, after) == (
        "fps 4 -> 2, max_frames 32 -> 768. A clip of 10 s at 1280 x 720, 30 frames/s: "
        "32 frames of 224 x 128, 448 visual tokens -> 20 frames of 288 x 160, 450 visual tokens"
    )
    after = Contract(before.clips, (1024, 65536))
    assert "one picture of that size: 2 -> 60 visual tokens" in difference(before, after)


def test_adapters_that_disagree_are_named():
    one, other = Contract(Sampling(), (1024, 4096)), Contract(Sampling(fps=1), (1024, 4096))
    assert agreed([]) is None and agreed([("a", one), ("b", one)]) == ("b", one)
    with pytest.raises(ValueError, match=r"the adapters a and b were trained with different sampling: fps 2\.0 -> 1"):
        agreed([("a", one), ("b", other)])


def test_keys_stand_over_the_folder_and_the_folder_over_the_dialect():
    processor = build_processor().video_processor
    trained = Sampling(
        "llamafactory", fps=5, min_frames=3, max_frames=9, image_bounds=(1000, 2000), timestamps="index"
    )
    resolve = lambda *args: resolve_sampling(*args, trained=trained)  # noqa: E731
    assert resolve(None, {}, processor) == resolve("llamafactory", {}, processor) == trained
    assert resolve(None, {"video_fps": 1.0}, processor) == replace(trained, fps=1.0)
    assert resolve(None, {"video_maxlen": 2}, processor) == replace(trained, max_frames=2, min_frames=2)
    assert resolve(None, {"image_max_pixels": 1500}, processor).image_bounds == (1000, 1500)
    assert resolve(None, {}, processor, "pts").timestamps == "pts"
    # In another dialect the folder's numbers would mean something else.
    assert resolve("qwen_finetune", {}, processor) == replace(
        resolve_sampling("qwen_finetune", {}, processor), timestamps="index"
    )


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and a data set of a clip and a picture."""
    folder = tmp_path_factory.mktemp("contract")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    write_clip(folder / "a.mp4", frames=30, fps=10, size=(96, 128))
    Image.effect_noise((160, 128), 60).convert("RGB").save(folder / "a.png")
    turns = [{"from": "human", "value": "<video><image>看"}, {"from": "gpt", "value": "好"}]
    record = {"video": "a.mp4", "image": "a.png", "conversations": turns}
    (folder / "shown.json").write_text(json.dumps([record] * 2))
    info = {"shown": {"file_name": "shown.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def recipe(home: Path, **keys) -> dict:
    usual = {
        "model_name_or_path": str(home / "model"),
        "template": "qwen3_vl_video",
        "dataset": "shown",
        "dataset_dir": str(home),
        "media_dir": str(home),
        "cache_dir": str(home / "cache"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "max_steps": 1,
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "video_cache": False,
        "report_to": "none",
        "use_cpu": True,
    }
    return {**usual, **keys}


@pytest.fixture(scope="module")
def trained(home):
    """Folders of a run in a dialect, full or LoRA; its merged adapter too, by a recipe without a key of ours."""
    folders = {}

    def train(dialect: str, kind: str) -> Path:
        if (dialect, kind) not in folders:
            output = home / f"{dialect}-{kind}"
            if kind == "merged":
                adapter = train(dialect, "lora")
                export_model(
                    {
                        "model_name_or_path": str(home / "model"),
                        "adapter_name_or_path": str(adapter),
                        "finetuning_type": "lora",
                        "template": "qwen3_vl_video",
                        "export_dir": str(output),
                    }
                )
            else:
                own = LORA if kind == "lora" else {}
                run_exp(recipe(home, video_sampling=dialect, output_dir=str(output), **DIALECTS[dialect], **own))
            folders[dialect, kind] = output
        return folders[dialect, kind]

    return train


def where(home: Path, folder: Path, kind: str) -> dict:
    """Keys by which a folder is loaded."""
    if kind == "lora":
        keys = {"model_name_or_path": str(home / "model"), "adapter_name_or_path": str(folder)}
        return {**keys, "finetuning_type": "lora"}
    return {"model_name_or_path": str(folder)}


def shown_in_training(home, file, **keys) -> dict:
    """Ids, grids, patches of the record as a training or predict recipe shows it, through the collator."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    values = recipe(home, output_dir=str(file.parent / f"{file.stem}-out"), **keys)
    file.write_text(yaml.safe_dump(values))
    data = recipe_data(file, [])
    parts, encoder = data.parts, data.encoder
    item = Items(encoder).item(parts["shown"].table[0])
    data_args = get_train_args(values)[1]
    template = get_template_and_fix_tokenizer(encoder.tokenizer, data_args)
    collate = SFTDataCollatorWith4DAttentionMask(
        template=template, tokenizer=encoder.tokenizer, processor=encoder.processor, label_pad_token_id=-100
    )
    return collate([item])


def shown_in_chat(home, question="<video><image>看", pictures=("a.png",), **keys) -> dict:
    """The same as chat and the API ask for it, but for the answer."""
    model_args, data_args, _, _ = get_infer_args({"template": "qwen3_vl_video", "video_cache": False, **keys})
    module = load_tokenizer(model_args)
    tokenizer, processor = module["tokenizer"], module["processor"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    plugin, images, videos = template.mm_plugin, [str(home / name) for name in pictures], [str(home / "a.mp4")]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    messages = plugin.process_messages(messages, images, videos, [], processor)
    ids, _ = template.encode_oneturn(tokenizer, messages)
    ids, _ = plugin.process_token_ids(list(ids), None, images, videos, [], tokenizer, processor)
    inputs = plugin.get_mm_inputs(images, videos, [], [len(images)], [1], [0], [ids], processor)
    return {"input_ids": torch.tensor([ids]), **inputs}


VISION = ("video_grid_thw", "image_grid_thw", "pixel_values_videos", "pixel_values")


def assert_same(asked: dict, taught: dict, vision: tuple[str, ...] = VISION) -> None:
    prompt = asked["input_ids"].shape[1]
    assert torch.equal(asked["input_ids"], taught["input_ids"][:, :prompt])
    for name in vision:
        assert torch.equal(asked[name], taught[name]), name


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_loaded_samples_as_it_was_trained(home, trained, tmp_path, dialect, kind):
    folder = trained(dialect, kind)
    contract = read_contract(folder / FILE)
    assert contract.clips.dialect == dialect and contract.clips.fps == 3
    for checkpoint in folder.glob("checkpoint-*"):
        assert read_contract(checkpoint / FILE) == contract
    taught = shown_in_training(home, tmp_path / "taught.yaml", video_sampling=dialect, **DIALECTS[dialect])
    keys = where(home, folder, kind)
    assert_same(shown_in_chat(home, **keys), taught)
    assert_same(shown_in_training(home, tmp_path / "again.yaml", **keys), taught)  # trained on, checked, cached
    predict = {"do_train": False, "do_predict": True, "eval_dataset": "shown", "predict_with_generate": True}
    assert_same(shown_in_training(home, tmp_path / "predict.yaml", **{**keys, **predict, "dataset": None}), taught)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_keys_that_differ_are_used_and_said(home, trained, caplog, kind):
    folder = trained("qwen_finetune", kind)
    keys = where(home, folder, kind)
    logging.getLogger("llamafactory").addHandler(caplog.handler)
    try:
        same = shown_in_chat(home, **keys, video_fps=3, video_max_frames=6)
        assert "Sampling differs" not in caplog.text
        other = shown_in_chat(home, **keys, video_fps=1)
    finally:
        logging.getLogger("llamafactory").removeHandler(caplog.handler)
    assert same["video_grid_thw"][0, 0] == 3 and other["video_grid_thw"][0, 0] == 2
    (line,) = [record for record in caplog.records if "Sampling differs" in record.getMessage()]
    assert line.levelname == "WARNING" and f"from how {folder} was trained: fps 3 -> 1. A clip of 10 s" in line.message


def test_an_adapters_folder_wins_over_its_models(home, trained, tmp_path):
    """A model that carries a contract of its own, and an adapter trained on it in another way."""
    base = trained("qwen_finetune", "full")
    adapter = tmp_path / "adapter"
    keys = {"video_sampling": "qwen_finetune", **DIALECTS["qwen_finetune"], "video_max_frames": 4}
    run_exp(recipe(home, model_name_or_path=str(base), output_dir=str(adapter), **LORA, **keys))
    asked = shown_in_chat(
        home, model_name_or_path=str(base), adapter_name_or_path=str(adapter), finetuning_type="lora"
    )
    assert asked["video_grid_thw"][0, 0] == 2
    assert shown_in_chat(home, model_name_or_path=str(base))["video_grid_thw"][0, 0] == 3


def test_a_folder_without_a_contract_is_as_before(home, trained, tmp_path):
    plain = shutil.copytree(trained("llamafactory", "full"), tmp_path / "plain")
    (plain / FILE).unlink()
    model_args = get_infer_args({"template": "qwen3_vl_video", "model_name_or_path": str(plain)})[0]
    sampling = load_tokenizer(model_args)["processor"].clip_reader.sampling
    assert (sampling.dialect, sampling.fps, sampling.max_frames) == ("llamafactory", 2.0, 128)


# --- Plain transformers ----------------------------------------------------------------------------------------------


def lines_of_the_docs(folder: Path, clip: Path) -> str:
    """The docs code for plain transformers, on a folder and a clip of ours."""
    readme = (Path(__file__).parents[1] / "docs" / "use.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from transformers import AutoProcessor\n.*?)```", readme, re.DOTALL)
    for path, there in (("output/wzry_full", folder), ("data/wzry/4/1.mp4", clip)):
        assert path in code
        code = code.replace(path, str(there))
    return code


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_plain_transformers_shows_the_same_by_the_lines_of_the_docs(home, trained, kind):
    folder = trained("qwen_finetune", kind)
    found = {}
    exec(lines_of_the_docs(folder, home / "a.mp4"), found)
    question = found["messages"][0]["content"][1]["text"]
    asked = shown_in_chat(home, question=f"<video>{question}", pictures=(), **where(home, folder, kind))
    for name in ("input_ids", "video_grid_thw", "pixel_values_videos"):
        assert torch.equal(found["inputs"][name], asked[name]), name
    assert found["processor"].video_processor.cap_pixels_per_frame is False


@pytest.mark.thorough
def test_a_newer_transformers_makes_the_same_pixels_and_times(home, trained, tmp_path):
    """5.24, which knows a bound on each frame's pixels; it puts one more pair of marks around a clip, as docs/use.md says."""
    newer = Path(sys.prefix) / "transformers-5.24"
    assert newer.is_dir(), "`make thorough` installs it"
    code = lines_of_the_docs(trained("qwen_finetune", "full"), home / "a.mp4")
    code += (
        "\nimport sys, torch, transformers\ntorch.save({**inputs, 'version': transformers.__version__}, sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(newer), "LLAMAFACTORY_VIDEO_DISABLE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "newer.pt")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "cap_pixels_per_frame" not in run.stderr
    found, own = torch.load(tmp_path / "newer.pt", weights_only=False), {}
    exec(lines_of_the_docs(trained("qwen_finetune", "full"), home / "a.mp4"), own)
    assert found["version"] == "5.24.0"
    for name in ("video_grid_thw", "pixel_values_videos"):
        assert torch.equal(found[name], own["inputs"][name]), name
    decode = own["processor"].tokenizer.decode
    marks = "<|vision_start|>", "<|vision_end|>"
    texts = [decode(ids[0]) for ids in (own["inputs"]["input_ids"], found["input_ids"])]
    begin, end = texts[0].index("<0."), texts[0].rindex(marks[1]) + len(marks[1])
    assert texts[1] == f"{texts[0][:begin]}{marks[0]}{texts[0][begin:end]}{marks[1]}{texts[0][end:]}"


@pytest.mark.parametrize("dialect", ["llamafactory", "qwen_vl_utils"])
def test_a_dialect_that_cannot_be_told_is_written_as_near_as_can_be(home, trained, dialect):
    from transformers import AutoProcessor

    folder = trained(dialect, "full")
    sampling = read_contract(folder / FILE).clips
    near, written = nearest(sampling), AutoProcessor.from_pretrained(folder).video_processor
    assert (written.fps, written.min_frames, written.max_frames) == (3, sampling.min_frames, sampling.max_frames)
    assert (written.size.shortest_edge, written.size.longest_edge) == (near.min_pixels, near.max_pixels)
    info = ClipInfo(300, 30.0, 10.0, 720, 1280)
    ours, theirs = plan_frames(info, sampling), plan_frames(info, near)
    assert ours.indices[::2] == pytest.approx(theirs.indices[::2], abs=2)
    assert theirs.num_tokens == pytest.approx(ours.num_tokens, rel=0.3)


# --- Export ----------------------------------------------------------------------------------------------------------


def test_a_usual_export_carries_all_that_training_had(home, trained, tmp_path):
    """Tokens that were added for training, chat template and generation settings, without a key that names them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tokens = {"add_special_tokens": "<t_0>,<t_1>", "add_tokens": "凯爹", "resize_vocab": True}
    targets = {"additional_target": "embed_tokens,lm_head"}
    run_exp(recipe(home, output_dir=str(adapter), video_sampling="qwen_finetune", **LORA, **tokens, **targets))
    usual = {**where(home, adapter, "lora"), "template": "qwen3_vl_video"}
    export_model({**usual, "export_dir": str(merged)})

    taught, found = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(merged)
    text = "<t_0>凯爹<t_1>"
    assert found(text).input_ids == taught(text).input_ids and len(found(text).input_ids) == 3
    assert found.get_vocab() == taught.get_vocab() and found.all_special_tokens == taught.all_special_tokens
    model_args = get_infer_args(usual)[0]
    assert load_tokenizer(model_args)["tokenizer"](text).input_ids == taught(text).input_ids  # chat with the adapter
    assert AutoProcessor.from_pretrained(merged).chat_template == AutoProcessor.from_pretrained(adapter).chat_template
    settings = [GenerationConfig.from_pretrained(folder).to_dict() for folder in (home / "model", merged)]
    assert settings[0].pop("transformers_version") and settings[1].pop("transformers_version")
    assert settings[0] == settings[1]
    rows = AutoModelForImageTextToText.from_pretrained(merged).get_input_embeddings().weight
    (own,) = (w for n, w in load_file(adapter / "adapter_model.safetensors").items() if "embed_tokens" in n)
    torch.testing.assert_close(rows.float(), own.to(rows.dtype).float()[: len(rows)])
    assert rows.shape[0] >= len(taught) and read_contract(merged / FILE) == read_contract(adapter / FILE)


def test_adapters_with_tokens_at_the_same_places_are_told_apart(home, tmp_path):
    adapters = []
    for name in ("a", "b"):
        adapters.append(str(tmp_path / name))
        keys = {"add_special_tokens": f"<{name}>", "resize_vocab": True, "additional_target": "embed_tokens,lm_head"}
        run_exp(recipe(home, output_dir=adapters[-1], video_sampling="qwen_finetune", **LORA, **keys))
    keys = {"model_name_or_path": str(home / "model"), "adapter_name_or_path": ",".join(adapters)}
    model_args = get_infer_args({**keys, "finetuning_type": "lora", "template": "qwen3_vl_video"})[0]
    with pytest.raises(ValueError, match=r"b was trained with the token <b> at \d+, and here it is at \d+"):
        load_tokenizer(model_args)
