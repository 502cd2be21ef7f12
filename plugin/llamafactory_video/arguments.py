"""The YAML keys that the plugin adds to LLaMA-Factory's own, and what they resolve to.

Each class is mixed into LLaMA-Factory's dataclass of the same kind (hooks.py), so keys are checked, documented in
`--help` and overridable on the command line as its own are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .video.cache import GIB, FrameCache, default_folder
from .video.contract import Contract
from .video.sampling import Sampling, SamplingError

_LEAST_CACHE = 1 * GIB  # below it, a cache that nobody asked for is not worth its place

# LLaMA-Factory's own defaults, for keys whose default here is None so that "not given" can be told apart.
LLAMAFACTORY_DEFAULTS = {
    "video_fps": 2.0,
    "video_maxlen": 128,
    "video_min_pixels": 16 * 16,
    "video_max_pixels": 256 * 256,
    "image_min_pixels": 32 * 32,
    "image_max_pixels": 768 * 768,
}


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_ABOVE_0 = ("video_timeout", "video_cache_gb", "video_remote_gb")
_AT_LEAST_0 = ("answer_json_indent", "vision_tower_lr", "mm_projector_lr")


def check_keys(keys: Any, cls: type) -> None:
    """Raise ValueError for a key of `cls` whose value is of another type, none of those known or too small.

    Nothing is converted on the way from YAML, JSON or Python to here.
    """
    hints = get_type_hints(cls)  # not the fields' types, which the parser of the command line rewrites
    for name in (f.name for f in fields(cls) if f.init):
        value, hint = getattr(keys, name), hints[name]
        options = get_args(hint) or (hint,)
        if type(None) in options:
            if value is None:
                continue
            hint = next(option for option in options if option is not type(None))
            options = get_args(hint) or (hint,)
        found, advice = str(value), ""
        if isinstance(value, str):
            found = f'the text "{value}"'
        elif isinstance(value, bool):
            found = str(value).lower()
        if get_origin(hint) is Literal:
            wanted, right = f"one of {', '.join(options)}", value in options
        else:
            kind = options[0]
            wanted = _KINDS[kind]
            right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (
                kind is bool
            )
            if name in _ABOVE_0:
                wanted, right = f"{wanted} above 0", right and value > 0
            elif name in _AT_LEAST_0:
                wanted, right = f"{wanted} of at least 0", right and value >= 0
            if kind is float and isinstance(value, str):
                advice = "; YAML takes 1e-6 for a text and 1.0e-6 for a number"
        if not right:
            raise ValueError(f"{name} must be {wanted}; found {found}{advice}")


@dataclass
class VideoModelKeys:
    """Keys on how clips and images are sampled."""

    video_sampling: Literal["llamafactory", "qwen_finetune", "qwen_vl_utils"] | None = field(
        default=None,
        metadata={
            "help": "Whose meaning the video_* and image_* keys have; if not given, as the model's folder says that it was "
            "trained, else `llamafactory`. `llamafactory`: pixels count one frame. "
            "`qwen_finetune`: as in Qwen's official trainer, pixels count the whole clip (frames x height x width); "
            "keys that are not given come from the model's processor files. `qwen_vl_utils`: as in messages for that "
            "package, pixels count one frame and video_total_pixels the whole clip."
        },
    )
    video_timestamps: Literal["pts", "index"] | None = field(
        default=None,
        metadata={
            "help": "For clips of variable frame rate; if not given, as the model was trained, else `pts`. `pts`: the frames nearest to the wanted times, and the times at "
            "which they are really shown. `index`: as transformers and qwen-vl-utils do, which take a frame's number "
            "divided by the average rate for its time."
        },
    )
    video_fps: float | None = field(default=None, metadata={"help": "Frames to sample per second of a clip."})
    video_min_frames: int | None = field(default=None, metadata={"help": "The least number of frames of a clip."})
    video_max_frames: int | None = field(
        default=None, metadata={"help": "The greatest number of frames of a clip; another name for `video_maxlen`."}
    )
    video_maxlen: int | None = field(default=None, metadata={"help": "The greatest number of frames of a clip."})
    video_min_pixels: int | None = field(
        default=None, metadata={"help": "The least number of pixels, of what `video_sampling` says."}
    )
    video_max_pixels: int | None = field(
        default=None, metadata={"help": "The greatest number of pixels, of what `video_sampling` says."}
    )
    video_total_pixels: int | None = field(
        default=None,
        metadata={"help": "The greatest number of pixels of a whole clip, for `video_sampling: qwen_vl_utils` alone."},
    )
    video_cache: bool = field(
        default=True, metadata={"help": "Keep decoded frames on disk, so that each clip is decoded once."}
    )
    video_cache_dir: str | None = field(
        default=None, metadata={"help": "Where they are kept; ~/.cache/llamafactory_video if not given."}
    )
    video_cache_gb: float | None = field(
        default=None,
        metadata={"help": "The most that they may take, in GiB; half of the disk's free space if not given."},
    )
    video_timeout: float = field(
        default=300.0, metadata={"help": "Seconds after which reading a clip is given up, with an error naming it."}
    )
    video_remote_gb: float = field(
        default=2.0, metadata={"help": "The most that a clip may have which the API is given by address, in GiB."}
    )
    image_min_pixels: int | None = field(default=None, metadata={"help": "The least number of pixels of an image."})
    image_max_pixels: int | None = field(default=None, metadata={"help": "The greatest number of pixels of an image."})
    # Not keys: what parsing finds out. As fields they go along when LLaMA-Factory copies these arguments.
    given_video_keys: dict[str, Any] = field(init=False, default_factory=dict)
    video_template: bool = field(init=False, default=False)
    video_training: bool = field(init=False, default=False)

    def take_video_keys(self) -> None:
        """Remember which keys were given, then fill the others so that LLaMA-Factory's own code finds numbers.

        Raises:
            ValueError: if a value is of another type, or contradicts another.
        """
        check_keys(self, VideoModelKeys)
        if None not in (self.video_max_frames, self.video_maxlen) and self.video_max_frames != self.video_maxlen:
            raise ValueError(
                f"video_max_frames is {self.video_max_frames} and video_maxlen {self.video_maxlen}; "
                "they are two names for one setting: give one of them"
            )
        if self.video_maxlen is None:
            self.video_maxlen = self.video_max_frames
        names = [*LLAMAFACTORY_DEFAULTS, "video_min_frames", "video_total_pixels"]
        self.given_video_keys = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        for name, default in LLAMAFACTORY_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for kind in ("video", "image"):  # a default must not contradict what was given
            least, most = f"{kind}_min_pixels", f"{kind}_max_pixels"
            if most not in self.given_video_keys:
                setattr(self, most, max(getattr(self, least), getattr(self, most)))
            elif least not in self.given_video_keys:
                setattr(self, least, min(getattr(self, least), getattr(self, most)))


@dataclass
class VideoDataKeys:
    """Keys on reading annotation files."""

    skip_wrong_records: bool = field(
        default=False,
        metadata={"help": "Leave wrong records of `video_conversation` data sets out, with a report, and go on."},
    )
    video_fit: Literal["error", "shrink"] = field(
        default="error",
        metadata={
            "help": "What becomes of a record that is longer than cutoff_len. `error`: training does not start, and "
            "all such records are listed. `shrink`: its clips lose pixels, then frames, until it fits; every change "
            "is reported."
        },
    )
    answer_json_indent: int | None = field(
        default=None,
        metadata={"help": "Spaces of indentation for answers that are JSON values; one line if not given."},
    )


@dataclass
class VideoFinetuningKeys:
    """Keys on training by module."""

    video_template: bool = field(init=False, default=False)  # see VideoModelKeys

    vision_tower_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower without its mergers; `learning_rate` if not given."},
    )
    mm_projector_lr: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the projector (visual.merger and visual.deepstack_merger_list); "
            "`learning_rate` if not given."
        },
    )
    loss_normalization: Literal["tokens", "micro_batches"] = field(
        default="tokens",
        metadata={
            "help": "`tokens`: each supervised token of a step counts alike, however the step is cut into micro-batches "
            "and processes, as in Qwen's official trainer. `micro_batches`: the mean of the micro-batches' means, as "
            "LLaMA-Factory has it."
        },
    )
    gradient_check: Literal["error", "warn", "off"] = field(
        default="error",
        metadata={
            "help": "What happens when modules that should be trained have no gradient, a zero one or one that is not "
            "finite after the first step: they are named, and the run stops (`error`) or goes on (`warn`)."
        },
    )


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
        defaults = replace(trained, image_bounds=_image_bounds(given, trained.image_bounds))
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
        raise SamplingError(f"{error} (what the recipe does not give comes from {source})") from error


def _image_bounds(given: dict[str, Any], bounds: tuple[int, int] | None) -> tuple[int, int] | None:
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
        bounds = _image_bounds(given, (4 * factor**2, 16384 * factor**2))
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


def frame_cache(keys: VideoModelKeys, log: Callable[[str], None]) -> FrameCache | None:
    """The cache of frames that the recipe asks for, or None where there is no room for it; says which, with its size.

    Args:
        log: takes a line for the person who runs this.
    """
    if not keys.video_cache:
        return None
    without = (
        "Frame cache: off, since {}. Every clip is decoded in every epoch. `video_cache_dir` names another place."
    )
    try:
        folder = Path(keys.video_cache_dir).expanduser() if keys.video_cache_dir else default_folder()
        cache = FrameCache(folder, None if keys.video_cache_gb is None else int(keys.video_cache_gb * GIB))
        if cache.limit < _LEAST_CACHE and keys.video_cache_gb is None:
            log(without.format(f"the disk of {folder} has only {cache.limit / GIB:.1f} GiB to spare"))
            return None
        size = cache.size()
    except (OSError, RuntimeError) as error:  # a folder that may not be looked into, a user without a home
        log(without.format(f"its folder cannot be used ({error})"))
        return None
    log(
        f"Frame cache: {folder}, {size.clips} clips in {size.bytes / GIB:.2f} GiB, may grow to {cache.limit / GIB:.1f} "
        "GiB (about 6 KiB a visual token). `video_cache: false` turns it off."
    )
    return cache


def take_trained_processors(processor: Any, adapters: Sequence[str]) -> None:
    """Sample as the last adapter was trained: its folder holds the processor files that the base model's lack."""
    for folder in reversed(adapters):
        if Path(folder, "processor_config.json").is_file():
            from transformers import AutoProcessor

            trained = AutoProcessor.from_pretrained(folder)
            processor.video_processor, processor.image_processor = trained.video_processor, trained.image_processor
            return


def apply_to_processor(
    dialect: str | None,
    given: dict[str, Any],
    processor: Any,
    timestamps: str | None = None,
    trained: Contract | None = None,
) -> Contract:
    """Resolve the keys and, where the processor can hold them, write them into it.

    In the dialect `qwen_finetune` the settings live in the processor itself, so plain transformers samples from a folder
    that it is saved in as training did.

    Args:
        trained: how the model was, if its folder tells.

    Returns:
        How clips and images are sampled.
    """
    video_processor, image_processor = processor.video_processor, processor.image_processor
    sampling = resolve_sampling(dialect, given, video_processor, timestamps, trained and trained.clips)
    size = image_processor.size
    pixels = size.shortest_edge, size.longest_edge
    if trained is not None and trained.clips.dialect == sampling.dialect:
        pixels = trained.image_pixels
    if sampling.dialect == "qwen_finetune":
        tell_processor(video_processor, sampling)
        pixels = _image_bounds(given, pixels)
    image_processor.size = _bounded(size, *pixels)
    return Contract(sampling, pixels)


def tell_processor(video_processor: Any, sampling: Sampling) -> None:
    """Write a `qwen_finetune` sampling into transformers' video processor."""
    video_processor.fps = sampling.fps
    video_processor.min_frames, video_processor.max_frames = sampling.min_frames, sampling.max_frames
    video_processor.size = _bounded(video_processor.size, sampling.min_pixels, sampling.max_pixels)
    # A bound on each frame, which transformers from 5.16 on warns of and means to set by default.
    video_processor.cap_pixels_per_frame = False


def _bounded(size: Any, least: int, most: int) -> Any:
    return type(size)(shortest_edge=least, longest_edge=most)
