"""Settings of other tools -> a recipe of this plugin that means the same, and back.

Read are the official trainer's command, qwen-vl-utils' messages, ms-swift's environment variables and LLaMA-Factory's
YAML; written are a recipe, the official trainer's flags, or messages. Text goes in, a `Mapped` comes out. What has no
counterpart, or does not mean what its name suggests, is named in `Mapped.notes`; nothing is dropped without a word.

Sizes are those of Qwen3-VL: a visual token is 32 x 32 pixels of two frames, or of one image.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml

from ..video.dialects import resolve_sampling
from ..video.plan import plan_frames
from ..video.sampling import ClipInfo, FramePlan, Sampling, SamplingError
from ..video.sizes import utils_frame_bounds

SOURCES, TARGETS = ("command", "message", "environment", "recipe"), ("recipe", "command", "message")
EXAMPLE = ClipInfo(900, 60.0, 15.0, 720, 1280)
_TOKEN = 32 * 32
_FRAME_TOKENS = (128, 768)  # what qwen-vl-utils takes for granted of a frame
_IMAGE_BOUNDS = (65536, 16777216)  # pixels; from Qwen3-VL's preprocessor_config.json
# Qwen3-VL's video processor, from its video_preprocessor_config.json.
_SIZE = SimpleNamespace(shortest_edge=4096, longest_edge=25165824)
_PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
_PROCESSOR = SimpleNamespace(fps=2.0, min_frames=4, max_frames=768, size=_SIZE, **_PATCHES)


class MappingError(ValueError):
    """A text that cannot be read, or settings that contradict each other."""


class ExampleError(MappingError):
    """Settings that are right in themselves, and cannot be shown of the example clip."""


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
_BATCH = "no key: how a batch is laid out does not change the loss, and here it is padded"
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
    "data_flatten": Entry(None, bool, _BATCH),
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


# What the official trainer takes where its command is silent, and LLaMA-Factory where a recipe is.
_COMMAND_DEFAULTS = {
    "model_max_length": 512, "video_fps": 2, "video_min_frames": 4, "video_max_frames": 8,
    "video_max_pixels": 1024 * 28 * 28, "video_min_pixels": 256 * 28 * 28, "max_pixels": 576 * 28 * 28,
    "min_pixels": 16 * 28 * 28, "gradient_checkpointing": False,
}  # fmt: skip
_TUNE_DEFAULTS = {"tune_mm_vision": False, "tune_mm_mlp": False, "tune_mm_llm": False}
_LORA_DEFAULTS = {"lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
_RECIPE_DEFAULTS = {
    "finetuning_type": "lora", "cutoff_len": 2048, "freeze_vision_tower": True, "freeze_multi_modal_projector": True,
    "freeze_language_model": False, "disable_gradient_checkpointing": False,
}  # fmt: skip
_ZERO3 = ("./scripts/zero3.json", "recipes/deepspeed_zero3.json")  # there, here
_TO_KEY: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["tune_mm_vision", "tune_mm_mlp", "tune_mm_llm", "gradient_checkpointing"], lambda on: not on),
    "lora_enable": lambda on: "lora" if on else "full",
    "deepspeed": lambda path: _ZERO3[1] if re.search(r"(^|/)zero3\.json$", str(path)) else path,
}
_TO_FLAG = {**_TO_KEY, "lora_enable": lambda kind: kind == "lora"}
_TO_FLAG["deepspeed"] = lambda path: _ZERO3[0] if path == _ZERO3[1] else path
_FLAG_OF = {entry.key: flag for flag, entry in COMMAND.items() if entry.key and flag != "warmup_steps"}
_HERE_ONLY = {
    **dict.fromkeys(["template", "stage", "do_train"], "goes without saying in the official trainer"),
    **dict.fromkeys(["dataset_dir", "media_dir"], "paths stand in qwenvl/data/__init__.py of the official trainer"),
    "plot_loss": "no counterpart; training_loss.png is made by LLaMA-Factory",
    "lora_target": "the official trainer's are fixed: q_proj, k_proj, v_proj, o_proj",
    "video_timestamps": "the official trainer knows index alone: frame number / average rate",
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
_RECIPE_WIDE = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")
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
_SAMPLING = re.compile(r"video_(sampling|fps|maxlen|total_pixels|(min|max)_(frames|pixels))|image_(min|max)_pixels")
_SAID = {
    "lora tune": "the official code ignores it with lora_enable, which freezes all but its adapters",
    "lora": "the official adapters sit on the language model's attention alone",
    "dropout": "the official code takes 0 for not given, and trains with 0.05",
    "share": "a share after % has no counterpart; all records are used (max_samples: a number of them)",
    "lone vision": "the official code ignores it without mm_projector_lr; here it holds, unless you take it out",
    "deepstack": "here the deepstack mergers train with the projector, in the official code with the vision tower",
    "variable": "an environment variable, which the official trainer does not read; left out",
    "unknown": "not a flag of the official trainer that is known here; left out",
    "projector": "added, as learning_rate: without it the official code ignores vision_tower_lr",
    "flatten": "no key of a recipe; True is how the official command has it, and does not change the loss",
    "do_resize": "qwen-vl-utils resizes first: elsewhere tell the processor do_resize=False, or it resizes again; "
    "here that is seen to",
    "frame_rate": "pictures per second, from raw_fps, else sample_fps, else 2; their times follow it",
    "sample_fps": "qwen-vl-utils does not read it for a file and takes 2 without a word; taken as fps",
    "sample_fps beside": "qwen-vl-utils does not read it for a file; left out, since fps or nframes is given",
    "pictures": "not read for a list of frames, all of which are shown; left out",
    "resized": "has no effect beside resized_height and resized_width; left out",
    "lone side": "qwen-vl-utils reads it only with its fellow; left out",
    "twice": "LLaMA-Factory resizes twice and truncates frame numbers; a message does neither",
    "budget": "a message cannot bound a whole clip exactly: total_pixels is half as much, since it counts two frames "
    "as one, and a frame has at most 768 tokens and may have 1.05 * min_pixels",
    "768": "above 768 it cannot be said here: a frame has at most 768 tokens",
    "stock": "not given, so as in LLaMA-Factory: pixels count one frame, before a second resize by the processor",
    "clip-wide": "the official trainer bounds the whole clip, not a frame: {} to {} is right for clips of {} frames, "
    "as the example has, and for no other",
    "denser": "clips shorter than {:g} s are sampled more densely than {:g} frames/s; one with fewer frames than {} "
    "keeps what it has",
    "over": "{} is over the limit of a frame and has no effect: with {} frames the limit is {:.0f}",
    "under": "{} has no effect below 1.05 * VIDEO_MIN_TOKEN_NUM ({}): the limit is {} pixels. For fewer, lower "
    "VIDEO_MIN_TOKEN_NUM too",
    "each frame": "counts each frame here, and the whole clip in the official command: a number copied from there "
    "asks for up to as many times the tokens as there are frames",
}  # fmt: skip


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
        value = _parse_yaml(text) if kind == "recipe" else _parse_json(text)
        return read_recipe(value) if kind == "recipe" else read_message(value)
    variables, flags, whole = _shell(text)
    if kind == "environment":
        return read_environment(variables, flags)
    # A variable that the script itself uses is its own affair, whatever its name.
    variables = {name: value for name, value in variables.items() if not re.search(rf"\$\{{?{name}\b", text)}
    return read_command(flags, whole, variables)


def _recognise(text: str) -> str:
    if text.lstrip()[0] in "[{":
        value = _parse_json(text)
        named = {"type", "role", "content", "messages", "video", "image"}
        return "recipe" if isinstance(value, dict) and not named & value.keys() else "message"
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict) and all(re.fullmatch(r"\w+", str(key)) for key in value):
            return "recipe"
    except yaml.YAMLError:
        pass
    variables, flags, _ = _shell(text)
    swift = re.search(r"^[^#]*\b(swift|megatron)\s+(sft|pt|rlhf|infer)\b", text, re.M)
    if COMMAND.keys() & flags.keys() and not swift:
        return "command"
    if ENVIRONMENT.keys() & variables.keys() or "model_kwargs" in flags:
        return "environment"
    raise MappingError(
        "not recognised as the official trainer's flags, a qwen-vl-utils message, environment variables or a YAML "
        f"recipe; it begins {text.strip()[:40]!r}. --from says which it is"
    )


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MappingError(f"not YAML: {' '.join(str(error).split())}") from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MappingError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno} (numbers are written out, such as "
            "20971520 for 20480*32*32; strings stand in double quotes)"
        ) from error


def _typed(name: str, value: Any, kind: type) -> Any:
    """A value of that type, from text or from JSON.

    Raises:
        MappingError: if it is none.
    """
    if isinstance(value, str) and kind is not str:
        product = re.fullmatch(r"\d+(\s*\*\s*\d+)+", value.strip())
        value = math.prod(int(part) for part in value.split("*")) if product else _scalar(value)
    if kind is str:
        return _scalar(value) if isinstance(value, str) else value
    if kind is bool and not isinstance(value, bool):
        raise MappingError(f"{name} is {value!r}; it must be True or False")
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MappingError(f"{name} is {value!r}; it must be a number")
        if value == int(value):
            return int(value)
        if kind is int:
            raise MappingError(f"{name} is {value!r}; it must be a whole number")
    return value


def _scalar(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", text):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _shell(text: str) -> tuple[dict[str, str], dict[str, Any], bool]:
    """Variables, flags, and whether a script is started: a shell script, read as far as such commands go."""
    text = re.sub(r"\\[ \t]*(#.*)?\r?$", " ", text, flags=re.M)  # people put remarks behind a continuation
    text = re.sub(r"\$\(\(([\d\s*]+)\)\)", lambda found: "".join(found[1].split()), text)
    text = re.sub(r"\$\([^()]*\)|`[^`\n]*`", "$__OUTPUT_OF_A_COMMAND__", text)
    text = re.sub(r"(?<!\S)[\d&]*>>?&?[ \t]*[^\s|;&]+", " ", text)  # 2>&1, > train.log
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    variables: dict[str, str] = {}
    words: list[str] = []
    opened = filling = None  # names of a variable that was given nothing yet, and of an array

    def expand(word: str) -> str:
        return re.sub(
            r"\$\{(\w+)(?:\[[@*]\])?(?::?-([^}]*))?\}|\$(\w+)",
            lambda found: variables.get(found[1] or found[3], found[0] if found[2] is None else found[2]),
            word,
        )

    try:
        for token in lexer:
            assignment = re.fullmatch(r"(\w+)(\+?)=(.*)", token, re.S)
            if filling:
                variables[filling] += f" {shlex.quote(expand(token))}" if token != ")" else ""
                filling = None if token == ")" else filling
            elif token == "(" and opened:
                filling = opened
            elif assignment:
                name, more, value = assignment.groups()
                variables[name] = (variables.get(name, "") if more else "") + expand(value)
                opened = None if value else name
                continue
            elif re.fullmatch(r"\$\{?\w+(\[[@*]\])?\}?", token):
                words += shlex.split(expand(token))
            else:
                words.append(expand(token))
            opened = None
    except ValueError as error:
        raise MappingError(f"not a command line: {str(error).lower()}") from error
    is_script = re.compile(r"(?!--).*\.py")
    after_flag = [False, *(bool(re.fullmatch(r"--[^=]+", word)) for word in words)]
    starts = [i for i, word in enumerate(words) if is_script.fullmatch(word) and not after_flag[i]]
    flags: dict[str, Any] = {}
    name = None
    for word in words[starts[-1] + 1 if starts else 0 :]:
        if flags and re.fullmatch(r"[;&|<>()]+", word):
            break  # 2>&1 | tee log
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = [value] if equals else []
        elif name:
            flags[name].append(word)
    lone = {name: values[0] if len(values) == 1 else values or "True" for name, values in flags.items()}
    return variables, lone, bool(starts)


def read_command(flags: dict[str, Any], whole: bool = True, variables: dict[str, str] | None = None) -> Mapped:
    """The official trainer's flags; of a whole command, what it does not state is the official default."""
    mapped = Mapped("command", {"video_sampling": "qwen_finetune"})
    flags = dict(flags)
    given = set(flags)
    whole = whole or "model_name_or_path" in flags
    lora = bool(_typed("--lora_enable", flags.get("lora_enable", False), bool))
    if whole:
        defaults = _COMMAND_DEFAULTS | (_LORA_DEFAULTS if lora else _TUNE_DEFAULTS)
        flags = {"lora_enable": False} | flags | {k: v for k, v in defaults.items() if k not in flags}
        mapped.recipe |= {"template": "qwen3_vl_video", "stage": "sft", "do_train": True}
    else:
        silent = [name for name in _COMMAND_DEFAULTS if name.startswith("video_") and name not in flags]
        own = ", ".join(f"{name} {_COMMAND_DEFAULTS[name]}" for name in silent)
        mapped.note("flags that are not given", own and f"the official trainer's own are not the model's: {own}")
    for name, raw in flags.items():
        if name not in COMMAND:
            mapped.note(name, _SAID["unknown"])
            continue
        entry = COMMAND[name]
        if isinstance(raw, list):
            raw = ",".join(raw)
        if "$" in str(raw):
            mapped.note(name, f"its value {raw} is not set in the text; left out")
            continue
        value = _typed(f"--{name}", raw, entry.type)
        mapped.note(name, entry.note if entry.key is None or name in given else "")
        if name not in given and name != "lora_enable":
            mapped.note(name, f"not in the command; {value} is the official trainer's default")
        if lora and name in _TUNE_DEFAULTS:
            mapped.note(name, _SAID["lora tune"])
        elif name == "warmup_ratio" and value >= 1:
            raise MappingError(f"--warmup_ratio is {value}; a share of all steps is below 1")
        elif name == "dataset_use" and "%" in str(value):
            mapped.note(name, _SAID["share"])
            mapped.recipe["dataset"] = re.sub(r"%[\d.]+", "", value)
        elif entry.key:
            mapped.recipe[entry.key] = _TO_KEY.get(name, lambda same: same)(value)
    if lora:
        frozen = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True, "freeze_language_model": False}
        mapped.recipe |= {**frozen, "lora_target": "q_proj,k_proj,v_proj,o_proj"}
        mapped.note("lora_enable", _SAID["lora"])
        if mapped.recipe.get("lora_dropout") == 0:
            mapped.recipe["lora_dropout"] = 0.05
            mapped.note("lora_dropout", _SAID["dropout"])
    if "vision_tower_lr" in flags and "mm_projector_lr" not in flags:
        mapped.note("vision_tower_lr", _SAID["lone vision"])
    if not lora and "tune_mm_mlp" in flags and "tune_mm_vision" in flags:
        parts = [mapped.recipe.get(key) for key in ("freeze_vision_tower", "freeze_multi_modal_projector")]
        if parts[0] != parts[1]:
            mapped.note("tune_mm_mlp", _SAID["deepstack"])
    for name in [name for name in variables or {} if name in ENVIRONMENT]:
        mapped.note(name, _SAID["variable"])
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


def to_command(mapped: Mapped, info: ClipInfo = EXAMPLE) -> dict[str, Any]:
    """The official trainer's flags; what they cannot say is noted."""
    clip = mapped.clips[0] if mapped.clips else {}
    sampling = mapped.sampling(clip)
    # Where pixels count a frame, the whole clip's depend on how many frames it has: on the example's.
    plan = None if sampling.dialect == "qwen_finetune" else mapped.plan(info, clip)
    recipe, training = dict(mapped.recipe), "stage" in mapped.recipe or "do_train" in mapped.recipe
    if training:
        missing = dict(_RECIPE_DEFAULTS)
        if recipe.get("finetuning_type", "lora") == "lora":
            rank = recipe.get("lora_rank", 8)
            missing |= {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
        for key in [key for key in missing if key not in recipe]:
            recipe[key] = missing[key]
            mapped.note(key, f"not in the recipe; {missing[key]} is LLaMA-Factory's default")
    lora = training and recipe["finetuning_type"] == "lora"
    flags = _sampling_flags(mapped, sampling, plan)
    for key, value in recipe.items():
        if _SAMPLING.fullmatch(key):
            continue
        flag = _FLAG_OF.get(key)
        if key == "warmup_steps" and _typed(key, value, float) >= 1:
            flag = key
        if lora and flag in _TUNE_DEFAULTS:
            if value != (flag != "tune_mm_llm"):
                mapped.note(key, f"{value}: the official LoRA trains the language model's attention alone")
        elif not lora and key.startswith("lora_"):
            mapped.note(key, "only for LoRA")
        elif flag is None:
            mapped.note(key, _HERE_ONLY.get(key, "no counterpart in the official trainer"))
        elif flag == "lora_enable" and value not in ("lora", "full"):
            mapped.note(key, f"{value} has no counterpart in the official trainer")
        elif (flag, value) != ("lora_enable", "full"):
            flags[flag] = _TO_FLAG.get(flag, lambda same: same)(value)
    if lora and not flags["lora_dropout"]:
        mapped.note("lora_dropout", _SAID["dropout"])
    if "vision_tower_lr" in flags and "mm_projector_lr" not in flags:
        flags["mm_projector_lr"] = flags.get("learning_rate", 5e-5)
        mapped.note("mm_projector_lr", _SAID["projector"])
    if training:
        flags |= {"data_flatten": True, "data_packing": False}
        mapped.note("data_flatten", _SAID["flatten"])
    for setting in sorted({key for own in mapped.clips for key in own} - {"path"}):
        mapped.note(setting, "of a single clip: the official trainer has no such setting")
    written = {key: value for key, value in flags.items() if key.startswith("video_")}
    _compare(mapped, Mapped("command", {"video_sampling": "qwen_finetune", **written}), info)
    return flags


def _sampling_flags(mapped: Mapped, sampling: Sampling, plan: FramePlan | None) -> dict[str, Any]:
    """The flags on sampling, all of them: where a recipe is silent, the official trainer's defaults are others."""
    least, most = sampling.min_pixels, sampling.max_pixels
    if plan is not None:
        frames = len(plan.indices)
        if sampling.dialect == "qwen_vl_utils":
            least, limit = utils_frame_bounds(sampling, frames)
            most = min(limit, most or limit)
        if sampling.resized_height is not None:
            least = most = plan.height * plan.width
        least, most = least * frames, int(most * frames)
        if sampling.dialect == "llamafactory":  # its second resize is clip-wide
            least = max(least, sampling.processor_min_pixels)
            most = max(least, min(most, sampling.processor_max_pixels))
        mapped.note("video_max_pixels", _SAID["clip-wide"].format(least, most, frames))
    images = sampling.image_bounds or _IMAGE_BOUNDS
    return {
        "video_fps": int(sampling.fps) if sampling.fps == int(sampling.fps) else sampling.fps,
        "video_min_frames": sampling.nframes or sampling.min_frames,
        "video_max_frames": sampling.nframes or sampling.max_frames,
        "video_min_pixels": least,
        "video_max_pixels": most,
        "min_pixels": mapped.recipe.get("image_min_pixels", images[0]),
        "max_pixels": mapped.recipe.get("image_max_pixels", images[1]),
    }


def command_text(flags: dict[str, Any]) -> str:
    """Flags as a command; one that trains begins with torchrun."""
    start = ['torchrun --nproc_per_node="$NPROC_PER_NODE" qwenvl/train/train_qwen.py']
    start = start if "data_flatten" in flags else []
    lines = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return " \\\n    ".join([*start, *lines])


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
                images.setdefault(f"image_{name}", []).append(_typed(name, item[name], int))
            else:
                mapped.note(name, "of an image: no counterpart here")
    for key, values in images.items():
        mapped.recipe[key] = values[0]
        differ = f"; here they differ, {values}" if len({*values}) > 1 else ""
        mapped.note(key, f"holds for all images of a data set{differ}")
    for key in _RECIPE_WIDE:
        values = [clip.get(key) for clip in mapped.clips]
        if values and values[0] is not None and values.count(values[0]) == len(values):
            mapped.recipe[f"video_{key}"] = values[0]
            for clip in mapped.clips:
                del clip[key]
    if mapped.clips:
        mapped.note("do_resize", _SAID["do_resize"])
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
        rates = [_typed(name, item.pop(name), float) for name in ("raw_fps", "sample_fps") if name in item]
        clip["frame_rate"] = rates[0] if rates else 2.0
        if not clip["frame_rate"] > 0:
            raise MappingError(f"sample_fps or raw_fps is {clip['frame_rate']:g}; it must be above 0")
        mapped.note("frame_rate", _SAID["frame_rate"])
    elif "sample_fps" in item:
        rate = item.pop("sample_fps")
        if not {"fps", "nframes"} & item.keys():
            item["fps"] = rate
            mapped.note("sample_fps", _SAID["sample_fps"])
        else:
            mapped.note("sample_fps", _SAID["sample_fps beside"])
    for name, value in item.items():
        entry = MESSAGE.get(name)
        if entry is None:
            mapped.note(name, f"not read by qwen-vl-utils for a {'list of frames' if pictures else 'file'}; left out")
        elif pictures and entry.key in ("fps", "nframes", "min_frames", "max_frames", "start", "end"):
            mapped.note(name, _SAID["pictures"])
        else:
            clip[entry.key] = _typed(name, value, entry.type)
            mapped.note(name, entry.note)
    for name in ("min_pixels", "max_pixels", "total_pixels"):
        if {"resized_height", "resized_width"} <= clip.keys() and clip.pop(name, None) is not None:
            mapped.note(name, _SAID["resized"])
    _order_frames(clip, "", mapped)
    if ("resized_height" in clip) != ("resized_width" in clip):
        name = "resized_height" if "resized_height" in clip else "resized_width"
        del clip[name]
        mapped.note(name, _SAID["lone side"])
    return clip


def _order_frames(settings: dict[str, Any], prefix: str, mapped: Mapped) -> None:
    """Lower a minimum above the maximum, which qwen-vl-utils lets win without a word and a recipe refuses."""
    low, high = settings.get(f"{prefix}min_frames", 4), settings.get(f"{prefix}max_frames", 768)
    if low > high and "nframes" not in settings:
        settings[f"{prefix}min_frames"] = high
        mapped.note("min_frames", f"{low} is above max_frames {high}, which wins; {high} is written")


def to_message(mapped: Mapped, info: ClipInfo = EXAMPLE) -> dict[str, Any] | list[dict[str, Any]]:
    """The content item of each clip, one alone as it is; what messages cannot say is noted."""
    names = {entry.key: name for name, entry in MESSAGE.items()}
    counts = ("fps", "min_frames", "max_frames")
    items = []
    for clip in mapped.clips or [{"path": "clip.mp4"}]:
        settings = _message_settings(mapped, clip, info) | {names[key]: clip[key] for key in clip if key in names}
        if "frames" in clip or "nframes" in settings:
            settings = {key: value for key, value in settings.items() if key not in counts}
        if "frames" in clip:
            settings = {"sample_fps": clip["frame_rate"], **settings}
        item = {"type": "video", "video": clip.get("path", clip.get("frames")), **settings}
        items.append({k: int(v) if isinstance(v, float) and v == int(v) else v for k, v in item.items()})
    for key, value in mapped.recipe.items():
        if key.startswith("image_"):
            mapped.note(key, f"stands in the item of each image, as {key.removeprefix('image_')}: {value}")
        elif not _SAMPLING.fullmatch(key):
            mapped.note(key, "not a matter of messages; left out")
    result = items[0] if len(items) == 1 else items
    if mapped.source != "message":
        _compare(mapped, read_message(result), info)
    return result


def _message_settings(mapped: Mapped, clip: dict[str, Any], info: ClipInfo) -> dict[str, Any]:
    """The recipe's settings, under the names that a content item has for them."""
    if mapped.dialect == "qwen_vl_utils":
        given = {key.removeprefix("video_"): value for key, value in mapped.recipe.items() if key.startswith("video_")}
        given |= {"max_frames": given["maxlen"]} if "maxlen" in given else {}
        return {key: given[key] for key in _RECIPE_WIDE if key in given}
    sampling = mapped.sampling(clip)
    settings = {"fps": sampling.fps, "min_frames": sampling.min_frames, "max_frames": sampling.max_frames}
    if mapped.dialect == "llamafactory":
        mapped.note("video_max_pixels", _SAID["twice"])
        return settings | {"min_pixels": sampling.min_pixels, "max_pixels": sampling.max_pixels}
    frames = len(mapped.plan(info, clip).indices)
    least = math.ceil(sampling.min_pixels / frames)
    mapped.note("video_max_pixels", _SAID["budget"])
    mapped.note("video_min_pixels", f"a message bounds frames: {least} is right for clips of {frames} frames")
    return settings | {"min_pixels": least, "total_pixels": sampling.max_pixels // 2}


def read_environment(variables: dict[str, str], flags: dict[str, Any] | None = None) -> Mapped:
    """ms-swift's variables for Qwen3-VL, which it writes over qwen-vl-utils' own numbers."""
    mapped, flags = Mapped("environment", {"video_sampling": "qwen_vl_utils"}), dict(flags or {})
    if "model_kwargs" in flags:
        kwargs = _parse_json(str(flags.pop("model_kwargs")))
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
        value = _typed(name, raw, entry.type)
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
            mapped.note("VIDEO_MAX_TOKEN_NUM", _SAID["768"])
        if high < limit:
            mapped.recipe["video_max_pixels"] = limit
            mapped.note("VIDEO_MAX_TOKEN_NUM", _SAID["under"].format(high // _TOKEN, low // _TOKEN, limit))
    for name in flags:
        mapped.note(name, "a flag of ms-swift; its flags are not mapped, its variables are")
    return _ordered(mapped)


def read_recipe(value: Any) -> Mapped:
    """LLaMA-Factory's YAML, a stock one or a recipe of this plugin."""
    if not isinstance(value, dict):
        raise MappingError("not a recipe: lines of `key: value` are needed")
    recipe = {str(key): item for key, item in value.items() if item is not None}
    for key in [key for key in recipe if re.fullmatch(r"(video|image)_(fps|maxlen|\w+_(frames|pixels))", key)]:
        recipe[key] = _typed(key, recipe[key], float if key == "video_fps" else int)
    mapped = Mapped("recipe", {"video_sampling": "llamafactory"} | recipe)
    if "video_sampling" not in recipe:
        mapped.note("video_sampling", _SAID["stock"])
    return mapped


def shown(plan: FramePlan) -> dict[str, Any]:
    """A plan in numbers: frames, size in pixels (h, w), grid in patches (t, h, w), visual tokens, times in seconds."""
    return {
        "frames": len(plan.indices), "size": [plan.height, plan.width], "grid": list(plan.grid),
        "tokens": plan.num_tokens, "first_times": [round(time, 2) for time in plan.timestamps[:3]],
    }  # fmt: skip


def shown_text(plan: FramePlan) -> str:
    numbers = shown(plan)
    times = ", ".join(f"{time:.1f}" for time in plan.timestamps[:3])
    return (
        f"{numbers['frames']} frames of {plan.height} x {plan.width} (h x w), grid {numbers['grid']}, "
        f"{numbers['tokens']} visual tokens, first times {times} s"
    )


def _compare(mapped: Mapped, other: Mapped, info: ClipInfo) -> None:
    """Say whether the first clip is shown alike under what was read and under what is written."""
    try:
        own = mapped.plan(info, mapped.clips[0] if mapped.clips else None)
    except ExampleError as error:
        return mapped.note("example clip", str(error))
    try:
        theirs = other.plan(info, other.clips[0] if other.clips else None)
    except MappingError as error:
        mapped.note("example clip", f"here {shown_text(own)}; there {error}")
        return
    there = shown_text(theirs)
    if (own.indices, own.grid, own.timestamps) == (theirs.indices, theirs.grid, theirs.timestamps):
        there = "the same frames, size and times"
    elif own.indices != theirs.indices:
        there += ", other frames"
    mapped.note("example clip", f"here {shown_text(own)}; there {there}")


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
            mapped.note("video_min_frames", _SAID["denser"].format(seconds, sampling.fps, sampling.min_frames))
        if sampling.dialect == "qwen_vl_utils" and sampling.max_pixels:
            frames = len(plan.indices)
            limit = utils_frame_bounds(sampling, frames)[1]
            if sampling.max_pixels > limit:
                mapped.note("max_pixels", _SAID["over"].format(sampling.max_pixels, frames, limit))
    if mapped.dialect == "llamafactory":
        numbers = {key: value for key, value in mapped.recipe.items() if _SAMPLING.fullmatch(key)}
        for dialect in ("qwen_finetune", "qwen_vl_utils"):
            try:
                text = shown_text(Mapped("recipe", numbers | {"video_sampling": dialect}).plan(info))
            except MappingError as error:
                text = str(error)
            mapped.note(f"video_sampling: {dialect}", f"the same numbers would mean, for the example clip: {text}")
        if "video_max_pixels" in mapped.recipe:
            mapped.note("video_max_pixels", _SAID["each frame"])
    return plans


def convert(text: str, kind: str | None = None, target: str = "recipe", info: ClipInfo = EXAMPLE) -> dict[str, Any]:
    """All that `lmf-video map` tells.

    Args:
        kind: one of `SOURCES`, or None to recognise it.
        target: one of `TARGETS`.
        info: length, rate and size of the clip that serves as an example.

    Returns:
        `from`, `to`, `result` (keys, flags, or content items), `clips` (settings in records), `example` (what is shown
        of the clip, for each of `clips`), and `notes`, pairs of a name and what must be known about it.

    Raises:
        MappingError: if the text cannot be read, or contradicts itself.
    """
    mapped = read(text, kind)
    plans = clip_plans(mapped, info)
    write = {"recipe": lambda *_: mapped.recipe, "command": to_command, "message": to_message}[target]
    result = write(mapped, info)
    return {
        "from": mapped.source, "to": target, "result": result, "clips": mapped.clips,
        "example": [{"text": shown_text(plan), **shown(plan)} for plan in plans], "notes": mapped.notes,
    }  # fmt: skip


def result_text(told: dict[str, Any]) -> str:
    """The result alone, as YAML, a command or JSON."""
    if told["to"] == "message":
        return json.dumps(told["result"], ensure_ascii=False, indent=2)
    if told["to"] == "command":
        return command_text(told["result"])
    return yaml.safe_dump(told["result"], sort_keys=False, allow_unicode=True, width=1000).rstrip()


def remarks(told: dict[str, Any], info: ClipInfo) -> list[str]:
    """What is to be said beside the result, a line each."""
    lines = []
    if told["to"] == "recipe" and any(clip.keys() - {"path"} for clip in told["clips"]):
        lines += ["In the records, what is set for single clips:"]
        lines += [f'  "video": {json.dumps(clip, ensure_ascii=False)}' for clip in told["clips"]]
    lines.append(f"Example clip, {info.duration:g} s at {info.fps:g} frames/s, {info.width} x {info.height}:")
    lines += [f"  {plan['text']}" for plan in told["example"]]
    said: dict[str, list[str]] = {}  # what holds for several names is said once
    for name, text in told["notes"]:
        said.setdefault(text, []).append(name)
    return lines + [f"{', '.join(names)}: {text}" for text, names in said.items()]
