"""What happens between the lines of transformers' training loop."""

from typing import Any

import torch
from transformers import TrainerCallback

from .checkpoint import CheckpointError


class StepWatch(TrainerCallback):
    """Calls what a `VideoTrainer` does at the begin of training, before an optimizer's step, and after a step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._saved_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.trainer.accelerator.gather(torch.tensor([state.global_step], device=args.device)).tolist()
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"processes would resume from different steps ({', '.join(map(str, steps))}): nodes with disks of their own "
                "were killed between two checkpoints. Remove the newer one where there is one"
            )
        self.trainer._resumed_at = self._saved_at = state.global_step
        if getattr(args, "overwrite_output_dir", False) and not state.global_step:
            self.trainer.remove_checkpoints()
        self.trainer.begin_record()
        # The mean loss at the end is that of the whole run, what went before a kill included.
        step = 0
        for line in state.log_history:
            if "loss" in line:
                self.trainer._total_loss_scalar += line["loss"] * (line["step"] - step)
                step = line["step"]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_gradients()
        for group in reversed(
            self.trainer.optimizer.param_groups
        ):  # the first of a module: LoRA+ has others behind it
            if "module" in group:
                self.trainer._rates[group["module"]] = float(group["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that is stopped early leaves a checkpoint, from which it can go on. A checkpoint and an evaluation come with
        a line of the log: a resumed run then has the same lines."""
        step = state.global_step
        if control.should_training_stop and self._saved_at < step < state.max_steps:
            control.should_save = True
        if (control.should_save or control.should_evaluate) and args.logging_strategy != "no":
            control.should_log = True

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = state.global_step
