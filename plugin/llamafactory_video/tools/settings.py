"""Settings of other tools, read into keys of a recipe.

Read are the official trainer's command, qwen-vl-utils' messages, ms-swift's environment variables and LLaMA-Factory's
YAML. Text goes in, a `Mapped` comes out. What has no counterpart, or does not mean what its name suggests, is named in
`Mapped.notes`; nothing is dropped without a word.

Sizes are those of Qwen3-VL: a visual token is 32 x 32 pixels of two frames, or of one image.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import yaml

from ..video.dialects import resolve_sampling
from ..video.plan import plan_frames
from ..video.sampling import ClipInfo, FramePlan, Sampling, SamplingError
from .command_line import MappingError, parse_json, parse_yaml, read_shell, typed
from .other_tools import (
    COMMAND,
    COMMAND_DEFAULTS,
    ENVIRONMENT,
    LORA_DEFAULTS,
    MESSAGE,
    NOTES,
    RECIPE_WIDE,
    TO_KEY,
    TUNE_DEFAULTS,
)

SOURCES = ("command", "message", "environment", "recipe")
_TOKEN = 32 * 32
_FRAME_TOKENS = (128, 768)  # what qwen-vl-utils takes for granted of a frame
# Qwen3-VL's video processor, from its video_preprocessor_config.json.
_SIZE = SimpleNamespace(shortest_edge=4096, longest_edge=25165824)
_PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
_PROCESSOR = SimpleNamespace(fps=2.0, min_frames=4, max_frames=768, size=_SIZE, **_PATCHES)


class ExampleError(MappingError):
    """Settings that are right in themselves, and cannot be shown of the example clip."""


@dataclass
class Mapped:
    """What a text says, in this plugin's words.

    Attributes:
        source: one of `SOURCES`.
        recipe: keys and values of the recipe.
        clips: settings of single clips, as a record has them.
        notes: (name, what must be known about it), for each value that does not carry over as it stands.
    """

    source: str
    recipe: dict[str, Any]
    clips: list[dict[str, Any]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, text: str) -> None:
        if text and (name, text) not in self.notes:
            self.notes.append((name, text))

    @property
    def dialect(self) -> str:
        return self.recipe.get("video_sampling", "llamafactory")

    def sampling(self, clip: dict[str, Any] | None = None) -> Sampling:
        """How a clip with these settings is sampled.

        Raises:
            MappingError: if the settings contradict each other.
        """
        given = {k: v for k, v in self.recipe.items() if k.startswith(("video_", "image_"))}
        timestamps = given.pop("video_timestamps", "pts")
        given.pop("video_sampling", None)
        if "video_max_frames" in given:
            given["video_maxlen"] = given.pop("video_max_frames")
        names = {entry.key for entry in MESSAGE.values()} - {"start", "end"}
        own = {key: value for key, value in (clip or {}).items() if key in names}
        try:
            return resolve_sampling(self.dialect, given, _PROCESSOR, timestamps).override(**own)
        except SamplingError as error:
            raise MappingError(str(error)) from error

    def plan(self, info: ClipInfo, clip: dict[str, Any] | None = None) -> FramePlan:
        """What is shown of a clip of that length and size; frames that the settings list replace the clip's own."""
        clip = clip or {}
        if "frames" in clip:
            count, rate = len(clip["frames"]), clip["frame_rate"]
            info = ClipInfo(count, rate, count / rate, info.height, info.width, pictures=True)
        try:
            return plan_frames(info, self.sampling(clip), clip.get("start"), clip.get("end"))
        except SamplingError as error:
            raise ExampleError(f"the example clip cannot be shown: {error}; --clip sets another") from error


def read(text: str, kind: str | None = None) -> Mapped:
    """What a text says; its kind, one of `SOURCES`, is recognised unless given.

    Raises:
        MappingError: if it cannot be read.
    """
    if not text.strip():
        raise MappingError("nothing to map; give a file, - for standard input, or flags after --")
    kind = kind or _recognise(text)
    if kind in ("recipe", "message"):
        value = parse_yaml(text) if kind == "recipe" else parse_json(text)
        return read_recipe(value) if kind == "recipe" else read_message(value)
    variables, flags, whole = read_shell(text)
    if kind == "environment":
        return read_environment(variables, flags)
    # A variable that the script itself uses is its own affair, whatever its name.
    variables = {name: value for name, value in variables.items() if not re.search(rf"\$\{{?{name}\b", text)}
    return read_command(flags, whole, variables)


def _recognise(text: str) -> str:
    if text.lstrip()[0] in "[{":
        value = parse_json(text)
        named = {"type", "role", "content", "messages", "video", "image"}
        return "recipe" if isinstance(value, dict) and not named & value.keys() else "message"
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict) and all(re.fullmatch(r"\w+", str(key)) for key in value):
            return "recipe"
    except yaml.YAMLError:
        pass
    variables, flags, _ = read_shell(text)
    swift = re.search(r"^[^#]*\b(swift|megatron)\s+(sft|pt|rlhf|infer)\b", text, re.M)
    if COMMAND.keys() & flags.keys() and not swift:
        return "command"
    if ENVIRONMENT.keys() & variables.keys() or "model_kwargs" in flags:
        return "environment"
    raise MappingError(
        "not recognised as the official trainer's flags, a qwen-vl-utils message, environment variables or a YAML "
        f"recipe; it begins {text.strip()[:40]!r}. --from says which it is"
    )


def read_command(flags: dict[str, Any], whole: bool = True, variables: dict[str, str] | None = None) -> Mapped:
    """The official trainer's flags; of a whole command, what it does not state is the official default."""
    mapped = Mapped("command", {"video_sampling": "qwen_finetune"})
    flags = dict(flags)
    given = set(flags)
    whole = whole or "model_name_or_path" in flags
    lora = bool(typed("--lora_enable", flags.get("lora_enable", False), bool))
    if whole:
        defaults = COMMAND_DEFAULTS | (LORA_DEFAULTS if lora else TUNE_DEFAULTS)
        flags = {"lora_enable": False} | flags | {k: v for k, v in defaults.items() if k not in flags}
        mapped.recipe |= {"template": "qwen3_vl_video", "stage": "sft", "do_train": True}
    else:
        silent = [name for name in COMMAND_DEFAULTS if name.startswith("video_") and name not in flags]
        own = ", ".join(f"{name} {COMMAND_DEFAULTS[name]}" for name in silent)
        mapped.note("flags that are not given", own and f"the official trainer's own are not the model's: {own}")
    for name, raw in flags.items():
        if name not in COMMAND:
            mapped.note(name, NOTES["unknown"])
            continue
        entry = COMMAND[name]
        if isinstance(raw, list):
            raw = ",".join(raw)
        if "$" in str(raw):
            mapped.note(name, f"its value {raw} is not set in the text; left out")
            continue
        value = typed(f"--{name}", raw, entry.type)
        mapped.note(name, entry.note if entry.key is None or name in given else "")
        if name not in given and name != "lora_enable":
            mapped.note(name, f"not in the command; {value} is the official trainer's default")
        if lora and name in TUNE_DEFAULTS:
            mapped.note(name, NOTES["lora tune"])
        elif name == "warmup_ratio" and value >= 1:
            raise MappingError(f"--warmup_ratio is {value}; a share of all steps is below 1")
        elif name == "dataset_use" and "%" in str(value):
            mapped.note(name, NOTES["share"])
            mapped.recipe["dataset"] = re.sub(r"%[\d.]+", "", value)
        elif entry.key:
            mapped.recipe[entry.key] = TO_KEY.get(name, lambda same: same)(value)
    if lora:
        frozen = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False}
        mapped.recipe |= {**frozen, "lora_target": "q_proj,k_proj,v_proj,o_proj"}
        mapped.note("lora_enable", NOTES["lora"])
        if mapped.recipe.get("lora_dropout") == 0:
            mapped.recipe["lora_dropout"] = 0.05
            mapped.note("lora_dropout", NOTES["dropout"])
    if "vision_tower_lr" in flags and "mm_projector_lr" not in flags:
        mapped.note("vision_tower_lr", NOTES["lone vision"])
    if not lora and "tune_mm_mlp" in flags and "tune_mm_vision" in flags:
        parts = [mapped.recipe.get(key) for key in ("freeze_vision_tower", "freeze_multi_modal_projector")]
        if parts[0] != parts[1]:
            mapped.note("tune_mm_mlp", NOTES["deepstack"])
    for name in [name for name in variables or {} if name in ENVIRONMENT]:
        mapped.note(name, NOTES["variable"])
    return _ordered(mapped)


def _ordered(mapped: Mapped) -> Mapped:
    """Keys as recipes list them: model, data, sampling, what trains, the rest."""
    order = ["model_name_or_path", "template", "dataset", "cutoff_len", "dataloader_num_workers", "video_sampling",
             "video_fps", "video_min_frames", "video_max_frames", "video_max_pixels", "video_min_pixels",
             "video_total_pixels", "image_max_pixels", "image_min_pixels", "stage", "do_train"]  # fmt: skip
    order += [entry.key for entry in COMMAND.values() if entry.key and entry.key not in order]
    rank = {key: i for i, key in enumerate(order)}
    mapped.recipe = dict(sorted(mapped.recipe.items(), key=lambda item: rank.get(item[0], len(rank))))
    return mapped


def _items(value: Any) -> Iterator[dict[str, Any]]:
    """Clips and images of a content item, a message, or a list of messages."""
    if isinstance(value, list):
        for part in value:
            yield from _items(part)
    elif isinstance(value, dict):
        if {"video", "image", "image_url"} & value.keys() or value.get("type") in ("video", "image", "image_url"):
            yield value
        else:
            yield from _items(value.get("content", value.get("messages", value.get("conversations"))))


def read_message(value: Any) -> Mapped:
    """A content item, a message, or a list of messages; settings that all clips share become keys of the recipe."""
    mapped = Mapped("message", {"video_sampling": "qwen_vl_utils"})
    items = list(_items(value))
    if not items:
        raise MappingError(
            'no video and no image; an item is such as {"type": "video", "video": "clip.mp4", "fps": 2}'
        )
    images: dict[str, list[int]] = {}
    for item in items:
        if "video" in item or item.get("type") == "video":
            mapped.clips.append(_read_clip(item, mapped))
            continue
        for name in [name for name in item if name not in ("type", "image", "image_url")]:
            if name in ("min_pixels", "max_pixels"):
                images.setdefault(f"image_{name}", []).append(typed(name, item[name], int))
            else:
                mapped.note(name, "of an image: no counterpart here")
    for key, values in images.items():
        mapped.recipe[key] = values[0]
        differ = f"; here they differ, {values}" if len({*values}) > 1 else ""
        mapped.note(key, f"holds for all images of a data set{differ}")
    for key in RECIPE_WIDE:
        values = [clip.get(key) for clip in mapped.clips]
        if values and values[0] is not None and values.count(values[0]) == len(values):
            mapped.recipe[f"video_{key}"] = values[0]
            for clip in mapped.clips:
                del clip[key]
    if mapped.clips:
        mapped.note("do_resize", NOTES["do_resize"])
    return _ordered(mapped)


def _read_clip(item: dict[str, Any], mapped: Mapped) -> dict[str, Any]:
    item = {name: value for name, value in item.items() if name != "type" and value is not None}
    video = item.pop("video", "clip.mp4")
    pictures = isinstance(video, list)
    if not pictures and not isinstance(video, str):
        raise MappingError(f"video is {video!r}; it must be a path or a list of frames")
    clip: dict[str, Any] = {"frames": video} if pictures else {"path": video.removeprefix("file://")}
    if "fps" in item and "nframes" in item:
        raise MappingError("both fps and nframes are given; qwen-vl-utils accepts only one of them: take one out")
    if pictures:
        if not video:
            raise MappingError("video is an empty list of frames")
        rates = [typed(name, item.pop(name), float) for name in ("raw_fps", "sample_fps") if name in item]
        clip["frame_rate"] = rates[0] if rates else 2.0
        if not clip["frame_rate"] > 0:
            raise MappingError(f"sample_fps or raw_fps is {clip['frame_rate']:g}; it must be above 0")
        mapped.note("frame_rate", NOTES["frame_rate"])
    elif "sample_fps" in item:
        rate = item.pop("sample_fps")
        if not {"fps", "nframes"} & item.keys():
            item["fps"] = rate
            mapped.note("sample_fps", NOTES["sample_fps"])
        else:
            mapped.note("sample_fps", NOTES["sample_fps beside"])
    for name, value in item.items():
        entry = MESSAGE.get(name)
        if entry is None:
            mapped.note(name, f"not read by qwen-vl-utils for a {'list of frames' if pictures else 'file'}; left out")
        elif pictures and entry.key in ("fps", "nframes", "min_frames", "max_frames", "start", "end"):
            mapped.note(name, NOTES["pictures"])
        else:
            clip[entry.key] = typed(name, value, entry.type)
            mapped.note(name, entry.note)
    for name in ("min_pixels", "max_pixels", "total_pixels"):
        if {"resized_height", "resized_width"} <= clip.keys() and clip.pop(name, None) is not None:
            mapped.note(name, NOTES["resized"])
    _order_frames(clip, "", mapped)
    if ("resized_height" in clip) != ("resized_width" in clip):
        name = "resized_height" if "resized_height" in clip else "resized_width"
        del clip[name]
        mapped.note(name, NOTES["lone side"])
    return clip


def _order_frames(settings: dict[str, Any], prefix: str, mapped: Mapped) -> None:
    """Lower a minimum above the maximum, which qwen-vl-utils lets win without a word and a recipe refuses."""
    low, high = settings.get(f"{prefix}min_frames", 4), settings.get(f"{prefix}max_frames", 768)
    if low > high and "nframes" not in settings:
        settings[f"{prefix}min_frames"] = high
        mapped.note("min_frames", f"{low} is above max_frames {high}, which wins; {high} is written")


def read_environment(variables: dict[str, str], flags: dict[str, Any] | None = None) -> Mapped:
    """ms-swift's variables for Qwen3-VL, which it writes over qwen-vl-utils' own numbers."""
    mapped, flags = Mapped("environment", {"video_sampling": "qwen_vl_utils"}), dict(flags or {})
    if "model_kwargs" in flags:
        kwargs = parse_json(str(flags.pop("model_kwargs")))
        if not isinstance(kwargs, dict):
            raise MappingError(f"--model_kwargs is {kwargs!r}; it must be a JSON object")
        variables = variables | {key.upper(): str(value) for key, value in kwargs.items()}
    given = {name: value for name, value in variables.items() if name in ENVIRONMENT}
    if not given:
        raise MappingError(f"none of the variables is known; known are {', '.join(ENVIRONMENT)}")
    for name in (name for name in variables if name not in given):
        mapped.note(name, "not a variable that is known here; left out")
    for name, raw in given.items():
        entry = ENVIRONMENT[name]
        mapped.note(name, entry.note)
        if entry.key is None:
            continue
        value = typed(name, raw, entry.type)
        tokens = name.replace("_PIXELS", "_TOKEN_NUM")
        tokens = tokens if tokens.startswith(("VIDEO", "IMAGE")) else f"IMAGE_{tokens}"
        if name.endswith("_PIXELS") and tokens in given:
            mapped.note(name, f"{tokens} is given as well, and wins")
        elif name.endswith("_PIXELS"):
            mapped.recipe[entry.key] = value // _TOKEN * _TOKEN
        elif name.endswith("_TOKEN_NUM"):
            mapped.recipe[entry.key] = value * _TOKEN
        else:
            mapped.recipe[entry.key] = int(value * _TOKEN * 0.9) if name == "MODEL_SEQ_LEN" else value
    _order_frames(mapped.recipe, "video_", mapped)
    if "video_max_pixels" in mapped.recipe:
        # It replaces the 768 in max(min(768 tokens, ...), 1.05 * min_pixels), and not max_pixels of a message.
        low, high = mapped.recipe.get("video_min_pixels", _FRAME_TOKENS[0] * _TOKEN), mapped.recipe["video_max_pixels"]
        limit = int(low * 1.05)
        if high > _FRAME_TOKENS[1] * _TOKEN:
            mapped.note("VIDEO_MAX_TOKEN_NUM", NOTES["768"])
        if high < limit:
            mapped.recipe["video_max_pixels"] = limit
            mapped.note("VIDEO_MAX_TOKEN_NUM", NOTES["under"].format(high // _TOKEN, low // _TOKEN, limit))
    for name in flags:
        mapped.note(name, "a flag of ms-swift; its flags are not mapped, its variables are")
    return _ordered(mapped)


def read_recipe(value: Any) -> Mapped:
    """LLaMA-Factory's YAML, a stock one or a recipe of this plugin."""
    if not isinstance(value, dict):
        raise MappingError("not a recipe: lines of `key: value` are needed")
    recipe = {str(key): item for key, item in value.items() if item is not None}
    for key in [key for key in recipe if re.fullmatch(r"(video|image)_(fps|maxlen|\w+_(frames|pixels))", key)]:
        recipe[key] = typed(key, recipe[key], float if key == "video_fps" else int)
    mapped = Mapped("recipe", {"video_sampling": "llamafactory"} | recipe)
    if "video_sampling" not in recipe:
        mapped.note("video_sampling", NOTES["stock"])
    return mapped
