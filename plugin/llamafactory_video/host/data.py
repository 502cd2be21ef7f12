"""Data sets of the format `video_conversation` in LLaMA-Factory's loading."""

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import torch

from ..media import ASSISTANT, FUNCTION, ROLES, SYSTEM, TOOL, USER
from ..prompt.left_out import LeftOut
from ..prompt.lengths import check_samples, left_out_file
from ..prompt.shown import few_tokens
from ..records.clips import RecordKeys
from ..records.report import DatasetError
from ..records.table import Records, check_rows, load_conversations
from .core import FORMATTING, is_ours, replace_everywhere
from .items import Items, make_encoder
from .rows import LAYOUT, from_row
from .stock_rows import check_stock_rows


def _record_keys(attr: Any, unknown: str = "warn") -> RecordKeys:
    """Field names of a data set: `columns` and `tags` of dataset_info.json before the usual ones."""

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
        unknown=unknown,
    )


def extend_converter(converter: ModuleType) -> None:
    """Data sets from a hub: their rows pass as JSON through LLaMA-Factory's loading, and are checked in `extend_data_loader`."""

    @dataclass
    class VideoConversationConverter(converter.DatasetConverter):
        def __call__(self, example: Any) -> dict[str, Any]:
            return {"_record": json.dumps(dict(example), ensure_ascii=False)}

    if FORMATTING not in converter.DATASET_CONVERTERS:
        converter.register_dataset_converter(FORMATTING, VideoConversationConverter)


def extend_data_loader(loader: ModuleType) -> None:
    """Read annotation files ourselves; for our templates, tokenize a record when it is asked for."""
    load_stock, get_stock = loader._load_single_dataset, loader.get_dataset

    def _load_single_dataset(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        if dataset_attr.formatting == FORMATTING or is_ours(data_args.template):
            table = _load_table(loader, load_stock, dataset_attr, model_args, data_args, training_args)
            return _streamed(table, training_args) if data_args.streaming else table
        return load_stock(dataset_attr, model_args, data_args, training_args)

    def get_dataset(
        template: Any,
        model_args: Any,
        data_args: Any,
        training_args: Any,
        stage: str,
        tokenizer: Any,
        processor: Any = None,
    ) -> Any:
        if stage != "sft" or not is_ours(template):
            return get_stock(template, model_args, data_args, training_args, stage, tokenizer, processor)
        local = not data_args.data_shared_file_system
        arguments = model_args, data_args, training_args
        with training_args.main_process_first(desc="load dataset", local=local):
            train, evaluation, streamed = _load_all(loader, load_stock, *arguments)
        parts: dict[str, Any] = {}
        for split in loader.split_dataset(train, evaluation, data_args, seed=training_args.seed):
            parts |= split
        lists: dict[str, LeftOut] = {}
        for name, part in parts.items():
            # A stream is checked once, as the tables that it is made of.
            records = (streamed if name == next(iter(parts)) else None) if data_args.streaming else part
            kind = "training" if name == "train" else name.replace("validation", "evaluation")
            folder = Path(training_args.output_dir)
            generation = training_args.predict_with_generate and name != "train"
            if records is None:
                continue
            numbers = None
            if training_args.process_index == 0:
                encoder = make_encoder(template, tokenizer, processor, data_args, generation)
                # What is read whole before it is used, or cannot be replaced, is looked at whole.
                decoding = data_args.most_wrong > 0 and (data_args.packing or generation)
                workers, log = data_args.preprocessing_num_workers, loader.logger.warning_rank0
                checked = Records(records, LAYOUT)
                numbers = check_samples(checked, encoder, kind, workers, folder, log, data_args.most_wrong, decoding)
            if data_args.most_wrong:
                numbers = _of_first(numbers, training_args)
                lists[name] = LeftOut(left_out_file(folder, kind), len(records), data_args.most_wrong)
                parts = _without(parts, name, records, numbers, data_args.streaming)
        with training_args.main_process_first(desc="pre-process dataset", local=local):
            for name, part in parts.items():
                is_eval = name != "train"
                generation = training_args.predict_with_generate and is_eval
                encoder = make_encoder(template, tokenizer, processor, data_args, generation)
                first = next(iter(part), None)
                if first is None:
                    raise ValueError("the data set is empty; check max_samples and val_size")
                if data_args.packing and not is_eval:
                    parts[name] = loader._get_preprocessed_dataset(
                        part, data_args, training_args, stage, template, tokenizer, processor, is_eval
                    )
                    continue
                left_out = lists.get("train" if data_args.streaming else name)
                items = Items(encoder, None if generation else left_out)
                if data_args.streaming:
                    parts[name] = part.map(items.item, remove_columns=list(first))
                    # Each process reads its own batches. Accelerate's other way, one process reading for all, cuts
                    # every tensor to the batch size, patches too.
                    training_args.accelerator_config.dispatch_batches = False
                else:
                    parts[name] = part.with_transform(items)
                if training_args.should_log:
                    sample = encoder.encode(from_row(first))
                    print(f"{'eval' if is_eval else 'training'} example:\n{encoder.describe(sample)}")
                    if note := few_tokens(sample, encoder):
                        loader.logger.warning_rank0(note)
        return loader.get_dataset_module(datasets.DatasetDict(parts))

    replace_everywhere(loader, "_load_single_dataset", _load_single_dataset)
    replace_everywhere(loader, "get_dataset", get_dataset)


def _of_first(value: Any, training_args: Any) -> Any:
    """What the first process has, on all."""
    if training_args.world_size > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return value


def _without(
    parts: dict[str, Any], name: str, records: datasets.Dataset, numbers: list[int], streaming: bool
) -> dict[str, Any]:
    """The parts without the records of these numbers, which are those of part `name`, or of the tables of all streams."""
    if not numbers:
        return parts
    gone = set(numbers)
    if not streaming:
        return {**parts, name: parts[name].select([i for i in range(len(records)) if i not in gone])}
    sources = set(records.select(numbers)["_source"])
    return {each: part.filter(lambda row: row["_source"] not in sources) for each, part in parts.items()}


def _load_all(loader: ModuleType, load_stock: Any, model_args: Any, data_args: Any, training_args: Any) -> tuple:
    """All data sets of a recipe, each checked before any is used: all that is wrong is said at once.

    Returns:
        What is trained on, what is evaluated on (by name with `eval_on_each_dataset`), each None if there is none; and
        with `streaming`, the tables of ours together, which can be looked at as a whole.
    """
    tables, errors, loaded = [], [], {"train": {}, "eval": {}}
    for part, names in (("train", data_args.dataset), ("eval", data_args.eval_dataset)):
        for name, attr in zip(names or (), loader.get_dataset_list(names, data_args.dataset_dir), strict=True):
            arguments = attr, model_args, data_args, training_args
            try:
                table = loaded[part][name] = _load_table(loader, load_stock, *arguments, name)
                if data_args.streaming:
                    tables.append(table)
                    loaded[part][name] = _streamed(table, training_args)
            except DatasetError as error:
                errors.append(str(error))
    if errors:
        raise DatasetError("\n\n".join(errors))

    def merged(parts: dict[str, Any]) -> Any:
        return loader.merge_dataset(list(parts.values()), data_args, seed=training_args.seed) if parts else None

    evaluation = loaded["eval"] if data_args.eval_on_each_dataset else merged(loaded["eval"])
    return merged(loaded["train"]), evaluation or None, datasets.concatenate_datasets(tables) if tables else None


def _load_table(
    loader: ModuleType,
    load_stock: Any,
    dataset_attr: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    name: str | None = None,
) -> datasets.Dataset:
    """The checked records of a data set, of our format or one of LLaMA-Factory's, as many as the recipe asks for.

    Raises:
        DatasetError: listing what is wrong with them.
    """
    import numpy as np

    name, ours = name or Path(str(dataset_attr)).stem, dataset_attr.formatting == FORMATTING
    if dataset_attr.ranking and ours:
        raise DatasetError(
            f"{name}: a data set of formatting {FORMATTING} has no chosen and rejected answers; remove `ranking`, or "
            "use formatting sharegpt with one of LLaMA-Factory's templates"
        )
    if dataset_attr.ranking:
        raise DatasetError(
            f"{name} has chosen and rejected answers (`ranking`), which `stage: sft` cannot train on; use LLaMA-Factory's "
            "template qwen3_vl with `stage: dpo`"
        )
    options = {
        "most_wrong": data_args.most_wrong,
        "remote": model_args.remote_media,
        "name": name,
        "report_dir": Path(training_args.output_dir) if training_args.should_log else None,
        "log": loader.logger.warning_rank0,
    }
    read = _own_table if ours else _stock_table
    table = read(load_stock, dataset_attr, model_args, data_args, training_args, options)
    count = dataset_attr.num_samples
    if count is not None and not data_args.streaming:
        # As LLaMA-Factory does: all records once, then drawn again at random if more are wanted.
        chosen = np.random.permutation(len(table))[:count]
        drawn = np.random.choice(len(table), max(0, count - len(table)))
        table = table.select(np.concatenate([chosen, drawn]))
    if data_args.max_samples is not None:
        table = table.select(range(min(data_args.max_samples, len(table))))
    loader.logger.info_rank0(f"Data set {dataset_attr}: {len(table)} records.")
    return table


def _own_table(
    load_stock: Any, dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any, options: dict[str, Any]
) -> datasets.Dataset:
    """All records of a data set of our format."""
    options = {
        **options,
        "layout": LAYOUT,
        "keys": _record_keys(dataset_attr, data_args.unknown_fields),
        "indent": data_args.answer_json_indent,
    }
    if dataset_attr.load_from == "file":
        return load_conversations(
            Path(data_args.dataset_dir, dataset_attr.dataset_name),
            data_args.media_dir,
            cache_dir=model_args.cache_dir,
            refresh=data_args.overwrite_cache and training_args.local_process_index == 0,
            progress=training_args.should_log,
            **options,
        )
    try:
        rows = load_stock(dataset_attr, model_args, data_args, training_args)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DatasetError(
            f"{options['name']}: a hub's loader puts all records into one table, which cannot hold answers that are "
            f"objects; download the files and register them with `file_name` ({error.__cause__ or error})"
        ) from error
    return check_rows(rows, data_args.media_dir, **options)


def _stock_table(
    load_stock: Any, dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any, options: dict[str, Any]
) -> datasets.Dataset:
    """All records of a data set of one of LLaMA-Factory's formats; a stream from a hub is read to its end for that."""
    name, everything, whole = options["name"], copy(dataset_attr), copy(data_args)
    everything.num_samples = whole.max_samples = None  # so that records keep their numbers
    whole.streaming = False
    try:
        rows = load_stock(everything, model_args, whole, training_args)
    except (datasets.exceptions.DatasetGenerationError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its records have no field {error}" if isinstance(error, KeyError) else error.__cause__ or error
        raise DatasetError(
            f"{name}: {dataset_attr} cannot be loaded with formatting {dataset_attr.formatting}: {reason}. Name its fields "
            f'under "columns" in dataset_info.json; or, for video conversations, give it "formatting": "{FORMATTING}"'
        ) from error
    file = Path(data_args.dataset_dir, str(dataset_attr)) if dataset_attr.load_from == "file" else Path(name)
    return check_stock_rows(rows, dataset_attr, file, data_args.media_dir, **options)


def _streamed(table: datasets.Dataset, training_args: Any) -> datasets.IterableDataset:
    return table.to_iterable_dataset(num_shards=min(len(table), max(1, training_args.dataloader_num_workers)))
