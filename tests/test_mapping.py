"""`lmf-video map`: other tools' settings as recipe lines, against the other tools' own code."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import examples, write_clip
from hypothesis import assume, given
from hypothesis import strategies as st
from llamafactory_video.tools import cli
from llamafactory_video.tools import map as mapping
from llamafactory_video.tools.command_line import MappingError
from llamafactory_video.tools.map import read_as_recipe
from llamafactory_video.tools.settings import Mapped, read
from llamafactory_video.video.sampling import ClipInfo
from qwen_vl_utils import vision_process

ROOT = Path(__file__).parents[1]
OFFICIAL = r"""#!/bin/bash
# The official full fine-tuning; don't stop it
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
MASTER_PORT=${MASTER_PORT:-$(shuf -i 20001-29999 -n 1)}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}
deepspeed=./scripts/zero3.json
llm=Qwen/Qwen3-VL-4B-Instruct
lr=2e-5   # of the language model
entry_file=qwenvl/train/train_qwen.py
MAX_PIXELS=602112
args="
    --deepspeed ${deepspeed} \
    --model_name_or_path "${llm}" \
    --dataset_use wzry --data_flatten True --data_packing False \
    --tune_mm_vision True --tune_mm_mlp True --tune_mm_llm True \
    --bf16 \
    --output_dir output/wzry_full \
    --num_train_epochs 20 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 \
    --max_pixels $MAX_PIXELS --min_pixels 100352 \
    --video_fps 4 --video_min_frames 16 --video_max_frames 32 \
    --video_max_pixels=1003520 --video-min-pixels 401408 \
    --save_strategy epoch --save_total_limit 3 \
    --learning_rate ${lr} --mm_projector_lr 4e-5 --vision_tower_lr 2e-6 \
    --weight_decay 0.01 --warmup_ratio 0.03 --max_grad_norm 1.0 --lr_scheduler_type cosine \
    --logging_steps 2 --model_max_length 8192 --gradient_checkpointing True \
    --dataloader_num_workers 4 --report_to tensorboard"

torchrun --nproc_per_node=${NPROC_PER_NODE} --master_port=${MASTER_PORT} \
    ${entry_file} ${args} 2>&1 | tee --append train.log
"""
WORKED = {
    "role": "user",
    "content": [
        {
            "type": "video",
            "video": "王者/荣耀.mp4",
            "fps": 2,
            "total_pixels": 20480 * 32 * 32,
            "min_pixels": 64 * 32 * 32,
            "max_frames": 2048,
        },
        {"type": "text", "text": "请描述这个视频的内容"},
    ],
}


def notes(text: str | dict | list, name: str, **options) -> str:
    """All that is said about a name."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return " | ".join(said for about, said in read_as_recipe(text, **options)["notes"] if about == name)


# --- Against qwen-vl-utils' own code ---------------------------------------------------------------------------------


def fetch(item: dict, info: ClipInfo, **constants) -> tuple[list[int], tuple[int, int]]:
    """Frame numbers and size that qwen-vl-utils chooses for a file of that length and size, by running it."""

    class Decoder:
        def __init__(self, path, **_):
            self.metadata = SimpleNamespace(average_fps=info.fps, num_frames=info.num_frames)

        def get_frames_at(self, indices):
            frames = torch.zeros(1, dtype=torch.uint8).expand(len(indices), 3, info.height, info.width)
            return SimpleNamespace(data=frames)

    package, module = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    module.VideoDecoder = Decoder
    sizes = []

    def resize(video, size, **_):
        if 0 in size:
            raise ValueError("torchvision makes no frame without pixels")
        sizes.append(tuple(size))
        return torch.zeros(1)

    with contextlib.ExitStack() as stack:
        patch = lambda manager: stack.enter_context(manager)  # noqa: E731
        patch(mock.patch.dict(sys.modules, {"torchcodec": package, "torchcodec.decoders": module}))
        patch(mock.patch.object(vision_process, "get_video_reader_backend", lambda: "torchcodec"))
        patch(mock.patch.dict(vision_process.VIDEO_READER_BACKENDS, {"torchvision": None}))
        patch(mock.patch.object(vision_process.transforms.functional, "resize", resize))
        patch(mock.patch.object(vision_process.logger, "warning"))
        for name, value in constants.items():
            patch(mock.patch.object(vision_process, name, value))
        _, metadata = vision_process.fetch_video(item, image_patch_size=16, return_video_metadata=True)
    return metadata["frames_indices"], sizes[0]


def same_as_fetched(mapped: Mapped, clip: dict | None, item: dict, info: ClipInfo, **constants) -> None:
    try:
        expected = fetch(item, info, **constants)
    except (ValueError, AssertionError, TypeError, ZeroDivisionError):  # TypeError: its second reader was taken away
        with pytest.raises(MappingError):
            mapped.plan(info, clip)
        return
    plan = mapped.plan(info, clip)
    assert (list(plan.indices), (plan.height, plan.width)) == expected


clips = st.builds(
    lambda frames, fps, height, width: ClipInfo(frames, fps, frames / fps, height, width),
    st.integers(1, 3000) | st.integers(300, 3000),
    st.sampled_from([1, 10, 23.976, 24, 25, 29.97, 30, 60]) | st.floats(0.5, 240),
    st.integers(32, 2200),
    st.integers(32, 4000),
)
pixels = st.integers(1, 4000).map(lambda tokens: tokens * 300)
frame_settings = st.one_of(
    st.fixed_dictionaries({"nframes": st.integers(1, 300)}),
    st.fixed_dictionaries(
        {},
        optional={"fps": st.floats(0.1, 30), "min_frames": st.integers(1, 60), "max_frames": st.integers(1, 900)},
    ),
)
size_settings = st.fixed_dictionaries(
    {},
    optional={
        "min_pixels": st.integers(1000, 200000),
        "max_pixels": st.integers(130000, 1200000) | pixels,
        "total_pixels": pixels.map(lambda n: n * 20),
    },
) | st.fixed_dictionaries({"resized_height": st.integers(32, 2000), "resized_width": st.integers(32, 2000)})
spans = st.fixed_dictionaries({}, optional={"video_start": st.floats(0, 5), "video_end": st.floats(4, 80)})


@examples(400)
@given(clips, frame_settings, size_settings, spans)
def test_a_message_shows_what_qwen_vl_utils_shows(info, frames, size, span):
    assume(max(info.height, info.width) <= 200 * min(info.height, info.width))
    item = {"type": "video", "video": "clip.mp4", **frames, **size, **span}
    try:
        mapped = read(json.dumps(item))
        mapped.sampling(mapped.clips[0])
    except MappingError:  # bounds that contradict each other, whatever the clip
        with pytest.raises((ValueError, AssertionError, TypeError)):
            fetch(item, info)
        return
    same_as_fetched(mapped, mapped.clips[0], item, info)


@examples(200)
@given(
    clips,
    st.fixed_dictionaries(
        {},
        optional={
            "FPS": st.floats(0.1, 30),
            "FPS_MIN_FRAMES": st.integers(1, 900),
            "FPS_MAX_FRAMES": st.integers(2, 900),
            "VIDEO_MIN_TOKEN_NUM": st.integers(1, 900),
            "VIDEO_MAX_TOKEN_NUM": st.integers(1, 768),
            "MODEL_SEQ_LEN": st.integers(1, 300).map(lambda n: n * 1000),
        },
    ).filter(bool),
)
def test_variables_show_what_patched_qwen_vl_utils_shows(info, variables):
    """ms-swift writes its variables over the constants of that package."""
    assume(max(info.height, info.width) <= 200 * min(info.height, info.width))
    mapped = read("\n".join(f"export {name}={value!r}" for name, value in variables.items()))
    assert mapped.source == "environment"
    same_as_fetched(mapped, None, {"video": "clip.mp4"}, info, **variables)


def test_the_worked_example():
    told = read_as_recipe(json.dumps(WORKED, ensure_ascii=False))
    assert told["result"] == {
        "video_sampling": "qwen_vl_utils",
        "video_fps": 2,
        "video_max_frames": 2048,
        "video_min_pixels": 65536,
        "video_total_pixels": 20971520,
    }
    assert told["clips"] == [{"path": "王者/荣耀.mp4"}]
    (shown,) = told["example"]
    assert (shown["frames"], shown["size"], shown["grid"], shown["tokens"]) == (30, [640, 1152], [15, 40, 72], 10800)
    plan = read(json.dumps(WORKED)).plan(mapping.EXAMPLE)
    assert (plan.indices[:5], plan.indices[-1]) == ((0, 31, 62, 93, 124), 899)
    assert [f"{time:.1f}" for time in plan.timestamps[:3]] == ["0.3", "1.3", "2.3"]
    assert "first times 0.3, 1.3, 2.3 s" in shown["text"]


# --- The official command --------------------------------------------------------------------------------------------


def test_the_official_command_is_the_recipe():
    recipe = yaml.safe_load((ROOT / "recipes" / "wzry_full.yaml").read_text(encoding="utf-8"))
    result = read_as_recipe(OFFICIAL)["result"]
    assert result == {key: recipe[key] for key in result}
    assert recipe.keys() - result.keys() == {"dataset_dir", "media_dir", "plot_loss", "video_cache", "video_fit"}
    assert list(result)[:3] == ["model_name_or_path", "template", "dataset"]
    # What is printed is read back as it is.
    assert yaml.safe_load(mapping.result_text(read_as_recipe(OFFICIAL))) == result


def test_lora():
    told = read_as_recipe(
        "torchrun train_qwen.py --model_name_or_path m --lora_enable True --lora_r 32 --tune_mm_vision True"
    )
    expected = {"finetuning_type": "lora", "lora_rank": 32, "lora_alpha": 128, "lora_dropout": 0.05}
    expected |= {"lora_target": "q_proj,k_proj,v_proj,o_proj", "freeze_vision_tower": True}
    assert told["result"].items() >= expected.items()
    assert "ignores it with lora_enable" in notes(
        "--model_name_or_path m --lora_enable True --tune_mm_vision True", "tune_mm_vision"
    )


def test_what_a_whole_command_leaves_out_is_the_official_default():
    result = read_as_recipe("python qwenvl/train/train_qwen.py --model_name_or_path m --tune_mm_llm True")["result"]
    expected = {"video_max_frames": 8, "cutoff_len": 512, "freeze_vision_tower": True, "freeze_language_model": False}
    assert result.items() >= {**expected, "disable_gradient_checkpointing": True, "image_max_pixels": 451584}.items()
    assert read_as_recipe("--video_fps 4")["result"] == {"video_sampling": "qwen_finetune", "video_fps": 4}
    assert "video_max_frames 8" in notes("--video_fps 4", "flags that are not given")


def test_shell_ways():
    array = 'ARGS=(\n  --video_fps 4\n  --dataset_use "a b")\nARGS+=(--lora_r 8)\npython train_qwen.py "${ARGS[@]}"'
    result = read_as_recipe(array)["result"]
    assert (result["video_fps"], result["dataset"], result["lora_rank"]) == (4, "a b", 8)
    result = read_as_recipe(
        "--max_pixels $((576*28*28)) --min_pixels 16\\*28\\*28 \\  # a remark, isn't it\n --bf16 false"
    )
    assert result["result"].items() >= {"image_max_pixels": 451584, "image_min_pixels": 12544, "bf16": False}.items()
    assert "not set in the text" in notes("--output_dir $HOME/x --video_fps 4", "output_dir")


# --- Traps -----------------------------------------------------------------------------------------------------------

VIDEO = {"type": "video", "video": "clip.mp4"}


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("--video_max_pixels=1003520", "video_max_pixels", "counts the whole clip"),
        ("--video_max_pixels=1003520", "video_max_pixels", "transformers >= 5"),
        ("video_max_pixels: 1003520", "video_max_pixels", "as many times the tokens as there are frames"),
        ("video_max_pixels: 1003520", "video_sampling: qwen_finetune", "visual tokens"),
        ({**VIDEO, "sample_fps": 4}, "sample_fps", "taken as fps"),
        (VIDEO, "do_resize", "do_resize=False"),
        ("--video_fps 4 --video_min_frames 16", "video_min_frames", "shorter than 4 s are sampled more densely"),
        ({**VIDEO, "fps": 4, "min_frames": 16}, "video_min_frames", "keeps what it has"),
        ({**VIDEO, "nframes": 16}, "nframes", "video_min_frames and video_max_frames"),
        ({**VIDEO, "max_pixels": 10**6}, "max_pixels", "no effect: with 30 frames the limit is 786432"),
        ({**VIDEO, "max_pixels": 10**6, "total_pixels": 3000000}, "max_pixels", "the limit is 200000"),
        ({**VIDEO, "max_pixels": 65536}, "example clip", "max_pixels 65536 is below min_pixels 131072"),
        ({**VIDEO, "max_frames": 2}, "min_frames", "4 is above max_frames 2"),
        ({"video": ["a.png", "b.png"], "fps": 4}, "fps", "not read for a list of frames"),
        ({**VIDEO, "resized_height": 64}, "resized_height", "left out"),
        ({**VIDEO, "frames_per_second": 4}, "frames_per_second", "not read by qwen-vl-utils"),
        ("--vision_tower_lr 2e-6", "vision_tower_lr", "ignores it without mm_projector_lr"),
        ("--model_max_length 8192", "model_max_length", "never cut"),
        ("--data_packing True --video_fps 4", "data_packing", "no key"),
        ("--tune_mm_mlp True --tune_mm_vision False", "tune_mm_mlp", "deepstack mergers"),
        ("--lora_enable True --lora_dropout 0", "lora_dropout", "takes 0 for not given"),
        ("--dataset_use wzry%50", "dataset_use", "no counterpart"),
        ("--video_fps 4 --colour red", "colour", "left out"),
        ("FPS=2 python train_qwen.py --video_fps 4", "FPS", "does not read"),
        ("VIDEO_MAX_TOKEN_NUM=128", "VIDEO_MAX_TOKEN_NUM", "no effect below 1.05 * VIDEO_MIN_TOKEN_NUM"),
        ("VIDEO_MAX_TOKEN_NUM=1000", "VIDEO_MAX_TOKEN_NUM", "at most 768"),
        ("VIDEO_MAX_PIXELS=50176 VIDEO_MAX_TOKEN_NUM=500", "VIDEO_MAX_PIXELS", "wins"),
        ("FPS=2 NFRAMES=8", "NFRAMES", "not read for Qwen3-VL"),
        ("FPS=2 VIDEO_TOTAL_PIXELS=8", "VIDEO_TOTAL_PIXELS", "video_total_pixels"),
        ("FPS=2 FORCE_QWENVL_VIDEO_READER=decord", "FORCE_QWENVL_VIDEO_READER", "PyAV"),
        ("FPS=2 swift sft --model m", "model", "a flag of ms-swift"),
    ],
)  # fmt: skip
def test_a_trap_is_named(source, name, said):
    assert said in notes(source, name)


def test_what_cannot_be_shown_is_said_and_mapped_all_the_same():
    told = read_as_recipe("--video_fps 2", info=ClipInfo(10, 5.0, 2.0, 30, 640))
    assert told["result"]["video_fps"] == 2 and told["example"] == []
    assert "at least 32 on each side" in dict(told["notes"])["example clip"]
    told = read_as_recipe(json.dumps(VIDEO), info=ClipInfo(10, 5.0, 2.0, 32, 6500))
    assert "at most 200 times" in dict(told["notes"])["example clip"]


def test_clips_with_settings_of_their_own():
    second = {"video": ["a.png", "b.png"], "sample_fps": 4, "raw_fps": 30, "max_pixels": 200000}
    items = [{**VIDEO, "max_pixels": 200000, "nframes": 8, "video_start": 1, "video_end": 9.5}, second]
    items += [{"type": "image", "image": "a.png", "max_pixels": 4096}, {"type": "text", "text": "?"}]
    told = read_as_recipe(json.dumps([{"role": "user", "content": items}]))
    assert told["result"] == {"video_sampling": "qwen_vl_utils", "video_max_pixels": 200000, "image_max_pixels": 4096}
    assert told["clips"] == [
        {"path": "clip.mp4", "nframes": 8, "start": 1, "end": 9.5},
        {"frames": ["a.png", "b.png"], "frame_rate": 30},
    ]
    assert [shown["frames"] for shown in told["example"]] == [8, 2]
    assert any('"start": 1' in line for line in mapping.remarks(told, mapping.EXAMPLE))


def test_pixels_of_ms_swift_become_whole_tokens():
    keys = read_as_recipe("MAX_PIXELS=602112 VIDEO_MAX_PIXELS=200704 FPS_MAX_FRAMES=16 swift sft --model m")["result"]
    assert keys.items() >= {"image_max_pixels": 588 * 1024, "video_max_pixels": 196 * 1024}.items()
    by_flag = read_as_recipe("swift sft --model_kwargs '{\"fps_max_frames\": 12}'")
    assert by_flag["result"] == {"video_sampling": "qwen_vl_utils", "video_max_frames": 12}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to map"),
        ("hello", "not recognised"),
        ('{"type": "video", "fps": 2*3}', "not JSON: .* in line 1, column"),
        ({**VIDEO, "fps": 2, "nframes": 8}, "both fps and nframes"),
        ({**VIDEO, "fps": "fast"}, "fps is 'fast'; it must be a number"),
        ({**VIDEO, "max_frames": 2.5}, "max_frames is 2.5; it must be a whole number"),
        ({"role": "user", "content": "text"}, "no video and no image"),
        ({"video": []}, "empty list"),
        ("--video_fps 0", "video_fps is 0; it must be above 0"),
        ("--bf16 maybe", "--bf16 is 'maybe'; it must be True or False"),
        ("--output_dir 'x", "not a command line: no closing quotation"),
        ("video_sampling: qwen\nvideo_fps: 2", "video_sampling is qwen; known are"),
        ({**VIDEO, "min_pixels": 9000, "max_pixels": 8000}, "video_min_pixels is 9000 and video_max_pixels 8000"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_explained(text, message):
    with pytest.raises(MappingError, match=message):
        read_as_recipe(text if isinstance(text, str) else json.dumps(text))


# --- The command as a person runs it ---------------------------------------------------------------------------------


def run(capsys, monkeypatch, *words: str) -> tuple[str, str, str | int | None]:
    """What `lmf-video map` prints on each stream, and how it exits."""
    monkeypatch.setattr(sys, "argv", ["lmf-video", "map", *words])
    code = None
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return out, err, code


def test_from_a_file_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "sft.sh"
    file.write_text(OFFICIAL, encoding="utf-8")
    command = [str(Path(sys.executable).parent / "lmf-video"), "map", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == read_as_recipe(OFFICIAL)["result"]  # all else is comments
    assert "# Example clip, 15 s at 60 frames/s, 1280 x 720:" in done.stdout


def test_from_flags_and_standard_input(capsys, monkeypatch, tmp_path):
    out, _, code = run(capsys, monkeypatch, "--", "--video_max_pixels=1003520", "--video_fps", "4")
    assert code is None and yaml.safe_load(out)["video_max_pixels"] == 1003520
    out, _, code = run(capsys, monkeypatch, "--", "FPS_MAX_FRAMES=32", "VIDEO_MAX_TOKEN_NUM=128")
    assert code is None and yaml.safe_load(out)["video_max_frames"] == 32
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: json.dumps(WORKED, ensure_ascii=False)))
    out, _, code = run(capsys, monkeypatch, "-")
    assert code is None and yaml.safe_load(out)["video_total_pixels"] == 20971520 and "10800 visual tokens" in out

    video = write_clip(tmp_path / "clip.mp4", frames=24, fps=6)
    out, _, _ = run(capsys, monkeypatch, "--clip", str(video), "--", "--video_fps", "2")
    assert "# Example clip, 4 s at 6 frames/s, 96 x 64:" in out and "24 frames, counted from its packets" in out
    out, _, _ = run(capsys, monkeypatch, "--json", "--clip", "10s@30,640x480", "--", "--video_fps", "2")
    told = json.loads(out)
    assert told["from"] == "command" and told["example"][0]["frames"] == 20
    assert told["result"] == {"video_sampling": "qwen_finetune", "video_fps": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.sh"], "no file gone.sh"),
        (["--clip", "gone.mp4", "--", "--video_fps", "2"], "--clip gone.mp4: no such file"),
        (["--from", "message", "--", "--video_fps", "2"], "not JSON"),
        (["--", '{"video": "a.mp4", "fps": 2, "nframes": 4}'], "both fps and nframes"),
    ],
)
def test_errors_end_with_one_line(capsys, monkeypatch, words, said):
    out, _, code = run(capsys, monkeypatch, *words)
    # Text as an exit code is printed, and the status is 1.
    assert out == "" and code.startswith("lmf-video: ") and said in code and "\n" not in code
