"""`llamafactory-cli export`: folders that plain transformers loads, that answer as before, and that say what they are."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_clip
from llamafactory.train.tuner import export_model, run_exp
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model.asking import how_to_ask
from llamafactory_video.model.loading import load_encoder
from llamafactory_video.train.run_record import read_run_record
from llamafactory_video.video.contract import FILE, read_contract
from processes import JsonHandler, served
from test_contract import DIALECTS, LORA, recipe
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video

KINDS = {
    "full": {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "qlora": {**LORA, "quantization_bit": 4, "quantization_method": "bnb"},
}
KIND = pytest.mark.parametrize(
    "kind",
    ["full", "lora", "dora", pytest.param("qlora", marks=pytest.mark.thorough)],  # bitsandbytes
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    write_clip(folder / "a.mp4", frames=30, fps=10, size=(96, 128))
    turns = [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": "好"}]
    (folder / "shown.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}] * 4))
    info = {"shown": {"file_name": "shown.json", "formatting": "video_conversation"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def trained(home):
    """Folders of runs that changed their weights much."""
    folders = {}

    def train(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = home / kind
            keys = {**DIALECTS["qwen_finetune"], **KINDS[kind], "learning_rate": 0.02, "max_steps": 2}
            run_exp(recipe(home, output_dir=str(folders[kind]), video_sampling="qwen_finetune", **keys))
        return folders[kind]

    return train


def keys_of(home: Path, folder: Path, kind: str) -> dict:
    where = {"model_name_or_path": str(folder)}
    if kind != "full":
        where = {"model_name_or_path": str(home / "model"), "adapter_name_or_path": str(folder)}
    return {**where, "finetuning_type": "full" if kind == "full" else "lora", "template": "qwen3_vl_video"}


def logits(model, processor, clip: Path) -> torch.Tensor:
    """What plain transformers makes of a question about a clip."""
    frames, metadata = load_video(str(clip), backend="pyav")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "看"}]}], add_generation_prompt=True
    )
    inputs = processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def before_export(home: Path, folder: Path, kind: str) -> torch.nn.Module:
    if kind == "full":
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    from peft import PeftModel

    base = AutoModelForImageTextToText.from_pretrained(home / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder)


@KIND
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
def test_an_exported_model_answers_as_before(home, trained, tmp_path, kind, dtype, tolerance):
    folder, out = trained(kind), tmp_path / "merged"
    export_model({**keys_of(home, folder, kind), "export_dir": str(out), "export_size": 0.0001, "infer_dtype": dtype})
    assert len(list(out.glob("model-*.safetensors"))) > 1 and not (out / "Modelfile").exists()
    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype)
    wanted = logits(before_export(home, folder, kind), AutoProcessor.from_pretrained(folder), home / "a.mp4")
    found = logits(model.float(), processor, home / "a.mp4")
    base = AutoModelForImageTextToText.from_pretrained(home / "model", dtype=torch.float32)
    untrained = logits(base, processor, home / "a.mp4")
    scale = wanted.abs().max()
    assert (untrained - wanted).abs().max() / scale > 0.2  # so that a merge that does nothing is seen
    assert (found - wanted).abs().max() / scale < tolerance


@KIND
def test_an_exported_folder_is_whole(home, trained, tmp_path, kind):
    folder, out = trained(kind), tmp_path / "merged"
    export_model({**keys_of(home, folder, kind), "export_dir": str(out)})
    assert read_contract(out / FILE) == read_contract(folder / FILE)
    assert (out / "generation_config.json").is_file() and (out / "chat_template.jinja").is_file()
    record, run = read_run_record(out), read_run_record(folder)
    (export,) = record.pop("exports")
    assert record == run and export["of"] == [folder.name] and export["dtype"] in ("float32", "bfloat16")
    card = (out / "README.md").read_text(encoding="utf-8")
    about = yaml.safe_load(card.split("---")[1])
    assert about["pipeline_tag"] == "video-text-to-text" and "base_model" not in about  # a folder is no name on a hub
    assert "trained on 4 records of `shown`" in card and "### Recipe" in card and f"exported {export['time']}" in card
    assert "3 frames a second, 4 to 6 frames, 30000 to 60000 pixels of the whole clip" in card
    for way in ("lmf-video infer --model merged", "AutoModelForImageTextToText", "vllm serve merged", "sglang"):
        assert way in card
    assert "More information needed" not in card


def test_the_python_of_a_card_runs(home, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "merged"
    export_model({**keys_of(home, trained("lora"), "lora"), "export_dir": str(out)})
    (script,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").symlink_to(home / "a.mp4")
    exec(script.replace("max_new_tokens=512", "max_new_tokens=2").replace("PROMPT", "看"), {})
    assert capsys.readouterr().out


def test_a_trained_folder_says_how_it_is_asked(trained):
    adapter, whole = ((trained(kind) / "README.md").read_text(encoding="utf-8") for kind in ("lora", "full"))
    assert "lmf-video infer --model lora" in adapter and "`llamafactory-cli export` merges it" in adapter
    assert "vllm serve full" in whole and "### Recipe" in whole
    assert yaml.safe_load(adapter.split("---")[1])["library_name"] == "peft"
    for card in (adapter, whole):
        assert "More information needed" not in card and "huggingface.co//" not in card
    assert {"llama-factory", "lora", "llamafactory-video"} <= set(yaml.safe_load(adapter.split("---")[1])["tags"])


def test_a_card_of_ones_own_is_kept(trained, tmp_path):
    from llamafactory_video.train.model_card import add_to_model_card

    (tmp_path / "README.md").write_text("# 我的模型\n\nMy own words.\n", encoding="utf-8")
    record = read_run_record(trained("lora"))
    for _ in range(2):
        add_to_model_card(tmp_path / "README.md", record)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# 我的模型\n\nMy own words.\n") and card.count("### Recipe") == 1


def test_a_folder_without_sampling_says_nothing_of_it(tmp_path):
    assert how_to_ask(tmp_path, "x") == ""


def test_an_export_without_tokenizer_is_an_error(home, trained, tmp_path, monkeypatch):
    """LLaMA-Factory warns, and goes on to "exported"."""
    from transformers import PreTrainedTokenizerBase

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    keys = {**keys_of(home, trained("lora"), "lora"), "export_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"not exported whole: tokenizer\.json, .* could not be written"):
        export_model(keys)


# --- A hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hugging Face Hub: what is created, and the commits that are made."""
    seen = {"created": [], "commits": [], "tokens": set(), "refuses": False}

    class Handler(JsonHandler):
        def do_POST(self):
            body = self.body()
            if self.path.endswith("/validate-yaml"):
                return self.send({"errors": [], "warnings": []})
            seen["tokens"].add(self.headers.get("Authorization"))
            if self.path.endswith("/repos/create"):
                seen["created"].append(json.loads(body)["name"])
                return self.send({"url": f"{address}/me/wzry", "id": "me/wzry"})
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                ways = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files
                ]
                return self.send({"files": ways})
            if "/commit/" in self.path:
                if seen["refuses"]:
                    return self.send({"error": "You don't have the rights to write to me/wzry"}, 403)
                seen["commits"].append([json.loads(line) for line in body.decode().splitlines()])
                return self.send({"commitOid": "0" * 40, "commitUrl": f"{address}/me/wzry/commit/0", "success": True})
            return self.send({"error": self.path}, 404)

        def do_GET(self):
            self.send({"id": "me/wzry", "sha": "0" * 40, "siblings": []})

    from huggingface_hub import constants, hf_api

    with served(Handler) as address:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api, "ENDPOINT", address, raising=False)
        yield seen


def test_an_export_is_pushed_whole_in_one_commit(home, trained, tmp_path, hub):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "notes.docx").write_text("mine")
    pushed = {"export_dir": str(out), "export_hub_model_id": "me/wzry", "hf_hub_token": "hf_secret"}
    export_model({**keys_of(home, trained("lora"), "lora"), **pushed})
    assert hub["created"] == ["wzry"] and hub["tokens"] == {"Bearer hf_secret"}
    (commit,) = hub["commits"]
    files = {line["value"]["path"] for line in commit if line["key"] == "file"}
    assert {"README.md", "run.json", FILE, "config.json", "tokenizer.json", "processor_config.json"} <= files
    assert any(name.endswith(".safetensors") for name in files) and "notes.docx" not in files
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# me/wzry" in card and "vllm serve me/wzry" in card and "hf_secret" not in card


def test_what_a_hub_refuses_is_said(home, trained, tmp_path, hub):
    hub["refuses"] = True
    pushed = {"export_dir": str(tmp_path / "out"), "export_hub_model_id": "me/wzry", "hf_hub_token": "hf_secret"}
    with pytest.raises(ValueError, match="is exported, but could not be pushed to me/wzry: .*403.*rights to write"):
        export_model({**keys_of(home, trained("lora"), "lora"), **pushed})
    assert load_encoder(str(tmp_path / "out"), log=lambda _: None).cutoff_len > 0
