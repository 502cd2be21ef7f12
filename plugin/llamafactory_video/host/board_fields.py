"""LLaMA-Board's fields for video: what they are called in English and Chinese, and the key of a recipe that each stands for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..prompt.shown import FEW_TOKENS
from ..video.contract import EXAMPLE_CLIP
from ..video.dialects import resolve_sampling
from ..video.plan import plan_frames
from ..video.sampling import FramePlan


@dataclass(frozen=True)
class Field:
    """A field of the group "Video", which has the name of its key.

    Attributes:
        kind: what a person enters; "choice" may be left empty where `choices` begins with "".
        en, zh: label and explanation.
    """

    kind: Literal["text", "whole number", "number", "choice", "truth"]
    en: tuple[str, str]
    zh: tuple[str, str]
    choices: tuple[str, ...] = ()


# In the order of the page. LLaMA-Board itself has video_min_pixels and video_max_pixels, and no word on what they count.
VIDEO_FIELDS = {
    "media_dir": Field(
        "text",
        ("Media dir", "Folder that records name clips from. Empty: the data dir."),
        ("媒体目录", "数据中的视频路径相对于此目录。留空则为数据路径。"),
    ),
    "video_sampling": Field(
        "choice",
        ("Sampling dialect", "What the numbers below mean. Empty: as the model was trained, else llamafactory."),
        ("采样方式", "决定下面各项数值的含义。留空则沿用模型训练时的方式，否则为 llamafactory。"),
        ("", "qwen_finetune", "llamafactory", "qwen_vl_utils"),
    ),
    "video_fit": Field(
        "choice",
        ("Records over the cutoff", "error: list them and do not start. shrink: make their clips smaller."),
        ("超出截断长度的数据", "error：列出并停止训练。shrink：缩小其视频。"),
        ("error", "shrink"),
    ),
    "video_cache": Field(
        "truth",
        ("Frame cache", "Keep decoded frames on disk, so that a clip is decoded once."),
        ("帧缓存", "将解码后的帧存于磁盘，每个视频只解码一次。"),
    ),
    "skip_wrong_records": Field(
        "truth",
        ("Leave out wrong records", "Train without records that cannot be used; they are listed."),
        ("跳过错误数据", "不用无法使用的数据训练，并将其列出。"),
    ),
    "video_fps": Field(
        "number",
        ("Frames per second", "Frames to sample per second of a clip."),
        ("每秒帧数", "每秒视频采样的帧数。"),
    ),
    "video_min_frames": Field(
        "whole number",
        ("Least frames", "Least frames of a clip."),
        ("最少帧数", "每个视频最少的帧数。"),
    ),
    "video_max_frames": Field(
        "whole number",
        ("Greatest frames", "Most frames of a clip."),
        ("最多帧数", "每个视频最多的帧数。"),
    ),
    "video_min_pixels": Field(
        "whole number",
        ("Least pixels", "qwen_finetune: of a whole clip, frames × height × width. Others: of one frame."),
        ("最小像素", "qwen_finetune：整个视频的像素（帧数×高×宽）。其他方式：单帧的像素。"),
    ),
    "video_max_pixels": Field(
        "whole number",
        ("Greatest pixels", "qwen_finetune: of a whole clip, frames × height × width. Others: of one frame."),
        ("最大像素", "qwen_finetune：整个视频的像素（帧数×高×宽）。其他方式：单帧的像素。"),
    ),
    "video_total_pixels": Field(
        "whole number",
        ("Greatest pixels of a clip", "Only for qwen_vl_utils."),
        ("整个视频的最大像素", "仅用于 qwen_vl_utils。"),
    ),
    "vision_tower_lr": Field(
        "number",
        ("Vision tower's learning rate", "Empty: the learning rate above. It must not be frozen."),
        ("视觉编码器学习率", "留空则为上面的学习率。需取消其冻结。"),
    ),
    "mm_projector_lr": Field(
        "number",
        ("Projector's learning rate", "Empty: the learning rate above. It must not be frozen."),
        ("投影器学习率", "留空则为上面的学习率。需取消其冻结。"),
    ),
}
STOCK_FIELDS = ("video_min_pixels", "video_max_pixels")  # which LLaMA-Board makes
OWN_FIELDS = tuple(name for name in VIDEO_FIELDS if name not in STOCK_FIELDS)
IMAGE_FIELDS = ("image_min_pixels", "image_max_pixels")
GROUP = {"en": "Video", "zh": "视频"}
FREEZE_FIELDS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
RATE_FIELDS = ("learning_rate", "vision_tower_lr", "mm_projector_lr", *FREEZE_FIELDS)
# What choosing one of our templates fills in with a recipe's values.
FILLED = (*VIDEO_FIELDS, *IMAGE_FIELDS, *RATE_FIELDS, "cutoff_len", "dataset_dir")

# Keys whose fields on the page have another name, or stand in another tab than train.
OTHER_NAMES = {
    "finetuning_type": "top.finetuning_type",
    "template": "top.template",
    "quantization_bit": "top.quantization_bit",
    "quantization_method": "top.quantization_method",
    "rope_scaling": "top.rope_scaling",
    "per_device_train_batch_size": "train.batch_size",
    "neftune_noise_alpha": "train.neftune_alpha",
    "pissa_init": "train.use_pissa",
}
# Those whose fields have their name.
SAME_NAMES = (
    *("dataset_dir", "learning_rate", "num_train_epochs", "max_grad_norm", "cutoff_len", "val_size"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "logging_steps", "save_steps", "warmup_steps", "packing"),
    *("neat_packing", "train_on_prompt", "mask_history", "resize_vocab", "use_llama_pro", "enable_thinking"),
    *("report_to", "lora_rank", "lora_alpha", "lora_dropout", "loraplus_lr_ratio", "create_new_adapter", "use_rslora"),
    *("use_dora", "lora_target", "additional_target", "freeze_trainable_layers", "freeze_trainable_modules"),
    *("freeze_extra_modules", "use_galore", "use_apollo", "use_badam", "use_swanlab"),
    *FREEZE_FIELDS,
    *IMAGE_FIELDS,
    *VIDEO_FIELDS,
)
FIELD_OF = {**{name: f"train.{name}" for name in SAME_NAMES}, **OTHER_NAMES}


def entered(name: str, value: Any) -> Any:
    """What a person entered into a field, as its key takes it; None where nothing is.

    Raises:
        ValueError: naming the field, if it is no number.
    """
    kind = VIDEO_FIELDS[name].kind if name in VIDEO_FIELDS else "whole number"
    if value is None or value == "":
        return None
    if kind not in ("number", "whole number"):
        return value
    try:
        if kind == "number":
            return float(value)
        return math.prod(int(part) for part in str(value).split("*"))  # 256*256, as LLaMA-Board writes pixels
    except ValueError as error:
        label = VIDEO_FIELDS[name].en[0] if name in VIDEO_FIELDS else name
        raise ValueError(f"{label} ({name}): a {kind} is needed; found {value}") from error


def plan_of_example(given: Mapping[str, Any], video_processor: Any) -> FramePlan:
    """What is shown of the example clip.

    Args:
        given: keys of a recipe.
        video_processor: transformers' Qwen3VLVideoProcessor.

    Raises:
        SamplingError: if the keys contradict each other.
    """
    keys = {name: value for name, value in given.items() if value is not None}
    if "video_max_frames" in keys:
        keys["video_maxlen"] = keys["video_max_frames"]
    return plan_frames(EXAMPLE_CLIP, resolve_sampling(keys.get("video_sampling"), keys, video_processor))


def told(plan: FramePlan, lang: str) -> str:
    """What is shown of the example clip, in a line of Markdown, with a warning where that is little."""
    frames, few = len(plan.indices), plan.num_tokens < FEW_TOKENS
    clip = EXAMPLE_CLIP
    if lang == "zh":
        text = (
            f"一段 {clip.duration:g} 秒、{clip.width} × {clip.height}、每秒 {clip.fps:g} 帧的视频：**{frames} 帧 "
            f"{plan.width} × {plan.height}，{plan.num_tokens} 个视觉 token**。"
        )
        warning = f"整个视频不足 {FEW_TOKENS} 个视觉 token，模型几乎看不清内容。请提高最大像素（官方值为 1003520）。"
    else:
        text = (
            f"A clip of {clip.duration:g} s at {clip.width} × {clip.height}, {clip.fps:g} frames/s: **{frames} frames of "
            f"{plan.width} × {plan.height}, {plan.num_tokens} visual tokens**."
        )
        warning = (
            f"Fewer than {FEW_TOKENS} for a whole clip: a model can hardly tell what happens in it. Raise the greatest "
            "pixels (the official value is 1003520)."
        )
    return f"{text}\n\n⚠️ {warning}" if few else text
