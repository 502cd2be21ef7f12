"""What made a model, in one JSON file (`run.json`) and in the model card of its folder.

Recipe as resolved, versions, fingerprints of the data, sampling, seeds, git revision, times and results. Nothing in it
names the machine or a folder of it, but for what the recipe itself names; secrets are written as "(given)".
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
import yaml
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import cached_file

from ..data.conversation import decode_clip
from .optimizer import MODULES, module_of

FILE = "run.json"
GIVEN = "(given)"  # stands for a secret
_PACKAGES = (
    *("llamafactory-video", "llamafactory", "transformers", "torch", "accelerate", "peft", "deepspeed", "torchao"),
    *("bitsandbytes", "av", "datasets"),
)
_BEGIN, _END = "<!-- llamafactory-video: run -->", "<!-- llamafactory-video: end of run -->"
_ROWS = 1000  # read from a data set at a time
_FILES = 2000  # asked for their sizes by a thread at a time
_THREADS = 16  # on a network file system the wait for an answer is what takes time
_SECRET = re.compile(r"(_|^)token$|api_?key|secret|password|webhook|credential", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_MEDIA = {"images": "pictures", "videos": "clips", "audios": "sounds"}
# Made by a run for itself; what is known of them is in `history`, and where a run is started again in its command.
_NO_RECIPE = ("resume_from_checkpoint", "local_rank")
_COVERS = {
    "sha256": "all records in order, as one JSON array of arrays of their columns (columns and keys in order of their "
    "names, no blanks, UTF-8), without the places that they come from; files by their path relative to media_dir, lists of numbers as the sha256 of int64, little-endian",
    "files_sha256": "a line `path<TAB>bytes` for each file, sorted; paths relative to media_dir; not what is in them",
}


# --- Recipe ----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A value as JSON and YAML hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AcceleratorConfig):
        usual = AcceleratorConfig().to_dict()
        return {key: v for key, v in _plain(value.to_dict()).items() if v != usual[key]} or None
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _hidden(value: Any, key: str = "") -> Any:
    """The same without secrets."""
    if isinstance(value, dict):
        return {k: _hidden(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_hidden(v, key) for v in value]
    if isinstance(value, str) and value:
        return GIVEN if _SECRET.search(key) else _URL_LOGIN.sub(GIVEN, value)
    return value


def _as_given(field: dataclasses.Field, value: Any) -> Any:
    """A parsed value as a recipe gives it: lists that LLaMA-Factory made of a text are that text again."""
    value = _plain(value)
    if field.name == "report_to":
        return value or "none"
    if field.name in ("fsdp", "debug"):
        return " ".join(value) if isinstance(value, list) else value
    if isinstance(value, list) and "list" not in str(field.type).lower():
        return ",".join(map(str, value))
    return value


def resolved_recipe(arguments: Sequence[Any]) -> dict[str, Any]:
    """The keys and values, as in a recipe, that differ from LLaMA-Factory's and transformers' defaults.

    Parsed again by `get_train_args` they give the same. Secrets are written as "(given)".

    Args:
        arguments: as `get_train_args` returns them: model, data, training, fine-tuning, generating.
    """
    model_args, data_args, training_args, finetuning_args = arguments[:4]
    recipe = {}
    for parsed in arguments:
        for field in dataclasses.fields(parsed):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = _as_given(field, getattr(parsed, field.name))
            if field.init and field.name not in _NO_RECIPE and (value or None) != (_as_given(field, default) or None):
                recipe[field.name] = value
    # What parsing fills in of itself from other keys, or turns round.
    filled = {
        "media_dir": data_args.dataset_dir,
        "packing": finetuning_args.stage == "pt",
        "label_names": ["labels"],
        "generation_max_length": data_args.cutoff_len,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not training_args.use_cpu,
        "fsdp_config": {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False},
    }
    for key, value in filled.items():
        if key in recipe and recipe[key] == value:
            del recipe[key]
    if finetuning_args.finetuning_type != "lora":
        recipe.pop("lora_alpha", None)
    given = getattr(model_args, "given_video_keys", None)
    if given is not None:
        for key in [k for k in recipe if re.match("(video|image)_(fps|maxlen|min_pixels|max_pixels)$", k)]:
            if key not in given or (key == "video_maxlen" and "video_max_frames" in recipe):
                del recipe[key]
    if data_args.packing:
        recipe["cutoff_len"] = data_args.cutoff_len + 1  # LLaMA-Factory takes one off
    return _hidden(recipe)


def _config_files(recipe: dict[str, Any]) -> dict[str, Any]:
    """Contents of the DeepSpeed file that the recipe names; FSDP's is in the recipe, for transformers reads it in."""
    name = recipe.get("deepspeed")
    with contextlib.suppress(OSError, ValueError):
        if isinstance(name, str):
            return {name: _hidden(json.loads(Path(name).read_text(encoding="utf-8")))}
    return {}


# --- Data ------------------------------------------------------------------------------------------------------------


def describe_data(dataset: Any, media_dir: str) -> dict[str, Any]:
    """Counts and fingerprints of a data set, as it is trained on.

    The same records with the same files give the same fingerprint wherever they lie below `media_dir`. Files are asked
    for their sizes and not read: 200,000 records take some seconds.

    Args:
        dataset: datasets.Dataset of `loader.FEATURES`, of LLaMA-Factory's columns, or packed.
    """
    if not isinstance(dataset, datasets.Dataset):
        return {"records": None, "why": "streaming: records are read as they are trained on, and have no fingerprint"}
    prefix = os.path.join(media_dir, "")
    digest, files = hashlib.sha256(b"["), {}
    seen: dict[str, set[str]] = {kind: set() for kind in _MEDIA.values()}
    columns = sorted(set(dataset.column_names) - {"_source"})
    for i, table in enumerate(dataset.with_format("arrow").iter(_ROWS)):
        values = []
        for name in columns:
            column = _values(table[name].combine_chunks())
            kind = _MEDIA.get(name.removeprefix("_"))
            if kind is not None:
                column = [row and [_media(item, prefix, seen[kind], files) for item in row] for row in column]
            values.append(column)
        text = json.dumps(
            list(zip(*values, strict=True)), ensure_ascii=False, separators=(",", ":"), default=_digest_of
        )
        digest.update((("," if i else "") + text[1:-1]).encode("utf-8", "surrogatepass"))
    digest.update(b"]")
    sizes = _file_sizes(files)
    listing = hashlib.sha256()
    for path, size in sorted(sizes.items()):
        listing.update(f"{path}\t{'missing' if size is None else size}\n".encode("utf-8", "surrogateescape"))
    named = {kind: len(paths) for kind, paths in seen.items() if paths}
    missing = sum(size is None for size in sizes.values())
    return {
        "records": len(dataset),
        "sha256": digest.hexdigest(),
        **named,
        "files": len(sizes),
        **({"files_missing": missing} if missing else {}),
        "files_bytes": sum(size or 0 for size in sizes.values()),
        "files_sha256": listing.hexdigest(),
        "hashes_cover": _COVERS,
    }


def _values(array: pa.Array) -> list[Any]:
    """As `to_pylist`, several times as fast; keys of structs sorted, lists of whole numbers as their sha256."""
    kind = array.type
    if pa.types.is_struct(kind):
        names = sorted(field.name for field in kind)
        fields = [_values(array.field(name)) for name in names]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_pylist()
        inner = array.values.slice(offsets[0], offsets[-1] - offsets[0])  # a batch shares its table's values
        spans = [(a - offsets[0], b - offsets[0]) for a, b in itertools.pairwise(offsets)]
        if pa.types.is_integer(kind.value_type) and not inner.null_count:
            numbers = inner.to_numpy().astype("<i8")
            rows = [hashlib.sha256(numbers[a:b]).hexdigest() for a, b in spans]
        else:
            items = _values(inner)
            rows = [items[a:b] for a, b in spans]
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    else:
        return array.to_pylist()
    if array.null_count:
        rows = [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _digest_of(value: Any) -> str:
    """What JSON cannot hold: bytes of pictures that lie in the data set itself."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _media(item: Any, prefix: str, seen: set[str], files: dict[str, str]) -> Any:
    """A clip or picture as it is hashed; notes it in `seen`, and its files, path below media_dir -> path."""
    if isinstance(item, str) and not item.startswith("{"):
        name = item.removeprefix(prefix)
        files[name] = item
        seen.add(name)
        return name
    if not isinstance(item, str):  # a picture of a hub's data set, which lies in the table itself
        seen.add(_digest_of(item["bytes"]))
        return {"bytes": item["bytes"]}
    clip = decode_clip(item)
    paths = clip.frames or (clip.path,)
    names = tuple(path.removeprefix(prefix) for path in paths)
    files.update(zip(names, paths, strict=True))
    seen.add("\n".join(names))
    return dataclasses.replace(clip, **({"frames": names} if clip.frames else {"path": names[0]})).encode()


def _file_sizes(files: Mapping[str, str]) -> dict[str, int | None]:
    """Bytes of each file, by its key; None where there is none."""

    def ask(names: list[str]) -> list[int | None]:
        sizes: list[int | None] = []
        for name in names:
            try:
                sizes.append(os.stat(files[name]).st_size)
            except OSError:
                sizes.append(None)
        return sizes

    names = list(files)
    parts = [names[i : i + _FILES] for i in range(0, len(names), _FILES)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, (size for sizes in pool.map(ask, parts) for size in sizes), strict=True))


# --- Everything else -------------------------------------------------------------------------------------------------


def describe_model(model: torch.nn.Module, model_args: Any) -> dict[str, Any]:
    """Name, revision and size of the model, and which parameters of each module are trained."""
    config = getattr(model, "config", None)
    name = model_args.model_name_or_path
    found: dict[str, Any] = {"name_or_path": name, "commit": getattr(config, "_commit_hash", None)}
    with contextlib.suppress(OSError, ValueError):
        options = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "local_files_only": True}
        found["config_sha256"] = hashlib.sha256(
            Path(cached_file(name, "config.json", **options)).read_bytes()
        ).hexdigest()
    counts = {module: {"parameters": 0, "trained": 0} for module in MODULES}
    for parameter_name, parameter in model.named_parameters():
        # ZeRO-3 leaves an empty parameter with its size beside it; bitsandbytes puts two 4-bit numbers into one.
        count = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        of_module = counts[module_of(parameter_name)]
        of_module["parameters"] += count
        of_module["trained"] += count * parameter.requires_grad
    total = {key: sum(of_module[key] for of_module in counts.values()) for key in ("parameters", "trained")}
    return {key: value for key, value in found.items() if value is not None} | total | {"modules": counts}


def describe_sampling(processor: Any) -> dict[str, Any]:
    """How clips and pictures are sampled: what the recipe and the model's processor files resolve to."""
    reader = getattr(processor, "clip_reader", None)
    sampling = {} if reader is None else {"clips": _plain(dataclasses.asdict(reader.sampling))}
    size = getattr(getattr(processor, "image_processor", None), "size", None)
    if size is not None:
        sampling["images"] = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    return sampling


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "os": platform.system()}
    with contextlib.suppress(OSError):
        found["os"] = platform.freedesktop_os_release()["PRETTY_NAME"]
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    found["torch"] = torch.__version__  # says more than the package: for what it was built
    for name, number in (("cuda", torch.version.cuda), ("hip", torch.version.hip)):
        if number:
            found[name] = number
    return found


def _machine(training_args: Any) -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    on_gpu = training_args.device.type == "cuda"
    processes = training_args.world_size
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return {
        "device": training_args.device.type,
        "gpus": {name: names.count(name) for name in sorted(set(names))} if on_gpu else {},
        "processes": processes,
        "nodes": -(-processes // here),
    }


def _seeds(training_args: Any) -> dict[str, Any]:
    return {
        "seed": training_args.seed,
        "data_seed": training_args.data_seed,
        "full_determinism": training_args.full_determinism,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _git() -> dict[str, Any] | None:
    """Revision of the working folder's repository, and whether files that it tracks differ from it."""

    def ask(*command: str) -> str:
        run = subprocess.run(["git", *command], capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        changes = ask("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return {"revision": ask("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_run(
    arguments: Sequence[Any],
    model: torch.nn.Module,
    processor: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    earlier: dict[str, Any] | None = None,
    step: int = 0,
    another: bool = False,
) -> dict[str, Any]:
    """What makes a model, at the begin of its training. Asked of one process.

    Args:
        arguments: as `get_train_args` returns them: model, data, training, fine-tuning, generating.
        processor: the model's, or None.
        eval_dataset: one, several by name, or None.
        earlier: the record of the run that it goes on from; its history is kept.
        step: the one from which it goes on.
        another: it goes on from another run, in a folder of its own.
    """
    model_args, data_args, training_args = arguments[:3]
    recipe = resolved_recipe(arguments)
    parts = {"train": train_dataset}
    if isinstance(eval_dataset, dict):
        parts |= {f"eval_{name}": part for name, part in eval_dataset.items()}
    else:
        parts["eval"] = eval_dataset
    data = {name: describe_data(part, data_args.media_dir) for name, part in parts.items() if part is not None}
    now = _now()
    record = {
        "started": now,
        "finished": None,
        "steps": step,
        "history": [],
        "recipe": recipe,
        "config_files": _config_files(recipe),
        "model": describe_model(model, model_args),
        "data": data,
        "sampling": describe_sampling(processor),
        "seeds": _seeds(training_args),
        "machine": _machine(training_args),
        "versions": _versions(),
        "git": _git(),
        "results": {},
    }
    record = {key: value for key, value in record.items() if value not in (None, {}) or key in ("finished", "results")}
    if earlier is not None and step > 0:
        resumed = {"time": now, "from_step": step, "changed": _changes(earlier, record)}
        if another:
            resumed["run_started"] = earlier.get("started")
        else:
            record["started"] = earlier.get("started", now)
        record["history"] = [*earlier.get("history", []), resumed]
    return record


def _changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run has otherwise, by the name of the value; of the recipe the key alone."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}")
        else:
            yield name, value

    sections = ("recipe", "config_files", "model", "data", "sampling", "seeds", "machine", "versions", "git")
    old, new = (dict(pair for key in sections for pair in flat(run.get(key), key)) for run in (before, after))
    return {
        key.removeprefix("recipe."): {"before": old.get(key), "now": new.get(key)}
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    }


def finished(record: dict[str, Any], steps: int, results: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that has ended.

    Args:
        results: of training and evaluation, as in all_results.json.
    """
    return {**record, "finished": _now(), "steps": steps, "results": _plain(results)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- Files -----------------------------------------------------------------------------------------------------------


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None if there is none that can be read."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json` into a folder, which is made if there is none."""
    _write(folder / FILE, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- Model card ------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def model_card_section(record: dict[str, Any]) -> str:
    """The record as Markdown for a person to read; `run.json` has all of it."""
    parts = ["## How this model was made", f"All values are in [`{FILE}`]({FILE})."]
    run = [("started", record["started"]), ("finished", record["finished"] or "no"), ("steps", record["steps"])]
    run += [(f"resumed from step {again['from_step']}", _resumed(again)) for again in record.get("history", [])]
    if "git" in record:
        run.append(("git", record["git"]["revision"] + (" with changes" if record["git"]["dirty"] else "")))
    machine = record["machine"]
    devices = ", ".join(f"{count} x {name} a node" for name, count in machine["gpus"].items()) or machine["device"]
    run.append(("machine", f"{devices}; processes: {machine['processes']}, nodes: {machine['nodes']}"))
    run.append(("seed", record["seeds"]["seed"]))
    parts.append(_table(("run", ""), run))

    text = yaml.safe_dump(record["recipe"], allow_unicode=True, sort_keys=False, width=1000)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    parts += ["### Recipe", "What differs from the defaults:", f"{fence}yaml\n{text}{fence}"]

    modules = [(name, part["parameters"], part["trained"]) for name, part in record["model"]["modules"].items()]
    parts += ["### Parameters", _table(("module", "parameters", "trained"), modules)]

    rows = [
        (name, *(part.get(key) or 0 for key in ("records", "clips", "pictures")), part.get("sha256", part.get("why")))
        for name, part in record["data"].items()
    ]
    parts += ["### Data", _table(("data set", "records", "clips", "pictures", "sha256 of the records"), rows)]

    sampling = [
        (f"{kind}: {key}", value)
        for kind, values in record.get("sampling", {}).items()
        for key, value in values.items()
        if value is not None
    ]
    if sampling:
        parts += ["### Sampling", _table(("sampling", ""), sampling)]
    if record["results"]:
        parts += ["### Results", _table(("result", ""), list(record["results"].items()))]
    parts += ["### Versions", _table(("package", "version"), list(record["versions"].items()))]
    return "\n\n".join(parts) + "\n"


def _resumed(again: dict[str, Any]) -> str:
    changed = (f"{key}: {change['before']} -> {change['now']}" for key, change in again["changed"].items())
    return f"{again['time']}; changed: {'; '.join(changed) or 'nothing'}"


def add_to_model_card(readme: Path, record: dict[str, Any]) -> None:
    """Put the record into a model card in place of an earlier one, or behind all that it says."""
    try:
        card = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        card = ""
    # The card's own text may hold no marks of ours; the record's may, inside its recipe.
    section = model_card_section(record).replace(_BEGIN, "").replace(_END, "")
    begin, end = card.find(_BEGIN), card.rfind(_END)
    if 0 <= begin < end:
        before, after = card[:begin], card[end + len(_END) :]
    else:
        before, after = card.rstrip() + "\n\n" if card.strip() else "", "\n"
    _write(readme, f"{before}{_BEGIN}\n{section}{_END}{after}")
