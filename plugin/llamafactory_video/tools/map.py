"""`lmf-video map`: settings of other tools as a recipe that means the same, and what it makes of an example clip."""

import json
import re
from typing import Any

import yaml

from ..video.sampling import ClipInfo, FramePlan
from ..video.sizes import utils_frame_bounds
from .command_line import MappingError
from .other_tools import NOTES
from .settings import ExampleError, Mapped, read

EXAMPLE = ClipInfo(900, 60.0, 15.0, 720, 1280)
_SAMPLING = re.compile(r"video_(sampling|fps|maxlen|total_pixels|(min|max)_(frames|pixels))|image_(min|max)_pixels")


def clip_plans(mapped: Mapped, info: ClipInfo) -> list[FramePlan]:
    """What is shown of the example under each clip's settings; the surprises among them are noted."""
    plans = []
    for clip in mapped.clips or [{}]:
        sampling = mapped.sampling(clip)
        try:
            plan = mapped.plan(info, clip)
        except ExampleError as error:
            mapped.note("example clip", str(error))
            continue
        plans.append(plan)
        seconds = sampling.min_frames / sampling.fps
        if seconds > 2 and sampling.nframes is None and "frames" not in clip:
            mapped.note("video_min_frames", NOTES["denser"].format(seconds, sampling.fps, sampling.min_frames))
        if sampling.dialect == "qwen_vl_utils" and sampling.max_pixels:
            frames = len(plan.indices)
            limit = utils_frame_bounds(sampling, frames)[1]
            if sampling.max_pixels > limit:
                mapped.note("max_pixels", NOTES["over"].format(sampling.max_pixels, frames, limit))
    if mapped.dialect == "llamafactory":
        numbers = {key: value for key, value in mapped.recipe.items() if _SAMPLING.fullmatch(key)}
        for dialect in ("qwen_finetune", "qwen_vl_utils"):
            try:
                text = plan_text(Mapped("recipe", numbers | {"video_sampling": dialect}).plan(info))
            except MappingError as error:
                text = str(error)
            mapped.note(f"video_sampling: {dialect}", f"the same numbers would mean, for the example clip: {text}")
        if "video_max_pixels" in mapped.recipe:
            mapped.note("video_max_pixels", NOTES["each frame"])
    return plans


def describe_plan(plan: FramePlan) -> dict[str, Any]:
    """A plan in numbers: frames, size in pixels (h, w), grid in patches (t, h, w), visual tokens, times in seconds."""
    return {
        "frames": len(plan.indices), "size": [plan.height, plan.width], "grid": list(plan.grid),
        "tokens": plan.num_tokens, "first_times": [round(time, 2) for time in plan.timestamps[:3]],
    }  # fmt: skip


def plan_text(plan: FramePlan) -> str:
    numbers = describe_plan(plan)
    times = ", ".join(f"{time:.1f}" for time in plan.timestamps[:3])
    return (
        f"{numbers['frames']} frames of {plan.height} x {plan.width} (h x w), grid {numbers['grid']}, "
        f"{numbers['tokens']} visual tokens, first times {times} s"
    )


def read_as_recipe(text: str, kind: str | None = None, info: ClipInfo = EXAMPLE) -> dict[str, Any]:
    """All that `lmf-video map` tells.

    Args:
        kind: one of `SOURCES`, or None to recognise it.
        info: length, rate and size of the clip that serves as an example.

    Returns:
        `from`, `result` (keys of a recipe), `clips` (settings in records), `example` (what is shown
        of the clip, for each of `clips`), and `notes`, pairs of a name and what must be known about it.

    Raises:
        MappingError: if the text cannot be read, or contradicts itself.
    """
    mapped = read(text, kind)
    plans = clip_plans(mapped, info)
    return {
        "from": mapped.source, "result": mapped.recipe, "clips": mapped.clips,
        "example": [{"text": plan_text(plan), **describe_plan(plan)} for plan in plans], "notes": mapped.notes,
    }  # fmt: skip


def result_text(report: dict[str, Any]) -> str:
    """The recipe alone, as YAML."""
    return yaml.safe_dump(report["result"], sort_keys=False, allow_unicode=True, width=1000).rstrip()


def remarks(report: dict[str, Any], info: ClipInfo) -> list[str]:
    """What is to be said beside the result, a line each."""
    lines = []
    if any(clip.keys() - {"path"} for clip in report["clips"]):
        lines += ["In the records, what is set for single clips:"]
        lines += [f'  "video": {json.dumps(clip, ensure_ascii=False)}' for clip in report["clips"]]
    lines.append(f"Example clip, {info.duration:g} s at {info.fps:g} frames/s, {info.width} x {info.height}:")
    lines += [f"  {plan['text']}" for plan in report["example"]]
    said: dict[str, list[str]] = {}  # what holds for several names is said once
    for name, text in report["notes"]:
        said.setdefault(text, []).append(name)
    return lines + [f"{', '.join(names)}: {text}" for text, names in said.items()]
