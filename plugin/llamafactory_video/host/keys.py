"""The YAML keys that the plugin adds to LLaMA-Factory's own.

Each class is mixed into LLaMA-Factory's dataclass of the same kind (parser.py), so keys are checked, documented in
`--help` and overridable on the command line as its own are.
"""

import functools
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..video.dialects import LLAMAFACTORY_DEFAULTS
from ..words import meant, nearest

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_ABOVE_0 = (
    *("video_timeout", "video_cache_gb", "video_remote_gb", "api_max_upload_mb", "api_max_visual_tokens"),
    # LLaMA-Factory's and transformers', which say nothing of them, or say it late.
    *(
        "eval_generate",
        "cutoff_len",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "lora_rank",
    ),
)
_FEW_WORDS = 12
_AT_LEAST_0 = ("skip_wrong_share", "answer_json_indent", "vision_tower_lr", "mm_projector_lr")


def listed(text: str | None) -> list[str]:
    """The parts of a key that has commas between several."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def check_keys(keys: Any, cls: type) -> None:
    """Raise ValueError for a key of `cls` whose value is of another type, none of those known or too small."""
    hints = get_type_hints(cls)  # not the fields' types, which the parser of the command line rewrites
    for name in (f.name for f in fields(cls) if f.init):
        check_value(name, getattr(keys, name), hints[name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError for a key whose value is of another type than a truth value, a number or one of some words, as its
    hint says, or too small. Other hints tell nothing.

    Nothing is converted on the way from YAML, JSON or Python to here.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return
    options = [option for option in options if option is not type(None)]
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    kinds = [option for option in options if get_origin(option) is not Literal]
    if words and all(kind is str for kind in kinds):
        near = nearest(value, words) if isinstance(value, str) else None
        wanted = (
            "one of the known ones" if near and len(words) > _FEW_WORDS else f"one of {', '.join(map(str, words))}"
        )
        right = value in words or (value is False and "off" in words)  # what YAML makes of that word
    elif kinds and not words and all(kind in (bool, int, float) for kind in kinds):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        right = isinstance(value, bool) and bool in kinds
        if isinstance(value, int | float) and not isinstance(value, bool):
            # LLaMA-Factory takes a part of a whole for some of its whole numbers.
            right = float in kinds or (int in kinds and (isinstance(value, int) or name not in own_keys()))
    elif kinds == [str] and name in own_keys():
        wanted, right = _KINDS[str], isinstance(value, str)
    else:
        return
    if name in _ABOVE_0:
        wanted, right = f"{wanted} above 0", right and value > 0
    elif name in _AT_LEAST_0:
        wanted, right = f"{wanted} of at least 0", right and value >= 0
    if right:
        return
    found, advice = str(value), ""
    if isinstance(value, str):
        found = f'the text "{value}"'
        advice = "; YAML reads 1e-6 as text; write 1.0e-6" if float in kinds and value[:1].isdigit() else ""
        advice = meant(value, words) if words else advice
    elif isinstance(value, bool) or value is None:
        found = str(value).lower() if value is not None else "nothing"
        advice = '; YAML reads the word no as false; write "no"' if value is False and "no" in words else ""
    raise ValueError(f"{name} must be {wanted}; found {found}{advice}")


@functools.cache
def own_keys() -> frozenset[str]:
    """The keys of the plugin."""
    return frozenset(f.name for cls in KEYS for f in fields(cls) if f.init)


@dataclass
class VideoModelKeys:
    """Keys on how clips and images are sampled."""

    video_sampling: Literal["llamafactory", "qwen_finetune", "qwen_vl_utils"] | None = field(
        default=None,
        metadata={
            "help": "How the video_* and image_* keys are meant. Default: as the model's folder says that it was "
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
    video_min_frames: int | None = field(default=None, metadata={"help": "Minimum number of frames of a clip."})
    video_max_frames: int | None = field(
        default=None, metadata={"help": "Maximum number of frames of a clip; another name for `video_maxlen`."}
    )
    video_maxlen: int | None = field(default=None, metadata={"help": "Maximum number of frames of a clip."})
    video_min_pixels: int | None = field(
        default=None, metadata={"help": "Minimum number of pixels, counted as `video_sampling` says."}
    )
    video_max_pixels: int | None = field(
        default=None, metadata={"help": "Maximum number of pixels, counted as `video_sampling` says."}
    )
    video_total_pixels: int | None = field(
        default=None,
        metadata={"help": "Maximum number of pixels of a whole clip; only for `video_sampling: qwen_vl_utils`."},
    )
    video_cache: bool = field(
        default=True, metadata={"help": "Keep decoded frames on disk, so that each clip is decoded once."}
    )
    video_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for them. Default: ~/.cache/llamafactory_video."}
    )
    video_cache_gb: float | None = field(
        default=None,
        metadata={"help": "Size limit in GiB. Default: half of the disk's free space."},
    )
    video_timeout: float = field(
        default=300.0,
        metadata={"help": "Give up reading a clip after this many seconds, with an error that names it."},
    )
    video_remote_gb: float = field(
        default=2.0, metadata={"help": "Size limit, in GiB, of a clip that is fetched from an address."}
    )
    remote_media: bool = field(
        default=False,
        metadata={
            "help": "Fetch clips and pictures that records give by address (http, https, s3 and what else fsspec opens), once, into "
            "the cache of frames."
        },
    )
    json_schema: str | None = field(
        default=None,
        metadata={"help": "A file with the JSON Schema that answers are held to, in chat, API and predict."},
    )
    json_schema_from: str | None = field(
        default=None,
        metadata={
            "help": "Annotations (.json, .jsonl or a folder) whose answers tell that schema; in place of `json_schema`."
        },
    )
    json_schema_vocabulary: str | None = field(
        default=None,
        metadata={
            "help": "With `json_schema_from`: fields, with commas, that hold only texts which were seen there, such as tags."
        },
    )
    api_max_upload_mb: float = field(
        default=256.0, metadata={"help": "Size limit, in MiB, of a request to the API, clips inside it included."}
    )
    api_max_visual_tokens: int | None = field(
        default=None,
        metadata={
            "help": "The most visual tokens of a request to the API, which may ask for other fps, frames and pixels than the "
            "recipe's. Default: what the model takes."
        },
    )
    api_allowed_hosts: str | None = field(
        default=None,
        metadata={
            "help": "Hosts, addresses and networks inside one's own network, with commas, that the API may fetch clips from: "
            "store.internal,10.0.0.0/8. Public ones are always allowed."
        },
    )
    image_min_pixels: int | None = field(default=None, metadata={"help": "Minimum number of pixels of an image."})
    image_max_pixels: int | None = field(default=None, metadata={"help": "Maximum number of pixels of an image."})
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
        metadata={
            "help": "Leave out records that are wrong or too long, and those whose clips or pictures cannot be shown; "
            "a report lists them."
        },
    )
    skip_wrong_share: float = field(
        default=0.1,
        metadata={
            "help": "The greatest share of a data set that `skip_wrong_records` leaves out; with more, the run stops."
        },
    )
    unknown_fields: Literal["warn", "error", "ignore"] = field(
        default="warn",
        metadata={
            "help": "What becomes of fields of a record that mean nothing to training. `warn`: each is told once a data set, with "
            "how often it occurs."
        },
    )
    video_fit: Literal["error", "shrink"] = field(
        default="error",
        metadata={
            "help": "What to do with a record that is longer than cutoff_len. `error`: training does not start, and "
            "all such records are listed. `shrink`: its clips lose pixels, then frames, until it fits; every change "
            "is reported."
        },
    )
    eval_generate: int | None = field(
        default=None,
        metadata={
            "help": "Answer so many records of the evaluation set at each evaluation, and judge them as `lmf-video eval` does: "
            "eval_score, eval_json, eval_tags_f1 and the like in the log, and for metric_for_best_model."
        },
    )
    answer_json_indent: int | None = field(
        default=None,
        metadata={"help": "Spaces of indentation for answers that are JSON values; one line if not given."},
    )

    @property
    def most_wrong(self) -> float:
        """The greatest share of a data set that may be left out."""
        return self.skip_wrong_share if self.skip_wrong_records else 0.0


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
    data_flatten: bool = field(
        default=True,
        metadata={
            "help": "Lay the samples of a micro-batch end to end, without padding, and compute logits only where labels are. "
            "The result is the same; it takes less time and memory."
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the layers of the model, for `data_flatten` on a GPU: a start takes half a minute longer, and "
            "each step a third less. Default: in runs of 100 steps and more, where it is known to work."
        },
    )
    gradient_checkpointing_policy: Literal["auto", "none", "language_model", "all"] = field(
        default="auto",
        metadata={
            "help": "Which layers compute their activations again in the backward pass, unless `disable_gradient_checkpointing` "
            "is true. `auto`: as few as the memory of the GPU needs, with `data_flatten`."
        },
    )
    gradient_check: Literal["error", "warn", "off"] = field(
        default="error",
        metadata={
            "help": "What happens when modules that should be trained have no gradient, a zero one or one that is not "
            "finite after the first step: they are named, and the run stops (`error`) or continues (`warn`)."
        },
    )


KEYS = (VideoModelKeys, VideoDataKeys, VideoFinetuningKeys)
