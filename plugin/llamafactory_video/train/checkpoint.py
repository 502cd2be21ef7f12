"""Checkpoints that are whole or not there, and room for the next."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

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
    """Whether a run can resume from it: it has an optimizer state, as torch, FSDP or DeepSpeed names it."""
    return any(path.name.startswith(_OPTIMIZER) for path in checkpoint.iterdir())


def check_resumable(checkpoint: Path, finetuning_type: str, adapter: dict[str, tuple[str, Any]] | None) -> None:
    """Check that a run of the recipe can resume from a checkpoint.

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
            f"resume_from_checkpoint: {checkpoint} has no trainer_state.json, so it is not a complete checkpoint. "
            f"`{key}: {checkpoint}` starts a new run from weights that it holds"
        )
    if is_adapter != (adapter is not None):
        raise ValueError(f"{checkpoint} is of another finetuning_type than {finetuning_type}; give another output_dir")
    if not has_optimizer:
        raise ValueError(
            f"{checkpoint} holds only weights (save_only_model), so no run can resume from it. Give another output_dir; "
            f"`{key}: {checkpoint}` starts a new run from these weights"
        )
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8")) if adapter else {}
    for name, (recipe_key, value) in (adapter or {}).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{checkpoint} was trained with {recipe_key} {config[name]}, and the recipe has {value}; a resumed "
                "run keeps its checkpoint's value. Give that, or another output_dir for a new run"
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
    advice = (
        f"{before} is complete: the next start resumes from there." if before else "There is no earlier checkpoint."
    )
    return CheckpointError(
        f"{checkpoint} could not be written, {free:.2f} GiB are free on its disk: {error}\n{advice} Make room, or give "
        "another output_dir; save_total_limit and save_only_model make checkpoints take less."
    )


class WholeCheckpoints(Trainer):
    """transformers' Trainer, whose checkpoints get their name when all of them is written, on all processes.

    Args:
        processor: saved with each checkpoint.
        log: takes a line for the person who runs this.
    """

    def __init__(self, *args: Any, log: Callable[[str], None] = print, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved_processor, self._tell, self._saving = kwargs.get("processor"), log, False

    def remove_checkpoints(self) -> None:
        """Remove those of a run that this one overwrites; once killed, it would resume from them."""
        if self.is_local_process_zero():
            old = [path for path in Path(self.args.output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
            for path in old:
                shutil.rmtree(path)
            if old:
                self._tell(f"overwrite_output_dir: removed {', '.join(sorted(map(str, old)))}")

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Write the checkpoint aside and give it its name when all of it is there, on all processes.

        Raises:
            CheckpointError: if it cannot be written; those before it stay.
        """
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        staged = run_dir / UNFINISHED / final.name
        if self.is_local_process_zero():  # on several nodes, each may have a disk of its own
            for left_over in (staged.parent, final):
                shutil.rmtree(left_over, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            if self.args.should_save:
                check_room(run_dir, self.args.save_only_model)
            super()._save_checkpoint(model, trial)
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)  # on all processes: all load it at the end
            if self.args.should_save:
                if self._saved_processor is not None:
                    self._saved_processor.save_pretrained(staged)
                self.state.save_to_json(str(staged / "trainer_state.json"))
        except Exception as error:
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise explain(error, final) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero():
            with contextlib.suppress(FileNotFoundError):  # on a shared disk, another node was first
                staged.rename(final)
                staged.parent.rmdir()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
