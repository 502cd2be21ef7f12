"""Our trainer, optimizer and record of the run in LLaMA-Factory's training."""

import functools
import json
import math
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..records.files import write_records
from ..records.table import Records
from ..train.answers import AnswersWhileTraining
from ..train.failure import stopping_together
from ..train.optimizer import given_rates, make_optimizer
from ..train.run_record import describe_run
from ..train.trainer import VideoTrainer
from .core import is_ours, replace_everywhere
from .engine import schema_of
from .items import Items
from .prompt import FlatCollator
from .recipe import resolved_recipe
from .rows import LAYOUT


def extend_trainer(trainer: ModuleType) -> None:
    """Predictions are saved beside prompts; ours are encoded when asked for, and are no column of the data set."""
    stock = trainer.CustomSeq2SeqTrainer

    class CustomSeq2SeqTrainer(stock):
        hold: Any = None  # what holds the answers of a batch to a JSON Schema, made for each

        def prediction_step(
            self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **given: Any
        ) -> tuple[Any, Any, Any]:
            if is_ours(self.finetuning_args) and self._gen_kwargs.get("max_new_tokens"):
                self._gen_kwargs.pop("max_length", None)  # which it stands over, and is warned of with each batch
            if self.hold is not None and self.args.predict_with_generate:
                given = {**self._gen_kwargs, **given, "logits_processor": self.hold(inputs["input_ids"])}
            loss, tokens, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **given)
            # Stock gathers labels that nobody reads; those of flat batches are of other lengths on each process.
            return loss, tokens, None if prediction_loss_only and is_ours(self.finetuning_args) else labels

        def save_predictions(self, dataset: Any, predict_results: Any, skip_special_tokens: bool = True) -> None:
            if not is_ours(self.finetuning_args) or not self.is_world_process_zero():
                super().save_predictions(dataset, predict_results, skip_special_tokens)
                return
            records = Records(dataset, LAYOUT)
            encode = dataset.format["format_kwargs"]["transform"].encoder.encode
            prompts = {"input_ids": [encode(conversation).ids for conversation in records]}
            super().save_predictions(prompts, predict_results, skip_special_tokens)
            _name_predictions(Path(self.args.output_dir, "generated_predictions.jsonl"), records)

    replace_everywhere(trainer, "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer)


def _name_predictions(file: Path, records: Records) -> None:
    """Each line tells its record and clips, and its label ends where the answer does, without the prompt's newline."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    named = [
        {
            **line,
            "label": line["label"].removesuffix("\n"),
            "source": conversation.source,
            "clips": [str(media) for media in (*conversation.videos, *conversation.images)],
        }
        for line, conversation in zip(lines, records, strict=True)
    ]
    write_records(file, named, ())


def extend_workflow(workflow: ModuleType) -> None:
    """Where the template is ours: our trainer, a record of the run, and a process that fails stops the others."""
    from llamafactory.train.callbacks import LogCallback

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
            answers=_answers(arguments, kwargs),
            flat_collator=_flat_collator(kwargs) if keys.data_flatten else None,
            compiled=keys.compile_layers,
            checkpointing_policy=keys.gradient_checkpointing_policy,
            describe=functools.partial(
                describe_run, resolved_recipe(arguments), *arguments[:3], kwargs["model"], kwargs["processor"], *data
            ),
            log=workflow.logger.warning_rank0,
            **kwargs,
        )
        trainer.hold = _hold(arguments, kwargs["tokenizer"])
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "SaveProcessorCallback":
                callback.on_save = lambda *_, **__: None  # a checkpoint that has its name is not written to again
            if isinstance(callback, LogCallback):
                callback.on_log = functools.partial(_log_with_speed, callback, callback.on_log)
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


def _log_with_speed(callback: Any, stock: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """LLaMA-Factory's log of a run, which LLaMA-Board reads, tells how fast it goes too."""
    speeds = {name: value for name, value in state.log_history[-1].items() if name in ("clips_per_second", "mfu")}
    write = type(callback)._write_log
    callback._write_log = lambda folder, logs: write(callback, folder, {**logs, **speeds})
    stock(args, state, control, **kwargs)


def _answers(arguments: list[Any], kwargs: dict[str, Any]) -> AnswersWhileTraining | None:
    """What answers a part of the evaluation set while the model trains; None if the recipe does not ask for it."""
    data_args, training_args, generating_args = arguments[1], arguments[2], arguments[4]
    if data_args.eval_generate is None or not training_args.do_train:
        return None
    tokenizer = kwargs["tokenizer"]

    def batch_of(dataset: Any, conversations: Any) -> dict[str, Any]:
        rows = dataset.format["format_kwargs"]["transform"]
        prompts = Items(replace(rows.encoder, generation=True), rows.left_out)
        side, tokenizer.padding_side = tokenizer.padding_side, "left"  # prompts end together
        try:
            batch = kwargs["data_collator"]([prompts.of(conversation) for conversation in conversations])
        finally:
            tokenizer.padding_side = side
        # `generate` counts positions itself.
        return {name: batch[name] for name in batch if name not in ("labels", "position_ids", "rope_deltas")}

    return AnswersWhileTraining(
        data_args.eval_generate,
        training_args.per_device_eval_batch_size,
        generating_args.max_new_tokens,
        lambda dataset: Records(dataset, LAYOUT),
        batch_of,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(),
    )


def _hold(arguments: list[Any], tokenizer: Any) -> Any:
    """What holds answers to the recipe's JSON Schema in predict; None where it has none."""
    model_args, training_args, generating_args = arguments[0], arguments[2], arguments[4]
    answers = training_args.predict_with_generate or arguments[1].eval_generate is not None
    schema = schema_of(model_args) if answers else None
    if schema is None:
        return None
    from transformers import LogitsProcessorList

    from ..model.constrained import Grammars, JsonAnswers
    from ..model.decoding import answer_ends

    grammar = Grammars(tokenizer, answer_ends(tokenizer)).of(schema)
    return lambda ids: LogitsProcessorList([JsonAnswers([grammar] * len(ids), generating_args.max_new_tokens)])


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
