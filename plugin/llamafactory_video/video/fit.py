"""Smaller clips for records that are too long, and the most tokens that a clip can take."""

import functools
import math

from .sampling import FramePlan, Sampling
from .sizes import _LLAMAFACTORY_MIN_SIDE, _UTILS_FRAME_TOKENS, _UTILS_IMAGE_TOKENS, utils_frame_bounds

_TIME_TOKENS = 16  # <1234.5 seconds> and the marks around the pads take fewer
# The ways in which `shrink` makes a clip smaller, in this order.
SHRINK_STAGES = 4


def shrink(sampling: Sampling, plan: FramePlan, stage: int, share: float) -> dict[str, int | None]:
    """Settings with which a clip takes fewer tokens.

    First it loses pixels, down to min_pixels; then frames, down to min_frames; then, below what the recipe asks for,
    pixels down to one token for each pair of frames, and frames down to two. A stage begins where the one before ended.

    Args:
        sampling: the clip's.
        plan: what would be shown of it.
        stage: 0 to SHRINK_STAGES - 1.
        share: of the way that is not gone in this stage, 0 to 1.

    Returns:
        Settings of the clip in place of the recipe's; None takes one away.
    """
    clip_wide = sampling.dialect == "qwen_finetune"
    height, width = plan.pre_size if sampling.dialect == "llamafactory" else (plan.height, plan.width)
    frames = len(plan.indices)
    least_frames = min(2 if sampling.nframes else sampling.min_frames, frames)
    pixels = shown_pixels = height * width * (frames if clip_wide else 1)
    token_pixels = sampling.factor**2 * (least_frames if clip_wide else 1)
    if not clip_wide:  # the other dialects round the shorter side down, and need a token of it
        token_pixels *= 2 + 2 * max(height, width) // min(height, width)
    token_pixels = min(token_pixels, pixels)
    least_pixels = sampling.min_pixels or _UTILS_FRAME_TOKENS[0] * sampling.factor**2
    least_pixels = min(max(least_pixels, token_pixels), pixels)
    if stage == 0:
        pixels = round(least_pixels + share * (pixels - least_pixels))
    elif stage == 1:
        pixels, frames = least_pixels, round(least_frames + share * (frames - least_frames))
    elif stage == 2:
        pixels, frames = round(token_pixels + share * (least_pixels - token_pixels)), least_frames
    else:
        pixels, frames = token_pixels, max(2, round(2 + share * (least_frames - 2)))
    settings: dict[str, int | None] = {}
    # qwen-vl-utils shares total_pixels among the frames: fewer of them would each grow.
    if pixels < shown_pixels or (sampling.dialect == "qwen_vl_utils" and frames < len(plan.indices)):
        settings["max_pixels"] = pixels
        if sampling.min_pixels is None or sampling.min_pixels > pixels:
            settings["min_pixels"] = min(pixels, least_pixels)
    if sampling.resized_height is not None:
        settings |= {"resized_height": None, "resized_width": None}
    if sampling.nframes is not None:
        settings["nframes"] = frames // 2 * 2
    elif stage:
        settings["max_frames"] = frames
        if sampling.min_frames > frames:
            settings["min_frames"] = frames
    return settings


@functools.lru_cache
def most_tokens(sampling: Sampling, pictures: int | None = None) -> int:
    """Tokens that no clip takes more of, whatever it holds: visual ones, and those of the times beside them.

    Args:
        pictures: for a list of pictures: how many.
    """
    most = sampling.nframes or sampling.max_frames
    if pictures is not None and sampling.dialect == "qwen_vl_utils":
        most = pictures
    return max(_most_tokens(sampling, frames) for frames in range(1, most + 1 + most % 2))


def _most_tokens(sampling: Sampling, frames: int) -> int:
    token = sampling.factor**2
    if sampling.dialect == "qwen_finetune":
        area = sampling.max_pixels / frames
    elif sampling.dialect == "llamafactory":
        area = max(sampling.max_pixels, 200 * _LLAMAFACTORY_MIN_SIDE**2, sampling.processor_min_pixels / 2)
    elif sampling.resized_height is not None:
        area = _UTILS_IMAGE_TOKENS[1] * token
    else:
        area = max(utils_frame_bounds(sampling, frames))
    # Sides are rounded up to whole tokens; with sides of 200 : 1 that adds the most.
    area += sampling.factor * math.sqrt(area) * (math.sqrt(200) + math.sqrt(1 / 200)) + token
    return math.ceil((frames + frames % 2) / 2 * (area / token + _TIME_TOKENS))
