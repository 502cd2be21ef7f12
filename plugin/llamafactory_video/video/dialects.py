"""What a recipe's keys mean in each dialect."""

from dataclasses import replace
from typing import Any

from .sampling import Sampling, SamplingError

# LLaMA-Factory's own defaults, for keys whose default here is None so that "not given" can be told apart.
LLAMAFACTORY_DEFAULTS = {
    "video_fps": 2.0,
    "video_maxlen": 128,
    "video_min_pixels": 16 * 16,
    "video_max_pixels": 256 * 256,
    "image_min_pixels": 32 * 32,
    "image_max_pixels": 768 * 768,
}


def resolve_sampling(
    dialect: str | None,
    given: dict[str, Any],
    video_processor: Any,
    timestamps: str | None = None,
    trained: Sampling | None = None,
) -> Sampling:
    """How clips are sampled: the recipe's keys over how the model was trained, or over what the dialect takes for granted.

    Args:
        dialect: value of `video_sampling`; None: as the model was trained, else llamafactory.
        given: the video_* and image_* keys that the recipe gives.
        video_processor: the model's own; transformers' Qwen3VLVideoProcessor.
        timestamps: value of `video_timestamps`; None: as the model was trained, else pts.
        trained: how it was, if its folder tells. In another dialect its numbers mean nothing.

    Raises:
        SamplingError: if the numbers contradict each other.
    """
    dialect = dialect or (trained.dialect if trained else "llamafactory")
    timestamps = timestamps or (trained.timestamps if trained else "pts")
    if trained is not None and trained.dialect == dialect:
        defaults = replace(trained, image_bounds=image_bounds_of(given, trained.image_bounds))
        source = "the model's folder"
    else:
        defaults, source = _dialect_defaults(dialect, given, video_processor), f"the dialect {dialect}"
    try:
        return defaults.override(
            timestamps=timestamps,
            fps=given.get("video_fps"),
            min_frames=given.get("video_min_frames"),
            max_frames=given.get("video_maxlen"),
            min_pixels=given.get("video_min_pixels"),
            max_pixels=given.get("video_max_pixels"),
            total_pixels=given.get("video_total_pixels"),
        )
    except SamplingError as error:
        raise SamplingError(f"{error} (defaults come from {source})") from error


def image_bounds_of(given: dict[str, Any], bounds: tuple[int, int] | None) -> tuple[int, int] | None:
    """The recipe's bounds on an image over others; None for dialects that leave images to the processor."""
    if bounds is None:
        return None
    least, most = given.get("image_min_pixels", bounds[0]), given.get("image_max_pixels", bounds[1])
    if not 0 < least <= most:
        raise SamplingError(f"image_min_pixels is {least} and image_max_pixels {most}; the first must be smaller")
    return least, most


def _dialect_defaults(dialect: str, given: dict[str, Any], video_processor: Any) -> Sampling:
    size = video_processor.size
    factor = video_processor.patch_size * video_processor.merge_size
    processor_bounds = {"processor_min_pixels": size.shortest_edge, "processor_max_pixels": size.longest_edge}
    patches = {name: getattr(video_processor, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    if dialect == "qwen_finetune":
        return Sampling(
            dialect,
            fps=video_processor.fps,
            min_frames=video_processor.min_frames,
            max_frames=video_processor.max_frames,
            min_pixels=size.shortest_edge,
            max_pixels=size.longest_edge,
            **patches,
            **processor_bounds,
        )
    if dialect == "qwen_vl_utils":
        bounds = image_bounds_of(given, (4 * factor**2, 16384 * factor**2))
        return Sampling(dialect, min_pixels=None, max_pixels=None, image_bounds=bounds, **patches)
    keys = ("image_min_pixels", "image_max_pixels")
    bounds = tuple(given.get(key, LLAMAFACTORY_DEFAULTS[key]) for key in keys)
    return Sampling(
        dialect,
        fps=LLAMAFACTORY_DEFAULTS["video_fps"],
        min_frames=1,
        max_frames=LLAMAFACTORY_DEFAULTS["video_maxlen"],
        min_pixels=LLAMAFACTORY_DEFAULTS["video_min_pixels"],
        max_pixels=LLAMAFACTORY_DEFAULTS["video_max_pixels"],
        image_bounds=bounds,
        **patches,
        **processor_bounds,
    )
