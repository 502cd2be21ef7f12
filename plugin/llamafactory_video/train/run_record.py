"""What made a model, in one JSON file (`run.json`) and in the model card of its folder.

Recipe as resolved, versions, fingerprints of the data, sampling, seeds, git revision, times and results. Nothing in it
names the machine or a folder of it, but for what the recipe itself names; secrets are written as "(given)".
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import cached_file

from ..families import MODULES, module_of
from .fingerprint import describe_data

FILE = "run.json"
GIVEN = "(given)"  # stands for a secret
_PACKAGES = (
    *("llamafactory-video", "llamafactory", "transformers", "torch", "accelerate", "peft", "deepspeed", "torchao"),
    *("bitsandbytes", "av", "datasets"),
)
_SECRET = re.compile(r"(_|^)token$|api_?key|secret|password|webhook|credential", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def plain(value: Any) -> Any:
    """A value as JSON and YAML hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AcceleratorConfig):
        usual = AcceleratorConfig().to_dict()
        return {key: v for key, v in plain(value.to_dict()).items() if v != usual[key]} or None
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def without_secrets(value: Any, key: str = "") -> Any:
    """The same without secrets."""
    if isinstance(value, dict):
        return {k: without_secrets(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [without_secrets(v, key) for v in value]
    if isinstance(value, str) and value:
        return GIVEN if _SECRET.search(key) else _URL_LOGIN.sub(GIVEN, value)
    return value


def _config_files(recipe: dict[str, Any]) -> dict[str, Any]:
    """Contents of the DeepSpeed file that the recipe names; FSDP's is in the recipe, for transformers reads it in."""
    name = recipe.get("deepspeed")
    with contextlib.suppress(OSError, ValueError):
        if isinstance(name, str):
            return {name: without_secrets(json.loads(Path(name).read_text(encoding="utf-8")))}
    return {}


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
    sampling = {} if reader is None else {"clips": plain(dataclasses.asdict(reader.sampling))}
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
    recipe: dict[str, Any],
    model_args: Any,
    data_args: Any,
    training_args: Any,
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
        recipe: keys and values, without secrets.
        model_args, data_args, training_args: what it was parsed into.
        processor: the model's, or None.
        eval_dataset: one, several by name, or None.
        earlier: the record of the run that it resumes; its history is kept.
        step: the one from which it resumes.
        another: it resumes another run, in a new folder.
    """
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
    return {**record, "finished": _now(), "steps": steps, "results": plain(results)}


def record_of_export(record: dict[str, Any], sources: Sequence[str], dtype: str) -> dict[str, Any]:
    """The record of a run whose model was exported.

    Args:
        sources: adapters that were merged, or the model.
        dtype: of the weights that were written.
    """
    export = {"time": _now(), "of": [Path(source).name for source in sources], "dtype": dtype}
    return {**record, "exports": [*record.get("exports", []), export]}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None if there is none that can be read."""
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `run.json` into a folder, which is made if there is none."""
    write_whole(folder / FILE, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
