"""How clips and pictures were sampled when a model was trained, in a small file of its folder: `video_sampling.json`.

Training and export write it into every folder that they save, whole, in any dialect; whatever loads such a folder
samples so without being told. An adapter's folder comes before its base model's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .plan import plan_frames
from .sampling import ClipInfo, Sampling, SamplingError
from .sizes import tokens_of_image

# What a recipe or a call can say of how clips and pictures are sampled.
SAMPLING_KEYS = (
    *("video_sampling", "video_timestamps", "video_fps", "video_min_frames", "video_max_frames", "video_min_pixels"),
    *("video_max_pixels", "video_total_pixels", "image_min_pixels", "image_max_pixels"),
)

FILE = "video_sampling.json"
_FORMAT = 1
_ABOUT = (
    "How clips and pictures were sampled when this model was trained. llamafactory-video samples so when it loads this "
    "folder. Dialects: qwen_finetune, where pixels count the whole clip (frames x height x width); llamafactory and "
    "qwen_vl_utils, where they count one frame."
)
# What a difference is shown by.
EXAMPLE_CLIP = ClipInfo(num_frames=300, fps=30.0, duration=10.0, height=720, width=1280)


@dataclass(frozen=True)
class Contract:
    """How clips and pictures are sampled.

    Attributes:
        clips: of clips, resolved.
        image_pixels: least and greatest pixels of a picture, of the image processor.
    """

    clips: Sampling
    image_pixels: tuple[int, int]


def write_contract(folder: Path, contract: Contract) -> None:
    """Write a folder's `video_sampling.json`."""
    least, most = contract.image_pixels
    record = {
        "about": _ABOUT,
        "format": _FORMAT,
        "clips": asdict(contract.clips),
        "images": {"min_pixels": least, "max_pixels": most},
    }
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_contract(file: Path) -> Contract:
    """The contract in a `video_sampling.json`.

    Raises:
        ValueError: naming the file, if it is none that can be read.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']}, and this release reads {_FORMAT}; update the plugin")
        clips, images = record["clips"], record["images"]
        unknown = clips.keys() - {field.name for field in fields(Sampling)}
        if unknown:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; update the plugin")
        if clips.get("image_bounds"):
            clips["image_bounds"] = tuple(clips["image_bounds"])
        return Contract(Sampling(**clips), (images["min_pixels"], images["max_pixels"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: {what}. Export or train again to rewrite it, or remove it") from error


def agreed(found: Sequence[tuple[str, Contract]]) -> tuple[str, Contract] | None:
    """The one contract of several adapters, with the folder that it comes from; None if there is none.

    Raises:
        ValueError: if adapters disagree, naming them.
    """
    for name, contract in found[1:]:
        if contract != found[0][1]:
            raise ValueError(
                f"the adapters {found[0][0]} and {name} were trained with different sampling: "
                f"{difference(found[0][1], contract)}. Use adapters that agree, or merge one of them first"
            )
    return found[-1] if found else None


def difference(before: Contract, after: Contract) -> str:
    """What a change means for a clip of 10 s and a picture, in a line; "" where nothing changes."""
    old, new = asdict(before.clips), asdict(after.clips)
    names = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
    if before.image_pixels != after.image_pixels:
        names.append(f"pixels of a picture {before.image_pixels} -> {after.image_pixels}")
    if not names:
        return ""
    shown = " -> ".join(clip_text(contract.clips) for contract in (before, after))
    pictures = [_picture_tokens(contract) for contract in (before, after)]
    picture = (
        f"; one picture of that size: {pictures[0]} -> {pictures[1]} visual tokens" if len(set(pictures)) > 1 else ""
    )
    return f"{', '.join(names)}. A clip of 10 s at 1280 x 720, 30 frames/s: {shown}{picture}"


def nearest(sampling: Sampling) -> Sampling:
    """What transformers' own processor can be told that comes nearest: itself in `qwen_finetune`, whose meaning it has.

    Other dialects bound the pixels of a frame, and the processor those of the whole clip: as many as the example clip has.
    """
    if sampling.dialect == "qwen_finetune":
        return sampling
    plan = plan_frames(EXAMPLE_CLIP, sampling)
    frames = len(plan.indices)
    size = plan.height * plan.width
    least, most = (size if bound is None else bound for bound in (sampling.min_pixels, sampling.max_pixels))
    told = {name: getattr(sampling, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    return Sampling(
        "qwen_finetune",
        fps=sampling.fps,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
        min_pixels=frames * min(least, size),
        max_pixels=frames * max(most, size),
        **told,
    )


def clip_text(sampling: Sampling) -> str:
    """What is shown of the example clip, or why nothing is."""
    try:
        plan = plan_frames(EXAMPLE_CLIP, sampling)
    except SamplingError as error:
        return str(error)
    return f"{len(plan.indices)} frames of {plan.width} x {plan.height}, {plan.num_tokens} visual tokens"


def _picture_tokens(contract: Contract) -> int | str:
    try:
        return tokens_of_image(EXAMPLE_CLIP.height, EXAMPLE_CLIP.width, contract.clips, *contract.image_pixels)
    except SamplingError as error:
        return str(error)
