"""What a model is shown of a conversation, for a person: frames, times, sizes, patches, tokens."""

from collections.abc import Sequence

from ..video.pictures import picture_size
from ..video.reader import PlannedClip
from .encoder import Encoder, Sample
from .pixels import count_image_tokens

FEW_TOKENS = 100  # visual tokens of a whole clip; with fewer it can hardly be told what happens in it
_LISTED = 12  # times and frame numbers that are written out


def shown_text(sample: Sample, encoder: Encoder) -> str:
    """A sample's clips, pictures and prompt, a block of lines each."""
    sampling = encoder.reader.sampling
    blocks = [_clip_text(clip, sampling.patch_size) for clip in sample.clips]
    for image in sample.images:
        height, width = picture_size(image)
        tokens = count_image_tokens(image, encoder.processor.image_processor, sampling)
        blocks.append(f"{image}\n  picture   {width} x {height}\n  tokens    {tokens} visual")
    visual = encoder.visual_tokens(sample.ids)
    blocks.append(f"prompt: {len(sample.ids)} tokens, {visual} of them visual; sampling: {sampling.dialect}")
    return "\n".join(blocks)


def few_tokens(sample: Sample, encoder: Encoder) -> str:
    """A warning where the recipe leaves little of a clip that has more to show; "" where it does not."""
    sampling = encoder.reader.sampling
    for clip in sample.clips:
        plan, file = clip.plan, clip.file
        if (
            file is None
            or plan.num_tokens >= FEW_TOKENS
            or plan.height * plan.width >= file.info.height * file.info.width
        ):
            continue
        counts = "the whole clip" if sampling.dialect == "qwen_finetune" else "one frame"
        return (
            f"{clip.clip}, {file.info.width} x {file.info.height}, is shown as {len(plan.indices)} frames of {plan.width} x "
            f"{plan.height}: {plan.num_tokens} visual tokens. Little can be seen in fewer than {FEW_TOKENS}; raise "
            f"video_max_pixels, which counts {counts} in the dialect {sampling.dialect}"
        )
    return ""


def _clip_text(clip: PlannedClip, side: int) -> str:
    plan, lines = clip.plan, [str(clip.clip)]
    if clip.file is not None:
        info = clip.file.info
        lines.append(
            f"  file      {info.num_frames} frames, {info.fps:g} frames/s, {info.duration:.2f} s, "
            f"{info.width} x {info.height}" + (f" ({clip.file.note})" if clip.file.note else "")
        )
    else:
        lines.append(f"  pictures  {len(clip.clip.frames)}")
    t, h, w = plan.grid
    per_patch = len(plan.indices) // t
    lines += [
        f"  sampled   {len(plan.indices)} frames, at {_listed([f'{time:.2f}' for time in plan.times])} s",
        f"            numbers {_listed([str(index) for index in plan.indices])}",
        f"  size      {plan.width} x {plan.height}",
        f"  grid      {t} x {h} x {w} (time, height, width), {t * h * w} patches of {per_patch} x {side} x {side} pixels",
        f"  tokens    {plan.num_tokens} visual, {plan.tokens_per_timestamp} after each of "
        f"{_listed([f'<{time:.1f} seconds>' for time in plan.timestamps])}",
    ]
    return "\n".join(lines)


def _listed(values: Sequence[str]) -> str:
    if len(values) <= _LISTED:
        return " ".join(values)
    return " ".join([*values[: _LISTED - 2], "…", values[-1]])
