"""vLLM and SGLang: what they are told, and (`make servers`) what their own code then shows a model.

`make servers` installs both, each into an environment of its own, and runs their loaders and processors on the CPU.
"""

import base64
import io
import json
import os
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import SHARED, examples, real_clips, write_clip
from hypothesis import given
from hypothesis import strategies as st
from llamafactory_video import question
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model import loading
from llamafactory_video.model.decoding import Decoding
from llamafactory_video.model.loading import contract_of, load_encoder
from llamafactory_video.model.served import ServedModel, asked_of_server
from llamafactory_video.model.servers import TICKS, bare_template, serving, ticks_of
from llamafactory_video.prompt.pixels import vision_inputs
from PIL import Image
from processes import run

QUESTION = "描述这个视频"
OFFICIAL = {"video_fps": 4.0, "video_min_frames": 16, "video_max_frames": 32}
OFFICIAL |= {"video_min_pixels": 401408, "video_max_pixels": 1003520}
SAMPLINGS = {
    "qwen_finetune": OFFICIAL,
    "llamafactory": {"video_fps": 3.0, "video_max_frames": 10, "video_max_pixels": 20000},
    "qwen_vl_utils": {"video_fps": 2.0, "video_max_frames": 12, "video_max_pixels": 160000},
}


def write_uneven(path: Path) -> Path:
    """A clip of a variable frame rate: slow at first, then fast."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 4 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
            time += 170 if i < 20 else 37
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of small models, each as a run in a dialect leaves it; and clips."""
    folder = tmp_path_factory.mktemp("servers")
    for dialect, keys in SAMPLINGS.items():
        save_tiny_model(folder / dialect, hidden_size=32, layers=2, heads=2)
        encoder = load_encoder(str(folder / dialect), log=lambda _: None, video_sampling=dialect, **keys)
        encoder.processor.save_pretrained(folder / dialect)
    for name, frames, fps, size in (("a", 300, 30, (144, 256)), ("b", 75, 25, (240, 176)), ("c", 30, 15, (96, 128))):
        write_clip(folder / f"{name}.mp4", frames, fps, size)
    write_clip(folder / "short.mp4", 10, 10, (96, 128))
    write_uneven(folder / "uneven.mp4")
    return folder


def encoder_of(home: Path, dialect: str = "qwen_finetune"):
    return load_encoder(str(home / dialect), video_cache=False, log=lambda _: None)


# --- Frames that are sent ---------------------------------------------------------------------------------------------


@examples(300)
@given(st.lists(st.floats(0, 5000), min_size=2, max_size=64).map(sorted))
def test_ticks_tell_the_times_that_training_told(times):
    times = times[: len(times) // 2 * 2]
    ticks = ticks_of(times, 2)
    for first in range(0, len(times), 2):
        # As vLLM's Qwen3VLProcessingInfo._calculate_timestamps computes them.
        theirs = (ticks[first] / TICKS + ticks[first + 1] / TICKS) / 2
        assert f"{theirs:.1f}" == f"{(times[first] + times[first + 1]) / 2:.1f}"


def test_times_at_a_tie_are_told_as_training_told_them():
    times = [i / 30 for i in range(600)]
    ticks = ticks_of(times, 2)
    told = [f"{(ticks[i] / TICKS + ticks[i + 1] / TICKS) / 2:.1f}" for i in range(0, 600, 2)]
    assert told == [f"{(times[i] + times[i + 1]) / 2:.1f}" for i in range(0, 600, 2)]


@pytest.mark.parametrize("dialect", SAMPLINGS)
def test_frames_arrive_as_training_showed_them(home, dialect):
    encoder = encoder_of(home, dialect)
    asked = question(f"<video>{QUESTION}", str(home / "uneven.mp4"))
    _, (clip,) = encoder.load(asked)
    body = asked_of_server(asked, encoder)
    (item, text) = body["messages"][0]["content"]
    kind, _, data = item["video_url"]["url"].partition(",")
    frames = [np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in data.split(",")]
    assert kind == "data:video/jpeg;base64" and text == {"type": "text", "text": QUESTION}
    assert np.array_equal(np.stack(frames), clip.frames)
    told = body["media_io_kwargs"]["video"]
    assert len(told["frames_indices"]) == len(frames) and told["total_num_frames"] > told["frames_indices"][-1]
    assert np.allclose(np.array(told["frames_indices"]) / told["fps"], clip.plan.times, atol=3 / TICKS)
    assert asked_of_server(question(QUESTION), encoder).keys() == {"messages"}
    with pytest.raises(ValueError, match="2 clips in one question: vLLM takes the frames and times of one"):
        asked_of_server(question("<video><video>", [str(home / "a.mp4"), str(home / "b.mp4")]), encoder)


def test_infer_sends_frames(home, openai_server, tmp_path):
    address, asked = openai_server
    address += "/v1"
    words = ["--video", str(home / "a.mp4"), "--prompt", QUESTION, "--out", str(tmp_path / "out.jsonl")]
    told = run("lmf-video", "infer", "--model", address, "--send", "frames", *words)
    assert told.returncode and "--send frames: give --sampled-as FOLDER" in told.stderr
    folder = str(home / "qwen_finetune")
    told = run("lmf-video", "infer", "--model", address, "--send", "frames", "--sampled-as", folder, *words)
    assert told.returncode == 0, told.stderr
    (body,) = asked
    assert len(body["media_io_kwargs"]["video"]["frames_indices"]) == 32
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["answer"] == "好"
    assert list(ServedModel(address).ask_many([question(QUESTION, str(home / "a.mp4"))])) == [(0, "好")]
    assert "media_io_kwargs" not in asked[-1] and "top_k" not in asked[-1] and "repetition_penalty" not in asked[-1]
    drawn = Decoding(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, seed=3, max_new_tokens=5)
    assert list(ServedModel(address).ask_many([question(QUESTION)], drawn)) == [(0, "好")]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.2, "seed": 3, "max_tokens": 5}
    assert wanted.items() <= asked[-1].items()


def test_options_that_no_model_follows_are_refused(home, openai_server):
    address, folder = f"{openai_server[0]}/v1", str(home / "qwen_finetune")
    words = ["infer", "--video", str(home / "a.mp4"), "--prompt", QUESTION, "--out", str(home / "none.jsonl")]
    here, whole = " is for models that are loaded here", ": a server samples whole clips as it was told to"
    for model, extra, message in (
        (folder, ["--send", "frames"], "--send frames is for models behind an address"),
        (address, ["--dtype", "float32"], "--dtype" + here),
        (address, ["--adapter", "x"], "--adapter" + here),
        (address, ["--device", "cpu"], "--device" + here),
        (address, ["--load-in-4bit"], "--load-in-4bit" + here),
        (address, ["--video-min-frames", "4"], "--video-min-frames" + whole),
        (address, ["--sampled-as", folder], "--sampled-as" + whole),
        (address, ["--send", "frames", "--sampled-as", folder, "--dtype", "float32"], "--dtype" + here),
    ):
        told = run("lmf-video", *words, "--model", model, *extra)
        assert told.returncode == 1 and f"lmf-video: {message}" in told.stderr, told.stderr
    record = {
        "video": "a.mp4",
        "conversations": [{"from": "human", "value": "<video>看"}, {"from": "gpt", "value": "好"}],
    }
    (home / "records.json").write_text(json.dumps([record]), encoding="utf-8")
    words = ["lmf-video", "eval", str(home / "records.json"), "--out", str(home / "eval"), "--model", address]
    assert "--video-fps" + whole in run(*words, "--video-fps", "2").stderr
    told = run(*words, "--model", folder, "--video-max-frames", "4", "--max-new-tokens", "4")  # the folder follows it
    assert told.returncode == 0, told.stderr


def test_a_package_that_a_quantized_model_needs_is_named(home, monkeypatch):
    def lacking(*_, **__):
        raise ImportError("compressed_tensors is not installed; `pip install compressed-tensors`")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", lacking)
    with pytest.raises(ValueError, match="qwen_finetune: compressed_tensors is not installed"):
        loading.load_model(str(home / "qwen_finetune"), log=lambda _: None)


# --- What is written beside a model -----------------------------------------------------------------------------------


def test_export_writes_what_a_server_needs(home, openai_server):
    folder = home / "qwen_finetune"
    for name in ("vllm", "sglang"):
        told = run("lmf-video", "export", "--for", name, str(folder))
        assert told.returncode == 0, told.stderr
        assert os.access(folder / f"{name}.sh", os.X_OK)
        subprocess.run(["sh", "-n", folder / f"{name}.sh"], check=True)
        compile((folder / f"{name}_client.py").read_text(encoding="utf-8"), name, "exec")
        template = (folder / f"{name}_chat_template.jinja").read_text(encoding="utf-8")
        assert "<|video_pad|>" in template and "<|vision_start|><|video_pad|>" not in template
        assert "<|vision_start|><|image_pad|><|vision_end|>" in template
    told = run("lmf-video", "export", "--for", "vllm", str(folder))
    assert '{"video": {"fps": 4.0, "min_frames": 16, "max_frames": 32, "num_frames": -1}}' in told.stdout
    assert "variable frame rate" in told.stdout
    # The client, as it stands there, asks the server whose address it is given.
    address, asked = openai_server
    script = (folder / "vllm_client.py").read_text(encoding="utf-8")
    words = ["-c", script, str(home / "a.mp4"), QUESTION, f"{address}/v1"]
    told = run(*words)
    assert told.stdout.strip().splitlines()[-1] == "好" and len(asked[0]["media_io_kwargs"]["video"]) == 6


def test_what_a_server_cannot_do_is_said(home):
    told = serving("vllm", home, contract_of(str(home / "llamafactory"))[1])
    assert (
        "--media-io-kwargs" not in told.command
        and "Sampling as llamafactory does is not known to it" in told.limits[0]
    )
    told = run("lmf-video", "export", "--for", "vllm", str(home))
    assert told.returncode == 1 and "Traceback" not in told.stderr
    (home / "adapter").mkdir(exist_ok=True)
    (home / "adapter" / "adapter_config.json").write_text("{}")
    told = run("lmf-video", "export", "--for", "sglang", str(home / "adapter"))
    assert "holds an adapter; merge it first" in told.stderr


# --- The servers' own code --------------------------------------------------------------------------------------------


def ask(server: str, job: dict, tmp_path: Path) -> list[dict]:
    """What the server's code makes of questions, in its own environment."""
    python = Path(
        os.environ.get(f"{server.upper()}_PYTHON") or Path(__file__).parents[1] / f".venv/{server}/bin/python"
    )
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).parent / "servers" / f"ask_{server}.py"
    subprocess.run([python, script, tmp_path / "job.json", tmp_path / "results.json"], check=True, cwd=tmp_path)
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def prompt_of(encoder) -> str:
    """A question about one clip, by the template that `export` writes."""
    template = bare_template(encoder.tokenizer.chat_template)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}]
    return encoder.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, chat_template=template
    )


def fingerprint(pixels: torch.Tensor) -> list[float]:
    """As the scripts in servers/ take it."""
    pixels = pixels.double()
    return [pixels.sum().item(), pixels.square().sum().item(), *pixels[:: max(1, len(pixels) // 64), 7].tolist()]


def expected(encoder, clip: Path) -> dict:
    sample, clips = encoder.load(question(QUESTION, str(clip)))
    shown = vision_inputs([], clips, encoder.processor, encoder.reader.sampling)
    grid = shown["video_grid_thw"].tolist()
    return {"ids": sample.ids, "video_grid_thw": grid, "pixels": fingerprint(shown["pixel_values_videos"])}


@pytest.mark.servers
def test_vllm_shows_whole_clips_of_a_constant_rate_as_training_did(home, tmp_path):
    encoder, folder = encoder_of(home), home / "qwen_finetune"
    command = list(serving("vllm", folder, contract_of(str(folder))[1]).command)
    media = json.loads(command[command.index("--media-io-kwargs") + 1])
    clips = [home / f"{name}.mp4" for name in ("a", "b", "c", "short")]
    clips += [clip for clip in real_clips() if clip.suffix == ".mp4"]
    questions = [{"clips": [clip.resolve().as_uri()], "images": [], "prompt": prompt_of(encoder)} for clip in clips]
    results = ask("vllm", {"model": str(folder), "media_io_kwargs": media, "questions": questions}, tmp_path)
    for clip, result in zip(clips, results, strict=True):
        wanted = expected(encoder, clip)
        assert (result["ids"], result["video_grid_thw"]) == (wanted["ids"], wanted["video_grid_thw"]), clip
        # OpenCV turns YUV into RGB in its own way.
        assert np.abs(np.array(result["pixels"][2:]) - wanted["pixels"][2:]).max() < 0.1, clip


@pytest.mark.servers
@pytest.mark.parametrize("dialect", SAMPLINGS)
def test_vllm_shows_frames_that_are_sent_as_training_did(home, tmp_path, dialect):
    encoder, folder = encoder_of(home, dialect), home / dialect
    clips = [home / f"{name}.mp4" for name in ("a", "b", "short", "uneven")]
    if dialect == "qwen_finetune" and SHARED.is_dir():
        clips += real_clips()
    questions = []
    for clip in clips:
        body = asked_of_server(question(QUESTION, str(clip)), encoder)
        (item,) = (item for item in body.pop("messages")[0]["content"] if item["type"] == "video_url")
        questions.append({"clips": [item["video_url"]["url"]], "images": [], "prompt": prompt_of(encoder), **body})
    results = ask("vllm", {"model": str(folder), "media_io_kwargs": {}, "questions": questions}, tmp_path)
    for clip, result in zip(clips, results, strict=True):
        wanted = expected(encoder, clip)
        assert (result.get("ids"), result["video_grid_thw"]) == (wanted["ids"], wanted["video_grid_thw"]), clip
        assert result["pixels"] == pytest.approx(wanted["pixels"], rel=1e-6, abs=1e-6), clip


@pytest.mark.servers
def test_sglang_shows_what_the_encoder_made_and_whole_clips_nearly(home, tmp_path):
    encoder, folder = encoder_of(home), home / "qwen_finetune"
    command = list(serving("sglang", folder, contract_of(str(folder))[1]).command)
    config = json.loads(command[command.index("--mm-process-config") + 1])
    clips = [home / f"{name}.mp4" for name in ("a", "b", "short", "uneven")]
    questions = []
    for number, clip in enumerate(clips):
        sample, decoded = encoder.load(question(QUESTION, str(clip)))
        shown = vision_inputs([], decoded, encoder.processor, encoder.reader.sampling)
        shown["input_ids"] = torch.tensor([sample.ids])
        torch.save(dict(shown), tmp_path / f"{number}.pt")
        questions.append({"clips": [], "tensors": str(tmp_path / f"{number}.pt"), "prompt": sample.ids})
    questions += [{"clips": [str(clip)], "prompt": prompt_of(encoder)} for clip in clips]
    results = ask("sglang", {"model": str(folder), "mm_process_config": config, "questions": questions}, tmp_path)
    exact, near = results[: len(clips)], results[len(clips) :]
    for clip, result in zip(clips, exact, strict=True):
        wanted = expected(encoder, clip)
        assert (result.get("ids"), result.get("video_grid_thw")) == (wanted["ids"], wanted["video_grid_thw"]), result
        assert result["pixels"] == pytest.approx(wanted["pixels"], rel=1e-6, abs=1e-6), clip
    # Near: the marks and the number of times are those of training; that all is equal would be news, and the page's to say.
    pad, start = encoder.processor.video_token_id, encoder.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    wanted = expected(encoder, clips[0])
    assert near[0]["ids"].count(start) == wanted["ids"].count(start)
    assert near[0]["ids"].count(pad) == pytest.approx(wanted["ids"].count(pad), rel=0.2)
    assert [n["ids"] for n in near] != [expected(encoder, clip)["ids"] for clip in clips]
