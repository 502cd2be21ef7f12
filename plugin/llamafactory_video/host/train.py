"""Our trainer, optimizer and record of the run in LLaMA-Factory's training."""

import functools
from copy import copy
from types import ModuleType
from typing import Any

from .core import replace_everywhere


def extend_trainer(trainer: ModuleType) -> None:
    """Predictions are saved beside prompts; ours are encoded when asked for, and are no column of the data set."""
    stock = trainer.CustomSeq2SeqTrainer

    class CustomSeq2SeqTrainer(stock):
        def save_predictions(self, dataset: Any, predict_results: Any, skip_special_tokens: bool = True) -> None:
            prompts = dataset
            if self.finetuning_args.video_template and self.is_world_process_zero():
                encoder = dataset.format["format_kwargs"]["transform"]
                rows = map(encoder.encode, dataset.with_format(None))
                prompts = {"input_ids": [row["input_ids"] for row in rows]}
            super().save_predictions(prompts, predict_results, skip_special_tokens)

    replace_everywhere(trainer, "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer)


def extend_workflow(workflow: ModuleType) -> None:
    """Where the template is ours: our trainer, a record of the run, and a process that fails stops the others."""
    stock, run_stock, make_card = (
        workflow.CustomSeq2SeqTrainer,
        workflow.run_sft,
        workflow.create_modelcard_and_push,
    )
    arguments: list[Any] = []  # of the run: those that LLaMA-Factory's trainer does not get

    def make_trainer(**kwargs: Any) -> Any:
        if not kwargs["finetuning_args"].video_template:
            return stock(**kwargs)
        from ..train.run_record import describe_run
        from ..train.trainer import VideoTrainer
        from .recipe import resolved_recipe

        class VideoSeq2SeqTrainer(VideoTrainer, stock):
            pass

        keys = kwargs["finetuning_args"]
        data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        trainer = VideoSeq2SeqTrainer(
            loss_normalization=keys.loss_normalization,
            gradient_check=keys.gradient_check,
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

    def run_sft(*args: Any, **kwargs: Any) -> None:
        if not args[0].video_template:
            run_stock(*args, **kwargs)
            return
        from ..train.failure import stopping_together

        arguments[:] = [copy(argument) for argument in args[:5]]  # as they are before the model is loaded
        with stopping_together():
            run_stock(*args, **kwargs)

    def create_modelcard_and_push(trainer: Any, *args: Any) -> None:
        make_card(trainer, *args)
        if (
            hasattr(trainer, "finish_record") and not trainer.args.push_to_hub
        ):  # where it pushes, it has made it before
            trainer.finish_record()

    workflow.CustomSeq2SeqTrainer, workflow.create_modelcard_and_push = make_trainer, create_modelcard_and_push
    replace_everywhere(workflow, "run_sft", run_sft)


def extend_optimizer(trainer_utils: ModuleType) -> None:
    """Learning rates by module."""
    stock = trainer_utils.create_custom_optimizer

    def create_custom_optimizer(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        from ..train.optimizer import make_optimizer

        return make_optimizer(stock, model, training_args, finetuning_args, trainer_utils.logger.info_rank0)

    replace_everywhere(trainer_utils, "create_custom_optimizer", create_custom_optimizer)
