"""Which checkpoints of an output folder are whole, and room for the next."""

import json
import shutil
from pathlib import Path

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
