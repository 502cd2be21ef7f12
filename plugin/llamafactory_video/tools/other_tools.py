"""What other tools call the settings of a recipe: the official trainer's flags, qwen-vl-utils' and ms-swift's names."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One name of another tool: the recipe's key (None: there is none), its type, and what must be said of it."""

    key: str | None
    type: type
    note: str = ""


_UNSET = "under transformers >= 5 the official code no longer sets it at all, here it holds"
_CLIP_WIDE = f"counts the whole clip (frames x height x width), not one frame; {_UNSET}"
_PER_IMAGE = f"counts one image; {_UNSET}"
_TUNE = "True becomes false and the other way round"
_CUT = "here a longer record is an error and never cut; the official code cuts token ids and not pixels"
_BATCH = "no key: how a batch is laid out does not change the loss"
# In the order in which a recipe lists its keys. Flags that read alike in both are in `_ALIKE`.
COMMAND = {
    "model_name_or_path": Entry("model_name_or_path", str),
    "dataset_use": Entry("dataset", str, "the name must be in dataset_info.json; dataset_dir and media_dir say where"),
    "model_max_length": Entry("cutoff_len", int, _CUT),
    "dataloader_num_workers": Entry("dataloader_num_workers", int),
    "video_fps": Entry("video_fps", float),
    "video_min_frames": Entry("video_min_frames", int),
    "video_max_frames": Entry("video_max_frames", int),
    "video_max_pixels": Entry("video_max_pixels", int, _CLIP_WIDE),
    "video_min_pixels": Entry("video_min_pixels", int, _CLIP_WIDE),
    "max_pixels": Entry("image_max_pixels", int, _PER_IMAGE),
    "min_pixels": Entry("image_min_pixels", int, _PER_IMAGE),
    "lora_enable": Entry("finetuning_type", bool, "True is lora, False is full"),
    "lora_r": Entry("lora_rank", int),
    "lora_alpha": Entry("lora_alpha", int),
    "lora_dropout": Entry("lora_dropout", float),
    "tune_mm_vision": Entry("freeze_vision_tower", bool, _TUNE),
    "tune_mm_mlp": Entry("freeze_multi_modal_projector", bool, _TUNE),
    "tune_mm_llm": Entry("freeze_language_model", bool, _TUNE),
    "warmup_ratio": Entry("warmup_steps", float, "below 1: a share of all steps; one name for both in transformers 5"),
    "gradient_checkpointing": Entry("disable_gradient_checkpointing", bool, _TUNE),
    "deepspeed": Entry("deepspeed", str, "recipes/deepspeed_zero3.json is ZeRO-3 as the official zero3.json is"),
    "data_flatten": Entry("data_flatten", bool),
    "data_packing": Entry(None, bool, f"{_BATCH}; True makes a step of another number of records"),
    "base_interval": Entry(None, int, "the official code does not read it any more"),
}  # fmt: skip
_ALIKE = {
    float: "learning_rate mm_projector_lr vision_tower_lr weight_decay max_grad_norm num_train_epochs",
    int: "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size save_total_limit "
    "max_steps seed",
    bool: "bf16 fp16 tf32 save_only_model overwrite_output_dir do_eval group_by_length remove_unused_columns",
    str: "output_dir run_name report_to logging_steps logging_strategy save_strategy save_steps eval_strategy "
    "eval_steps lr_scheduler_type optim warmup_steps resume_from_checkpoint cache_dir",
}
COMMAND |= {name: Entry(name, kind) for kind, names in _ALIKE.items() for name in names.split()}
# What the official trainer takes where its command is silent.
COMMAND_DEFAULTS = {
    "model_max_length": 512, "video_fps": 2, "video_min_frames": 4, "video_max_frames": 8,
    "video_max_pixels": 1024 * 28 * 28, "video_min_pixels": 256 * 28 * 28, "max_pixels": 576 * 28 * 28,
    "min_pixels": 16 * 28 * 28, "gradient_checkpointing": False,
}  # fmt: skip
TUNE_DEFAULTS = {"tune_mm_vision": False, "tune_mm_mlp": False, "tune_mm_llm": False}
LORA_DEFAULTS = {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
TO_KEY: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["tune_mm_vision", "tune_mm_mlp", "tune_mm_llm", "gradient_checkpointing"], lambda on: not on),
    "lora_enable": lambda on: "lora" if on else "full",
    "deepspeed": lambda path: "recipes/deepspeed_zero3.json" if re.search(r"(^|/)zero3\.json$", str(path)) else path,
}
_NFRAMES = (
    "for this clip alone, an error where it has fewer; for all, give video_min_frames and video_max_frames that number"
)
_TOTAL = "a frame's limit is total_pixels / frames * 2, at most 768 tokens and at least 1.05 * min_pixels"
_RESIZED = "this clip's frame size, in place of the pixel bounds"
MESSAGE = {  # name in a content item -> key of the recipe and of a record's clip
    "fps": Entry("fps", float),
    "nframes": Entry("nframes", int, _NFRAMES),
    "min_frames": Entry("min_frames", int),
    "max_frames": Entry("max_frames", int),
    "min_pixels": Entry("min_pixels", int),
    "max_pixels": Entry("max_pixels", int, "counts one frame"),
    "total_pixels": Entry("total_pixels", int, _TOTAL),
    "resized_height": Entry("resized_height", int, _RESIZED),
    "resized_width": Entry("resized_width", int, _RESIZED),
    "video_start": Entry("start", float),
    "video_end": Entry("end", float),
}  # fmt: skip
RECIPE_WIDE = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
_TOKENS = "tokens of 32 x 32 pixels"
_RENAMED = "pixels; ms-swift turns it into whole tokens, and the variable of that name with TOKEN_NUM wins"
ENVIRONMENT = {
    "FPS": Entry("video_fps", float),
    "FPS_MIN_FRAMES": Entry("video_min_frames", int),
    "FPS_MAX_FRAMES": Entry("video_max_frames", int),
    "VIDEO_MIN_TOKEN_NUM": Entry("video_min_pixels", int, f"{_TOKENS}, of one frame"),
    "VIDEO_MAX_TOKEN_NUM": Entry("video_max_pixels", int, f"{_TOKENS}, of one frame and not of the clip"),
    "IMAGE_MIN_TOKEN_NUM": Entry("image_min_pixels", int, _TOKENS),
    "IMAGE_MAX_TOKEN_NUM": Entry("image_max_pixels", int, _TOKENS),
    "MODEL_SEQ_LEN": Entry("video_total_pixels", float, "tokens; 0.9 of it is a message's total_pixels"),
    "VIDEO_MIN_PIXELS": Entry("video_min_pixels", int, _RENAMED),
    "VIDEO_MAX_PIXELS": Entry("video_max_pixels", int, _RENAMED + "; it counts one frame"),
    "MIN_PIXELS": Entry("image_min_pixels", int, _RENAMED),
    "MAX_PIXELS": Entry("image_max_pixels", int, _RENAMED + "; it counts an image, not a video"),
    "VIDEO_TOTAL_PIXELS": Entry(None, int, "not read by qwen-vl-utils 0.0.14; left out (video_total_pixels)"),
    "NFRAMES": Entry(None, int, "not read for Qwen3-VL; left out. A clip's nframes is such a number"),
    "SPATIAL_MERGE_SIZE": Entry(None, int, "2 is the model's own, and no other fits its weights"),
    "FORCE_QWENVL_VIDEO_READER": Entry(None, str, "no counterpart: clips are read by PyAV alone"),
    "VIDEO_READER_BACKEND": Entry(None, str, "no reader's name counts here: clips are read by PyAV alone"),
    **dict.fromkeys(["FRAME_FACTOR", "IMAGE_FACTOR", "MAX_RATIO"], Entry(None, int, "fixed: 2, 32, 200")),
}  # fmt: skip
NOTES = {
    "lora tune": "the official code ignores it with lora_enable, which freezes all but its adapters",
    "lora": "the official adapters sit on the language model's attention alone",
    "dropout": "the official code takes 0 for not given, and trains with 0.05",
    "share": "a share after % has no counterpart; all records are used (max_samples: a number of them)",
    "lone vision": "the official code ignores it without mm_projector_lr; here it holds, unless you take it out",
    "deepstack": "here the deepstack mergers train with the projector, in the official code with the vision tower",
    "variable": "an environment variable, which the official trainer does not read; left out",
    "unknown": "not a flag of the official trainer that is known here; left out",
    "do_resize": "qwen-vl-utils resizes first: elsewhere tell the processor do_resize=False, or it resizes again; "
    "here that is seen to",
    "frame_rate": "pictures per second, from raw_fps, else sample_fps, else 2; their times follow it",
    "sample_fps": "qwen-vl-utils does not read it for a file and takes 2 without a word; taken as fps",
    "sample_fps beside": "qwen-vl-utils does not read it for a file; left out, since fps or nframes is given",
    "pictures": "not read for a list of frames, all of which are shown; left out",
    "resized": "has no effect beside resized_height and resized_width; left out",
    "lone side": "qwen-vl-utils reads it only with its fellow; left out",
    "768": "above 768 it cannot be said here: a frame has at most 768 tokens",
    "stock": "not given, so as in LLaMA-Factory: pixels count one frame, before a second resize by the processor",
    "denser": "clips shorter than {:g} s are sampled more densely than {:g} frames/s; one with fewer frames than {} "
    "keeps what it has",
    "over": "{} is over the limit of a frame and has no effect: with {} frames the limit is {:.0f}",
    "under": "{} has no effect below 1.05 * VIDEO_MIN_TOKEN_NUM ({}): the limit is {} pixels. For fewer, lower "
    "VIDEO_MIN_TOKEN_NUM too",
    "each frame": "counts each frame here, and the whole clip in the official command: a number copied from there "
    "asks for up to as many times the tokens as there are frames",
}  # fmt: skip
