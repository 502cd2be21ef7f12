"""Which checkpoints of an output folder are whole, and room for the next."""

import json
import shutil
from pathlib import Path
from typing import Any

UNFINISHED = "unfinished"  # folder of the output folder where a checkpoint is while it is written
_OPTIMIZER = ("optimizer", "global_step")  # how names begin that hold its state
_GIB = 2**30


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; one that was cut short has no readable trainer_state.json."""
    steps = [name for path in Path(folder).glob("checkpoint-*") if (name := path.name.partition("-")[2]).isdecimal()]
    for step in sorted(steps, key=int, reverse=True):
        path = Path(folder, f"checkpoint-{step}")
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        except (OSError, ValueError):
            continue
    return None


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a run can go on from it: state of the optimizer, as torch, FSDP or DeepSpeed names it, is there."""
    return any(path.name.startswith(_OPTIMIZER) for path in checkpoint.iterdir())


def check_resumable(checkpoint: Path, finetuning_type: str, adapter: dict[str, tuple[str, Any]] | None) -> None:
    """See that a run of the recipe can go on from a checkpoint.

    Args:
        adapter: of a recipe that trains one, by their names in adapter_config.json: keys of the recipe that the
            checkpoint's weights depend on, and their values. None for other recipes.

    Raises:
        ValueError: saying why not, and what to give.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    has_state, has_optimizer = (checkpoint / "trainer_state.json").is_file(), holds_optimizer(checkpoint)
    inside = None if has_state and has_optimizer else last_whole_checkpoint(checkpoint)
    if inside is not None:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is the folder of a run, not of a checkpoint; give {inside}"
        )
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    key = "adapter_name_or_path" if is_adapter else "model_name_or_path"
    if not has_state:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} has no trainer_state.json, so it is no whole checkpoint of a run. "
            f"`{key}: {checkpoint}` starts a new run from weights that it holds"
        )
    if is_adapter != (adapter is not None):
        raise ValueError(f"{checkpoint} is of another finetuning_type than {finetuning_type}; give another output_dir")
    if not has_optimizer:
        raise ValueError(
            f"{checkpoint} holds weights alone (save_only_model), so no run can go on from it. Give another output_dir; "
            f"`{key}: {checkpoint}` starts a new run from these weights"
        )
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8")) if adapter else {}
    for name, (recipe_key, value) in (adapter or {}).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{checkpoint} was trained with {recipe_key} {config[name]}, and the recipe has {value}; a run goes on "
                "with what its checkpoint has. Give that, or another output_dir for a new run"
            )


def check_room(folder: Path, weights_only: bool) -> None:
    """See that the next checkpoint has room: as much as the last one took.

    Args:
        weights_only: the optimizer's state will not be in it.

    Raises:
        CheckpointError: with what is needed and what is free.
    """
    before = last_whole_checkpoint(folder)
    if before is None:
        return
    needed = sum(
        path.stat().st_size
        for path in Path(before).rglob("*")
        if path.is_file() and not (weights_only and path.relative_to(before).parts[0].startswith(_OPTIMIZER))
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"it needs {needed / _GIB:.2f} GiB, as {before} does")


def explain(error: Exception, checkpoint: Path) -> CheckpointError:
    """What a person is told when a checkpoint could not be written."""
    folder = checkpoint.parent
    free = shutil.disk_usage(folder).free / _GIB
    before = last_whole_checkpoint(folder)
    advice = f"{before} is whole: the next start goes on from there." if before else "There is no earlier checkpoint."
    return CheckpointError(
        f"{checkpoint} could not be written, {free:.2f} GiB are free on its disk: {error}\n{advice} Make room, or give "
        "another output_dir; save_total_limit and save_only_model make checkpoints take less."
    )
