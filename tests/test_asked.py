"""What the model is really given, by the API's server and by LLaMA-Board, from folders that were trained."""

import base64
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import processes
import pytest
import torch
from conftest import write_clip
from llamafactory.train.tuner import run_exp
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.video.contract import FILE, read_contract
from test_contract import DIALECTS, LORA, assert_same, recipe, shown_in_training, where
from transformers import GenerationMixin

QUESTION = "看"
CLIP = ("video_grid_thw", "pixel_values_videos")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a data set of one clip, and where LLaMA-Board keeps runs: full and LoRA, trained in two dialects."""
    folder = tmp_path_factory.mktemp("asked")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    write_clip(folder / "a.mp4", frames=30, fps=10, size=(96, 128))
    turns = [{"from": "human", "value": f"<video>{QUESTION}"}, {"from": "gpt", "value": "好"}]
    (folder / "shown.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}] * 2))
    info = {"shown": {"file_name": "shown.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for kind, dialect in (("full", "qwen_finetune"), ("lora", "llamafactory")):
        output = folder / "saves/Custom" / kind / "run"
        own = LORA if kind == "lora" else {}
        run_exp(recipe(folder, video_sampling=dialect, output_dir=str(output), **DIALECTS[dialect], **own))
    return folder


def taught(home: Path, kind: str, file: Path) -> dict:
    dialect = {"full": "qwen_finetune", "lora": "llamafactory"}[kind]
    return shown_in_training(home, file, video_sampling=dialect, **DIALECTS[dialect])


def run_folder(home: Path, kind: str) -> Path:
    return home / "saves/Custom" / kind / "run"


# --- The API's server ------------------------------------------------------------------------------------------------

SERVER = """
import sys, torch
from llamafactory.cli import main
from llamafactory_video.model import seen
from llamafactory_video.prompt.pixels import normalise
from transformers import GenerationMixin
kept, generate, lay = sys.argv.pop(), GenerationMixin.generate, seen.lay_vision
given = {}
def lay_and_keep(*args):
    layout, *grids = lay(*args)
    given["pixel_values_videos"] = normalise(layout["patches"], *layout["colour_scale"])
    return layout, *grids
def keep(self, *args, pixel_values_videos, **others):
    tensors = {name: value for name, value in others.items() if isinstance(value, torch.Tensor)}
    torch.save({**tensors, **given}, kept)
    return generate(self, *args, pixel_values_videos=pixel_values_videos, **others)
seen.lay_vision, GenerationMixin.generate = lay_and_keep, keep
main()
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_api_shows_a_clip_as_training_did(home, tmp_path, kind):
    file, kept = tmp_path / "api.yaml", tmp_path / "given.pt"
    keys = {**where(home, run_folder(home, kind), kind), "template": "qwen3_vl_video", "infer_backend": "huggingface"}
    file.write_text(json.dumps({**keys, "max_new_tokens": 2, "do_sample": False, "video_cache": False}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with processes.serving("-c", SERVER, "api", str(file), str(kept), **env) as process:
        clip = base64.b64encode((home / "a.mp4").read_bytes()).decode()
        content = [
            {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}},
            {"type": "text", "text": QUESTION},
        ]
        body = json.dumps({"model": "any", "messages": [{"role": "user", "content": content}]}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        answer = ask(request, process)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert_same(torch.load(kept), taught(home, kind, tmp_path / "taught.yaml"), CLIP)


def ask(request: urllib.request.Request, process) -> dict:
    """The answer of a server that may still be starting."""
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) or not process.is_alive():
                raise
            time.sleep(0.1)


# --- LLaMA-Board -----------------------------------------------------------------------------------------------------


@pytest.fixture
def board(home, monkeypatch):
    """The page's engine, started where the runs are."""
    from llamafactory.webui import interface

    monkeypatch.chdir(home)
    engines = []
    engine_of = interface.Engine
    monkeypatch.setattr(interface, "Engine", lambda **keys: engines.append(engine_of(**keys)) or engines[0])
    interface.create_ui()
    return engines[0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_boards_evaluate_shows_a_clip_as_training_did(home, board, monkeypatch, tmp_path, kind):
    given = []
    generate = GenerationMixin.generate

    def keep(self, *args, **inputs):
        given.append(inputs)
        return generate(self, *args, **inputs)

    monkeypatch.setattr(GenerationMixin, "generate", keep)
    fields = {element: getattr(element, "value", None) for element in board.manager.get_elem_list()}
    chosen = {
        "top.model_name": "Custom",
        "top.model_path": str(home / "model"),
        "top.finetuning_type": kind,
        "top.checkpoint_path": ["run"] if kind == "lora" else "run",
        "top.template": "qwen3_vl_video",
        "eval.dataset_dir": str(home),
        "eval.dataset": ["shown"],
        "eval.batch_size": 1,
        "eval.max_new_tokens": 2,
        "eval.output_dir": f"predicted-{kind}",
    }
    fields |= {board.manager.get_elem_by_id(name): value for name, value in chosen.items()}
    args = board.runner._parse_eval_args(fields)  # what the page's Start button gives to `llamafactory-cli train`
    assert not any("video" in key for key in args)
    run_exp({**args, "use_cpu": True})
    assert len(given) == 2
    for asked in given:
        assert_same(asked, taught(home, kind, tmp_path / "taught.yaml"), CLIP)


def test_the_boards_export_in_shards_carries_how_clips_are_sampled(home, board, tmp_path):
    from llamafactory.webui.components.export import save_model
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "merged"
    model, keys = (
        str(home / "model"),
        (0.0005, "none", "", "cpu", False, str(folder), "", "{}"),
    )  # GB, as the page sends
    said = list(save_model("en", "Custom", model, "lora", ["run"], "qwen3_vl_video", *keys))
    assert "exported" in said[-1]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert read_contract(folder / FILE) == read_contract(run_folder(home, "lora") / FILE)
    AutoModelForImageTextToText.from_pretrained(folder)
    assert_same(
        shown_in_training(home, tmp_path / "a.yaml", model_name_or_path=str(folder)),
        taught(home, "lora", tmp_path / "t.yaml"),
        CLIP,
    )
