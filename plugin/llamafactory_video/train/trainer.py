"""transformers' Trainer with a loss by token, an audit, whole checkpoints and figures while it trains.

What LLaMA-Factory's trainer adds comes between this class and transformers' own (host/train.py).
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from ..model.flat import loss_of_flat
from ..prompt.tokens import IGNORE_INDEX
from .answers import AnswersWhileTraining
from .audit import GradientAudit, GradientError, describe_faults
from .checkpoint import CheckpointError, WholeCheckpoints, last_whole_checkpoint
from .model_card import add_to_model_card
from .optimizer import GroupRow, group_rows, group_table
from .run_record import finished, read_run_record, write_run_record
from .set_up import set_up_layers
from .step_watch import StepWatch
from .throughput import Throughput

# The optimizer's state brings them along, so a recipe's values are not used when a run resumes.
_IN_CHECKPOINT = (
    *("learning_rate", "vision_tower_lr", "mm_projector_lr", "weight_decay"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
RATE_NAMES = {"language_model": "learning_rate", "vision_tower": "vision_tower_lr", "mm_projector": "mm_projector_lr"}

# The optimizer of several processes is loaded to its device; on the CPU that is "cpu:0", unknown to torch.load.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class VideoTrainer(WholeCheckpoints):
    """Trainer of Qwen3-VL on batches of our collator.

    Args:
        loss_normalization: "tokens": the sum over supervised tokens of the whole step, on all processes, divided by
            their number, as Qwen's official trainer has it; it does not depend on how the step is cut into
            micro-batches. "micro_batches": the mean of the micro-batches' means, as LLaMA-Factory has it.
        gradient_check: what happens when a module that should learn has no usable gradient after the first step.
        processor: saved with each checkpoint, before the checkpoint takes its name.
        flat_collator: lays the samples of a micro-batch end to end (`prompt.flat`), in training, and in evaluation without
            generation; None: `data_collator` pads them, everywhere.
        compiled: compile the layers for flat micro-batches; None: on a GPU, in runs that are long enough to gain by it.
        checkpointing_policy: which layers compute their activations again, where gradient checkpointing is on. "auto": of
            flat micro-batches on a GPU as few as its memory needs (`recompute`); else all.
        answers: of a part of the evaluation set, at each evaluation.
        describe: makes the record of the run (run_record.py), given `earlier` and `step`.
        log: takes a line for the person who runs this.
    """

    def __init__(
        self,
        *args: Any,
        loss_normalization: Literal["tokens", "micro_batches"] = "tokens",
        gradient_check: Literal["error", "warn", "off"] = "error",
        flat_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        compiled: bool | None = None,
        checkpointing_policy: Literal["auto", "none", "language_model", "all"] = "auto",
        answers: AnswersWhileTraining | None = None,
        describe: Callable[..., dict[str, Any]] | None = None,
        log: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        if flat_collator is not None and kwargs["args"].dataloader_pin_memory:
            kwargs["args"].accelerator_config.non_blocking = True  # the host goes on while a micro-batch is copied
        super().__init__(*args, log=log, **kwargs)
        self.args.logging_nan_inf_filter = False  # it would show a loss that is not finite as 0; see `log`
        self._flat_collator, self._by_tokens = flat_collator, loss_normalization == "tokens"
        if (self._by_tokens or flat_collator is not None) and self.compute_loss_func is None:
            self.compute_loss_func = self.token_loss
        elif flat_collator is not None:
            self.compute_loss_func = loss_of_flat(self.compute_loss_func)
        self._supervised: list[int] = []  # labels of each sample of the flat micro-batch at hand
        self._gradient_check, self._describe, self._answers = gradient_check, describe, answers
        self._audit: GradientAudit | None = None
        self._items: Any = None  # supervised tokens of the step
        self._throughput: Throughput | None = None
        self._rates: dict[str, float] = {}
        self._grad_norm: Any = 0.0
        self._evaluated: list[torch.Tensor] = []
        self._resumed_at = 0
        self._rows: list[GroupRow] = []
        spreads = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self._recomputation = set_up_layers(
            self, flat_collator is not None, spreads, compiled, checkpointing_policy, log
        )
        self.add_callback(StepWatch(self))

    # --- Loss ---

    def token_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Cross entropy of the tokens after each position.

        Args:
            outputs: with `logits` (batch, tokens, vocabulary), or of a flat micro-batch (1, labels, vocabulary).
            labels: (batch, tokens), -100 where nothing is learnt; of a flat micro-batch those alone, (labels,).
            num_items_in_batch: supervised tokens of the whole step; evaluation does not need it.
        """
        logits = outputs["logits"]
        is_flat = labels.dim() == 1
        targets = labels[None] if is_flat else F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten().to(logits.device),
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if self.model.training:  # of a step without a supervised token, 0
            if self._by_tokens:
                return losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
            count = max(1, sum(self._supervised))
            return losses.sum() / (count * self.current_gradient_accumulation_steps)
        if is_flat:
            parts = losses[: sum(self._supervised)].split(self._supervised)
            sums = torch.stack([part.sum() for part in parts])
            counts = torch.tensor(self._supervised, device=losses.device)
        else:
            sums, counts = losses.view_as(targets).sum(1), targets.ne(IGNORE_INDEX).sum(1)
        if self._by_tokens:
            self._evaluated.append(self.accelerator.gather_for_metrics(torch.stack([sums, counts], dim=1).detach()))
        return sums.sum() / counts.sum().clamp(min=1)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Batches are flat, but for generation, which reads prompts that end together, and for measures of tokens."""
        padded = getattr(self.args, "predict_with_generate", False) or self.compute_metrics is not None
        padding = self.data_collator
        if self._flat_collator is not None and (is_training or not padded):
            self.data_collator = self._flat_collator
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = padding

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The loss is the mean over all supervised tokens; transformers' is a mean over batches."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            loss, tokens = torch.cat(self._evaluated).double().sum(0).tolist()
            if not tokens:
                raise ValueError("the evaluation set holds no supervised token, so no loss; look at its answers")
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        if self._answers is not None and metric_key_prefix.startswith("eval"):
            output.metrics.update(self._answers.measure(self, args[0].dataset, metric_key_prefix))
        return output

    # --- A step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Micro-batches of a step; the time until they are there is the time of waiting for data."""
        if self.state.global_step >= self.state.max_steps:  # a finished run that is started again has nothing to do
            self.control.should_training_stop = True
            return [], None
        if self._throughput is None:
            dtype = next(p.dtype for p in self.model.parameters() if p.requires_grad)
            if self.args.bf16 or self.args.fp16:
                dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            self._throughput = Throughput(self.model, self.args.device, dtype)
        self._throughput.start()
        if self._recomputation is not None:
            self._recomputation.begin_step()
        started = time.perf_counter()
        batches, self._items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._throughput.waited += time.perf_counter() - started
        return batches, self._items

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, with the layers that keep their activations chosen for it."""
        if self._recomputation is None or "flat" not in inputs:
            return super().training_step(model, inputs, *args, **kwargs)
        size = inputs["input_ids"].shape[1], inputs["flat"]
        self._recomputation.begin_micro_batch(*size)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._recomputation.end_micro_batch(*size)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        counts = inputs.pop("counts", None)
        self._supervised = [] if counts is None else counts.get("supervised", [])
        if counts is not None and self._audit is not None:
            self._audit.saw_vision |= counts["images"] + counts["clips"] > 0
        if counts is not None and self._throughput is not None and self.model.training:
            self._throughput.add(counts)
        return super()._prepare_inputs(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of training also tells the rate of each module and how fast it goes."""
        if "train_loss" in logs:  # speeds at the end are of the steps that this start made; transformers counts all
            made = (self.state.global_step - self._resumed_at) / max(self.state.max_steps, 1)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] = round(logs[name] * made, 3)
        if "loss" in logs:
            self._check_finite(logs["loss"])
            logs |= {RATE_NAMES[module]: rate for module, rate in self._rates.items()}
            logs |= self._throughput.read(self.accelerator.gather)
        super().log(logs, start_time)

    def _check_finite(self, loss: float) -> None:
        """Stop before weights that are lost are saved.

        Args:
            loss: the mean or the sum over the steps since it was last looked at, of all processes.

        Raises:
            GradientError: if it or the last gradient norm is not finite.
        """
        found = {"loss": loss}
        if not self._scales_loss:
            found["gradient norm"] = float(self._grad_norm)
        wrong = [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]
        if wrong and self._gradient_check != "off":
            before = last_whole_checkpoint(self.args.output_dir)
            text = (
                f"by step {self.state.global_step}, training has diverged ({', '.join(wrong)}). "
                + (f"{before} was saved before. " if before else "")
                + "Lower the learning rates, in another output_dir"
            )
            if self._gradient_check == "error":
                raise GradientError(f"{text}; `gradient_check: warn` continues anyway.")
            self._tell(text)

    def _check_unlogged(self) -> None:
        """The same for steps that no line of the log has told."""
        self._check_finite(self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().item())

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._check_unlogged()
        return super()._finalize_training(*args, **kwargs)

    @property
    def _scales_loss(self) -> bool:
        """Whether steps whose gradients are not finite are passed over, as fp16 loss scaling does."""
        return self.accelerator.scaler is not None or (self.is_deepspeed_enabled and self.args.fp16)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._take_gradients()  # clipping by a norm that is not finite would spoil those of all layers
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if not self.args.max_grad_norm > 0:
            self._take_gradients()
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    def _take_gradients(self) -> None:
        if self._audit is not None and self.is_fsdp_enabled:
            self._audit.take(self.model.named_parameters())

    # --- Optimizer and audit ---

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = getattr(optimizer, "param_groups", ({},))  # none where DeepSpeed's own file makes the optimizer
        if all("module" in group for group in groups):
            self._rows = group_rows(optimizer)
        if self.args.should_save and self._rows:
            table = Path(self.args.output_dir, "trained_modules.txt")
            table.parent.mkdir(parents=True, exist_ok=True)
            text = group_table(self._rows, self.model.named_parameters())
            table.write_text(text + "\n", encoding="utf-8")
        if self._gradient_check != "off" and self._audit is None:  # DeepSpeed asks twice
            # DeepSpeed takes gradients away before they can be looked at; FSDP computes those of other tensors.
            self._audit = GradientAudit(self.model.named_parameters(), from_hooks=not self.is_fsdp_enabled)
        return optimizer

    def check_gradients(self) -> None:
        """Stop if a module that should learn has no usable gradient.

        Raises:
            GradientError: naming the modules.
        """
        step = self.state.global_step + 1
        if self._audit is None or step & (step - 1):  # at steps 1, 2, 4, 8, …: it waits for the device
            return
        learns = self._items is None or bool(self._items)
        faults = self._audit.check(self.args.device, self._scales_loss, learns)
        if not self._audit.pending:
            self._audit = None
        if faults:
            text = (
                f"after step {step}, modules that should be trained have no usable gradient:\n"
                f"{describe_faults(faults)}\n"
            )
            if self._gradient_check == "error":
                raise GradientError(
                    f"{text}Freeze what is not meant to train (freeze_vision_tower, freeze_multi_modal_projector, "
                    "freeze_language_model, lora_target); a gradient that is not finite means broken "
                    "weights, or a learning rate that is too high. `gradient_check: warn` continues anyway."
                )
            self._tell(text)

    # --- The record of the run ---

    def begin_record(self) -> None:
        """Write `run.json` into the output folder; a resumed run keeps what was written before.

        The earlier record is read beside the checkpoint, which may be another run's.

        Raises:
            CheckpointError: if the recipe asks for what the checkpoint decides, or nothing is left to train.
        """
        if self._describe is not None and self.is_world_process_zero():
            folder, step = Path(self.args.output_dir), self.state.global_step
            checkpoint = self.args.resume_from_checkpoint
            origin, earlier = folder.resolve(), None
            if step:
                origin = Path(checkpoint).resolve().parent
                earlier = read_run_record(origin)
                if earlier is None:  # of LLaMA-Factory without this plugin
                    self._check_rates()
            is_another = origin != folder.resolve()
            record = self._describe(earlier=earlier, step=step, another=is_another)
            changed = record["history"][-1]["changed"] if record["history"] else {}
            lines = {
                name: f"  {name}: {' -> '.join('the default' if v is None else str(v) for v in change.values())}"
                for name, change in changed.items()
            }
            kept = [line for name, line in lines.items() if name in _IN_CHECKPOINT]
            anew = (
                "\nGive another output_dir and no resume_from_checkpoint; with the checkpoint's folder as model or adapter, "
                "a new run starts from its weights."
            )
            if kept:
                raise CheckpointError(
                    f"resuming at step {step} from {checkpoint}, which brings its own values, so that these would have no "
                    "effect:\n" + "\n".join(kept) + anew
                )
            other_data = any(name.startswith("data.") for name in changed)
            if step and step >= self.state.max_steps and (is_another or other_data):
                raise CheckpointError(
                    f"resuming at step {step} from {checkpoint}, of {'another run' if is_another else 'other data'}: this "
                    f"recipe has {self.state.max_steps} steps, so nothing would be trained." + anew
                )
            write_run_record(folder, record)
            if lines:
                self._tell(
                    f"resuming at step {step} from {checkpoint} with a changed recipe. From here on, schedule and data are "
                    "those of the recipe as it is now. Changed are:\n" + "\n".join(lines.values())
                )

    def _check_rates(self) -> None:
        """See that the optimizer's state has brought along the rates and weight decays of the recipe."""
        if not all("module" in group for group in self.optimizer.param_groups):
            return
        wanted, found = self._rows, group_rows(self.optimizer, "initial_lr")
        lines = [
            f"  {row.module}: rate {now.learning_rate:g} and weight decay {now.weight_decay:g}, in the recipe "
            f"{row.learning_rate:g} and {row.weight_decay:g}"
            for row, now in zip(wanted, found, strict=False)
            if (row.learning_rate, row.weight_decay) != (now.learning_rate, now.weight_decay)
        ]
        if lines:
            raise CheckpointError(
                f"resuming from {self.args.resume_from_checkpoint}, which brings its own values:\n"
                + "\n".join(lines)
                + "\nGive the recipe these, or start a new run from the checkpoint's weights."
            )

    def finish_record(self) -> None:
        """Add the end of the training and its results to `run.json`, and all of it to the model card."""
        folder = Path(self.args.output_dir)
        record = read_run_record(folder) if self.args.do_train and self.is_world_process_zero() else None
        if record is not None:
            results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
            record = finished(record, self.state.global_step, results)
            write_run_record(folder, record)
            add_to_model_card(folder / "README.md", record)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card that is pushed to a hub has the record of the run too."""
        super().create_model_card(*args, **kwargs)
        self.finish_record()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        if self._resumed_at == self.state.global_step:
            return  # the checkpoint that a finished run went on from
        self._check_unlogged()
        super()._save_checkpoint(model, trial)
