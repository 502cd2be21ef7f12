"""Our trainer, optimizer and record of the run in LLaMA-Factory's training."""

import functools
import math
from copy import copy
from types import ModuleType
from typing import Any

from ..records.table import Records
from ..train.failure import stopping_together
from ..train.optimizer import given_rates, make_optimizer
from ..train.run_record import describe_run
from ..train.trainer import VideoTrainer
from .core import is_ours, replace_everywhere
from .prompt import FlatCollator
from .recipe import resolved_recipe
from .rows import LAYOUT


def extend_trainer(trainer: ModuleType) -> None:
    """Predictions are saved beside prompts; ours are encoded when asked for, and are no column of the data set."""
    stock = trainer.CustomSeq2SeqTrainer

    class CustomSeq2SeqTrainer(stock):
        def save_predictions(self, dataset: Any, predict_results: Any, skip_special_tokens: bool = True) -> None:
            prompts = dataset
            if is_ours(self.finetuning_args) and self.is_world_process_zero():
                items = dataset.format["format_kwargs"]["transform"]
                samples = map(items.encoder.encode, Records(dataset, LAYOUT))
                prompts = {"input_ids": [sample.ids for sample in samples]}
            super().save_predictions(prompts, predict_results, skip_special_tokens)

    replace_everywhere(trainer, "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer)


def extend_workflow(workflow: ModuleType) -> None:
    """Where the template is ours: our trainer, a record of the run, and a process that fails stops the others."""
    stock, run_stock, make_card = (
        workflow.CustomSeq2SeqTrainer,
        workflow.run_sft,
        workflow.create_modelcard_and_push,
    )

    class VideoSeq2SeqTrainer(VideoTrainer, stock):
        pass

    def make_trainer(arguments: list[Any], **kwargs: Any) -> Any:
        keys = kwargs["finetuning_args"]
        data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        trainer = VideoSeq2SeqTrainer(
            loss_normalization=keys.loss_normalization,
            gradient_check=keys.gradient_check,
            flat_collator=_flat_collator(kwargs) if keys.data_flatten else None,
            compiled=keys.compile_layers,
            checkpointing_policy=keys.gradient_checkpointing_policy,
            describe=functools.partial(
                describe_run, resolved_recipe(arguments), *arguments[:3], kwargs["model"], kwargs["processor"], *data
            ),
            log=workflow.logger.warning_rank0,
            **kwargs,
        )
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "SaveProcessorCallback":
                callback.on_save = lambda *_, **__: None  # a checkpoint that has its name is not written to again
        return trainer

    def finish(trainer: Any, *args: Any) -> None:
        make_card(trainer, *args)
        if not trainer.args.push_to_hub:  # otherwise create_model_card has done it
            trainer.finish_record()

    def run_sft(*args: Any, **kwargs: Any) -> None:
        if not is_ours(args[0]):
            run_stock(*args, **kwargs)
            return
        arguments = [copy(argument) for argument in args[:5]]  # as they are before the model is loaded
        workflow.CustomSeq2SeqTrainer = functools.partial(make_trainer, arguments)
        workflow.create_modelcard_and_push = finish
        try:
            with stopping_together():
                run_stock(*args, **kwargs)
        finally:
            workflow.CustomSeq2SeqTrainer, workflow.create_modelcard_and_push = stock, make_card

    replace_everywhere(workflow, "run_sft", run_sft)


def _flat_collator(kwargs: dict[str, Any]) -> FlatCollator:
    side = math.isqrt(kwargs["model"].config.vision_config.num_position_embeddings)
    return FlatCollator(kwargs["processor"], side)


def extend_optimizer(trainer_utils: ModuleType) -> None:
    """Learning rates by module."""
    stock = trainer_utils.create_custom_optimizer

    def create_custom_optimizer(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        if not is_ours(finetuning_args) and not given_rates(finetuning_args):
            return stock(model, training_args, finetuning_args)
        return make_optimizer(stock, model, training_args, finetuning_args, trainer_utils.logger.info_rank0)

    replace_everywhere(trainer_utils, "create_custom_optimizer", create_custom_optimizer)
