"""Data sets of the format `video_conversation` in LLaMA-Factory's loading."""

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .core import FORMATTING, TEMPLATE, THINKING_TEMPLATE, replace_everywhere
from .prompt import clip_reader_of

if TYPE_CHECKING:
    from ..prompt.encoder import RecordEncoder


def _record_keys(attr: Any) -> Any:
    """Field names of a data set: `columns` and `tags` of dataset_info.json before the usual ones."""
    from ..media import ASSISTANT, FUNCTION, ROLES, SYSTEM, TOOL, USER
    from ..records.clips import RecordKeys

    usual = RecordKeys()

    def names(own: str | None, others: tuple[str, ...]) -> tuple[str, ...]:
        # A name given in dataset_info.json is the only one; those that LLaMA-Factory presets stand beside ours.
        return others if own is None or own in others else (own,)

    tags = {attr.user_tag: USER, attr.assistant_tag: ASSISTANT, attr.system_tag: SYSTEM}
    tags |= {attr.observation_tag: TOOL, attr.function_tag: FUNCTION}
    return RecordKeys(
        messages=names(attr.messages, usual.messages),
        videos=names(attr.videos, usual.videos),
        images=names(attr.images, usual.images),
        system=names(attr.system, usual.system),
        tools=names(attr.tools, usual.tools),
        role=names(attr.role_tag, usual.role),
        content=names(attr.content_tag, usual.content),
        roles=tuple({**ROLES, **{tag: role for tag, role in tags.items() if tag}}.items()),
    )


def record_encoder(
    template: Any, tokenizer: Any, processor: Any, data_args: Any, generation: bool = False
) -> "RecordEncoder":
    from ..prompt.encoder import RecordEncoder

    return RecordEncoder(
        tokenizer,
        processor,
        clip_reader_of(processor),
        cutoff_len=data_args.cutoff_len,
        shrink=data_args.video_fit == "shrink",
        thinking=template.thinking,
        default_system=template.default_system,
        generation=generation,
        train_on_prompt=data_args.train_on_prompt,
        last_turn_only=data_args.mask_history,
    )


def extend_converter(converter: ModuleType) -> None:
    """Data sets from a hub: their rows pass as JSON through LLaMA-Factory's loading, and are checked in `extend_data_loader`."""
    from dataclasses import dataclass

    @dataclass
    class VideoConversationConverter(converter.DatasetConverter):
        def __call__(self, example: Any) -> dict[str, Any]:
            return {"_record": json.dumps(dict(example), ensure_ascii=False)}

    if FORMATTING not in converter.DATASET_CONVERTERS:
        converter.register_dataset_converter(FORMATTING, VideoConversationConverter)


def extend_data_loader(loader: ModuleType) -> None:
    """Read annotation files ourselves, and tokenize a record when it is asked for."""
    load_single, merge, preprocess = (
        loader._load_single_dataset,
        loader._get_merged_dataset,
        loader._get_preprocessed_dataset,
    )
    checked: dict[str, Any] = {}
    streamed: list[Any] = []

    def read(dataset_attr: Any, name: str, model_args: Any, data_args: Any, training_args: Any) -> Any:
        from datasets.exceptions import DatasetGenerationError

        from ..records.report import DatasetError
        from ..records.table import check_rows, load_conversations

        if dataset_attr.ranking:
            raise DatasetError(
                f"{name}: a data set of formatting {FORMATTING} has no chosen and rejected answers; remove `ranking`, or "
                "use formatting sharegpt with one of LLaMA-Factory's templates"
            )
        options = {
            "keys": _record_keys(dataset_attr),
            "indent": data_args.answer_json_indent,
            "skip_wrong": data_args.skip_wrong_records,
            "name": name,
            "report_dir": Path(training_args.output_dir) if training_args.should_log else None,
            "log": loader.logger.warning_rank0,
        }
        if dataset_attr.load_from != "file":
            try:
                rows = load_single(dataset_attr, model_args, data_args, training_args)
            except DatasetGenerationError as error:
                raise DatasetError(
                    f"{name}: a hub's loader puts all records into one table, which cannot hold answers that are "
                    f"objects; download the files and register them with `file_name` ({error.__cause__ or error})"
                ) from error
            return check_rows(rows, data_args.media_dir, **options)
        return load_conversations(
            Path(data_args.dataset_dir, dataset_attr.dataset_name),
            data_args.media_dir,
            cache_dir=model_args.cache_dir,
            refresh=data_args.overwrite_cache and training_args.local_process_index == 0,
            progress=training_args.should_log,
            **options,
        )

    def _get_merged_dataset(
        dataset_names: Any,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        return_dict: bool = False,
    ) -> Any:
        """Check all data sets, those for evaluation too, before any is used: all that is wrong is said at once."""
        from ..records.report import DatasetError

        if dataset_names is data_args.dataset:  # the first of two calls; the second is for evaluation
            checked.clear()
            streamed.clear()
            names = [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
            errors = []
            for name, attr in zip(names, loader.get_dataset_list(names, data_args.dataset_dir), strict=True):
                if attr.formatting == FORMATTING and str(attr) not in checked:
                    try:
                        checked[str(attr)] = read(attr, name, model_args, data_args, training_args)
                    except DatasetError as error:
                        errors.append(str(error))
            if errors:
                raise DatasetError("\n\n".join(errors))
        return merge(dataset_names, model_args, data_args, training_args, stage, return_dict)

    def _load_single_dataset(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        import numpy as np
        from datasets.exceptions import DatasetGenerationError

        if dataset_attr.formatting != FORMATTING:
            try:
                return load_single(dataset_attr, model_args, data_args, training_args)
            except (DatasetGenerationError, ValueError) as error:
                if data_args.template not in (TEMPLATE, THINKING_TEMPLATE):
                    raise
                raise ValueError(
                    f"{dataset_attr} cannot be loaded with formatting {dataset_attr.formatting}; if it holds video "
                    f'conversations, give it "formatting": "{FORMATTING}" in dataset_info.json ({error})'
                ) from error

        dataset = checked.pop(str(dataset_attr), None)
        if dataset is None:
            dataset = read(dataset_attr, Path(str(dataset_attr)).stem, model_args, data_args, training_args)
        count = dataset_attr.num_samples
        if count is not None and not data_args.streaming:
            # As LLaMA-Factory does: all records once, then drawn again at random if more are wanted.
            chosen = np.random.permutation(len(dataset))[:count]
            drawn = np.random.choice(len(dataset), max(0, count - len(dataset)))
            dataset = dataset.select(np.concatenate([chosen, drawn]))
        if data_args.max_samples is not None:
            dataset = dataset.select(range(min(data_args.max_samples, len(dataset))))
        loader.logger.info_rank0(f"Data set {dataset_attr}: {len(dataset)} records.")
        if data_args.streaming:
            streamed.append(dataset)  # to be checked as a whole before training
            return dataset.to_iterable_dataset(
                num_shards=min(len(dataset), max(1, training_args.dataloader_num_workers))
            )
        return dataset

    def _get_preprocessed_dataset(
        dataset: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        template: Any,
        tokenizer: Any,
        processor: Any = None,
        is_eval: bool = False,
    ) -> Any:
        ours = stage == "sft" and hasattr(template, "thinking")
        if dataset is None or not ours:
            return preprocess(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        generation = training_args.predict_with_generate and is_eval
        encoder = record_encoder(template, tokenizer, processor, data_args, generation)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("the data set is empty; check max_samples and val_size")
        if training_args.process_index == 0:
            from datasets import concatenate_datasets

            from ..prompt.lengths import check_lengths

            if not data_args.streaming:
                records = dataset
            elif streamed:  # of all data sets, those for evaluation too
                records = concatenate_datasets(streamed)
            else:
                records = []
            name, report_dir = "evaluation" if is_eval else "training", Path(training_args.output_dir)
            workers = data_args.preprocessing_num_workers
            check_lengths(records, encoder, name, workers, report_dir, loader.logger.warning_rank0)
        streamed.clear()
        if data_args.packing and not is_eval:
            return preprocess(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        if data_args.streaming:
            dataset = dataset.map(encoder.item, remove_columns=list(first))
            # Each process reads its own batches. Accelerate's other way, one process reading for all, cuts every
            # tensor to the batch size, patches too.
            training_args.accelerator_config.dispatch_batches = False
        else:
            dataset = dataset.with_transform(encoder)
        if training_args.should_log:
            print(f"{'eval' if is_eval else 'training'} example:\n{encoder.describe(encoder.encode(first))}")
        return dataset

    replace_everywhere(loader, "_load_single_dataset", _load_single_dataset)
    replace_everywhere(loader, "_get_merged_dataset", _get_merged_dataset)
    replace_everywhere(loader, "_get_preprocessed_dataset", _get_preprocessed_dataset)


def extend_packing(supervised: ModuleType) -> None:
    """`neat_packing` packs what our own encoding makes; a record over the cutoff is an error, not cut."""
    from dataclasses import dataclass

    stock = supervised.PackedSupervisedDatasetProcessor

    @dataclass
    class PackedSupervisedDatasetProcessor(stock):
        def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            if hasattr(self.template, "thinking"):
                encoder = record_encoder(self.template, self.tokenizer, self.processor, self.data_args)
                rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
                encoded = [encoder.encode(row) for row in rows]
                self.encoded = iter(encoded)
                # The stock method drops conversations whose turns do not alternate, such as two results of tools.
                examples = {**examples, "_prompt": [[{}]] * len(rows), "_response": [[{}]] * len(rows)}
                examples["_videos"] = [sample["videos"] for sample in encoded]  # as small as they were planned
            return super().preprocess_dataset(examples)

        def _encode_data_example(self, prompt, response, system, tools, images, videos, audios):
            if not hasattr(self.template, "thinking"):
                return super()._encode_data_example(prompt, response, system, tools, images, videos, audios)
            sample = next(self.encoded)
            return sample["input_ids"], sample["labels"]

    replace_everywhere(supervised, "PackedSupervisedDatasetProcessor", PackedSupervisedDatasetProcessor)
