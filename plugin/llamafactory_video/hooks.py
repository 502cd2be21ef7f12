"""All contact with LLaMA-Factory: one table, module -> what is needed there and what is installed there.

LLaMA-Factory loads no plugins. `__init__.py` waits for its modules and calls `install` right after each has run, and
before others import names from it. Before the first installation the sources of all modules are checked for every
place that is extended, so a LLaMA-Factory that lacks one gives one clear error and no half-installed plugin.
"""

import ast
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import DISABLE_VARIABLE

if TYPE_CHECKING:
    from .data.loader import RecordEncoder
    from .video.clip import ClipReader
    from .video.contract import Contract

TEMPLATE, THINKING_TEMPLATE, FORMATTING = "qwen3_vl_video", "qwen3_vl_video_thinking", "video_conversation"
SUPPORTED_VERSIONS = "0.9.5"


class UnsupportedLlamaFactory(RuntimeError):
    """A place that the plugin extends is not in this LLaMA-Factory."""


# --- Arguments -------------------------------------------------------------------------------------------------------


def _hparams_parser(parser: ModuleType) -> None:
    """The YAML keys of arguments.py, and a check that they go with the template."""
    from dataclasses import dataclass

    from .arguments import VideoDataKeys, VideoFinetuningKeys, VideoModelKeys, check_keys

    @dataclass
    class ModelArguments(VideoModelKeys, parser.ModelArguments):
        def __post_init__(self) -> None:
            self.take_video_keys()
            super().__post_init__()

    @dataclass
    class DataArguments(VideoDataKeys, parser.DataArguments):
        def __post_init__(self) -> None:
            check_keys(self, VideoDataKeys)
            super().__post_init__()

    @dataclass
    class FinetuningArguments(VideoFinetuningKeys, parser.FinetuningArguments):
        def __post_init__(self) -> None:
            if self.gradient_check is False:  # what YAML makes of the word off
                self.gradient_check = "off"
            check_keys(self, VideoFinetuningKeys)
            super().__post_init__()

    extended = {
        parser.ModelArguments: ModelArguments,
        parser.DataArguments: DataArguments,
        parser.FinetuningArguments: FinetuningArguments,
    }
    for arguments in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS):
        arguments[:] = [extended.get(cls, cls) for cls in arguments]
    # Everywhere, since LLaMA-Factory makes and copies arguments of its own classes too, for a reference model say.
    for cls in extended.values():
        _replace(parser, cls.__name__, cls)

    environment: dict[str, str | None] = {}  # what variables were before a parse set them

    def checked(parse: Callable) -> Callable:
        def parse_and_check(args: Any = None) -> tuple:
            for name, value in environment.items():  # a run before this one in the same process, in a notebook say
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            environment.clear()
            if isinstance(args, dict) and args.get("fsdp") and args.get("template") in (TEMPLATE, THINKING_TEMPLATE):
                before = dict(os.environ)
                try:
                    _prepare_fsdp(args)
                    parsed = parse(args)
                finally:
                    changed = [n for n in os.environ if n.startswith(_FSDP) and os.environ[n] != before.get(n)]
                    environment.update({name: before.get(name) for name in changed})
            else:
                parsed = parse(args)
            finetuning_args = next(p for p in parsed if hasattr(p, "finetuning_type"))
            ours = parsed[1].template in (TEMPLATE, THINKING_TEMPLATE)
            parsed[0].video_template = finetuning_args.video_template = ours
            _check_keys_fit_template(parsed[0], parsed[1], finetuning_args)
            for training_args in (p for p in parsed if hasattr(p, "do_train")):
                parsed[0].video_training = training_args.do_train
                if ours and finetuning_args.stage != "sft":
                    raise ValueError(
                        f"stage: {finetuning_args.stage} does not go with template {parsed[1].template}, which trains "
                        "with `stage: sft`; for other stages LLaMA-Factory has its own template qwen3_vl"
                    )
                from .train.optimizer import check_deepspeed

                # transformers asks nobody for an optimizer that DeepSpeed makes, so it is seen here.
                check_deepspeed(training_args.deepspeed, finetuning_args)
            if ours:
                training = next((p for p in parsed if hasattr(p, "do_train")), None)
                _check_folders(parser.logger, parsed[0], training, finetuning_args)
            return parsed

        return parse_and_check

    for name in ("_parse_train_args", "_parse_infer_args", "_parse_eval_args"):
        _replace(parser, name, checked(getattr(parser, name)))

    stock_last_checkpoint = parser.get_last_checkpoint

    def get_last_checkpoint(folder: str) -> str | None:
        from .train.checkpoint import last_whole_checkpoint
        from .train.run_record import FILE

        # Only our trainer writes that file, before its first checkpoint.
        return (last_whole_checkpoint if Path(folder, FILE).is_file() else stock_last_checkpoint)(folder)

    _replace(parser, "get_last_checkpoint", get_last_checkpoint)


_FSDP = ("FSDP_", "ACCELERATE_USE_FSDP")  # how variables begin that set up FSDP, by us or by transformers


def _prepare_fsdp(args: dict[str, Any]) -> None:
    """What `accelerate launch` sets for FSDP, and LLaMA-Factory and accelerate read before they read the recipe."""
    config = args.get("fsdp_config") or {}
    if isinstance(config, str):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    version = config.get("version", config.get("fsdp_version", 1))
    # Otherwise accelerate saves parts that no other program can load.
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))


def _check_folders(logger: Any, model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """A folder that is missing is not asked of the hub; one that holds another run, or cannot be written, is said."""
    for path in (model_args.model_name_or_path, *(model_args.adapter_name_or_path or ())):
        if not path:
            raise ValueError("model_name_or_path is empty; give the folder of a model, or the name of one on the hub")
        # Qwen/Qwen3-VL-4B-Instruct is a name on the hub, also where there is a folder Qwen.
        is_local = path.startswith((".", "/", "~", "output/")) or path.count("/") > 1
        if is_local and not Path(path).is_dir():
            raise ValueError(f"no folder {path}; give the folder of a model or adapter, or the name of one on the hub")
    if training_args is None:
        return
    folder = Path(training_args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {folder} cannot be written: {there} is read-only")
    if not training_args.do_train:
        return
    from .train.checkpoint import check_resumable, last_whole_checkpoint

    given = training_args.resume_from_checkpoint
    before = given
    if given is True or (given is None and not getattr(training_args, "overwrite_output_dir", False)):
        before = last_whole_checkpoint(folder)
        if given is True:
            if before is None:
                raise ValueError(f"resume_from_checkpoint is true, and {folder} holds no whole checkpoint")
            training_args.resume_from_checkpoint = before
    if not isinstance(before, str):
        return
    # Of a recipe that trains an adapter: what its weights depend on, by its name in adapter_config.json.
    lora = {"r": "lora_rank", "lora_alpha": "lora_alpha", "use_dora": "use_dora"}
    keys = {"lora": lora, "oft": {}}.get(finetuning_args.finetuning_type)
    adapter = None if keys is None else {name: (key, getattr(finetuning_args, key)) for name, key in keys.items()}
    check_resumable(Path(before), finetuning_args.finetuning_type, adapter)
    if Path(folder, "train_results.json").is_file():
        logger.warning_rank0(
            f"{training_args.output_dir} holds a finished run, and this one goes on from its last checkpoint. To train "
            "anew, give another output_dir or remove that folder."
        )


def _check_keys_fit_template(model_args: Any, data_args: Any, finetuning_args: Any) -> None:
    from .arguments import LLAMAFACTORY_DEFAULTS

    if data_args.template in (TEMPLATE, THINKING_TEMPLATE):
        if data_args.packing and not data_args.neat_packing:
            raise ValueError("packing lets samples attend to each other; use `neat_packing: true` instead")
        if data_args.tokenized_path is not None:
            raise ValueError("tokenized_path has no use here: video templates tokenize a record when it is needed")
        if model_args.infer_backend != "huggingface":
            raise ValueError(
                f"infer_backend {model_args.infer_backend} samples clips in its own way, not as the prompt tells; "
                f"video templates work with `infer_backend: huggingface`"
            )
        return
    for kind in ("video", "image"):  # which our keys fit to each other, and LLaMA-Factory refuses
        least, most = f"{kind}_min_pixels", f"{kind}_max_pixels"
        given = {**LLAMAFACTORY_DEFAULTS, **model_args.given_video_keys}
        if given[least] > given[most]:
            raise ValueError(f"`{most}` cannot be smaller than `{least}`.")
    ours = {
        "video_sampling": model_args.video_sampling is not None,
        "video_timestamps": model_args.video_timestamps is not None,
        "video_min_frames": model_args.video_min_frames is not None,
        "video_total_pixels": model_args.video_total_pixels is not None,
        "video_fit": data_args.video_fit != "error",
        "loss_normalization": finetuning_args.loss_normalization != "tokens",
        "gradient_check": finetuning_args.gradient_check != "error",
        "video_cache_dir": model_args.video_cache_dir is not None,
        "video_cache_gb": model_args.video_cache_gb is not None,
    }
    given = next((name for name, set_ in ours.items() if set_), None)
    if given:
        raise ValueError(f"{given} works with `template: {TEMPLATE}`; found template {data_args.template}")


# --- Data sets -------------------------------------------------------------------------------------------------------


def _record_keys(attr: Any) -> Any:
    """Field names of a data set: `columns` and `tags` of dataset_info.json before the usual ones."""
    from .data.conversation import ASSISTANT, FUNCTION, ROLES, SYSTEM, TOOL, USER, RecordKeys

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


def _record_encoder(
    template: Any, tokenizer: Any, processor: Any, data_args: Any, generation: bool = False
) -> "RecordEncoder":
    from .data.loader import RecordEncoder

    return RecordEncoder(
        tokenizer,
        processor,
        _clip_reader(processor),
        cutoff_len=data_args.cutoff_len,
        shrink=data_args.video_fit == "shrink",
        thinking=template.thinking,
        default_system=template.default_system,
        generation=generation,
        train_on_prompt=data_args.train_on_prompt,
        last_turn_only=data_args.mask_history,
    )


def _data_converter(converter: ModuleType) -> None:
    """Data sets from a hub: their rows pass as JSON through LLaMA-Factory's loading, and are checked in `_data_loader`."""
    from dataclasses import dataclass

    @dataclass
    class VideoConversationConverter(converter.DatasetConverter):
        def __call__(self, example: Any) -> dict[str, Any]:
            return {"_record": json.dumps(dict(example), ensure_ascii=False)}

    if FORMATTING not in converter.DATASET_CONVERTERS:
        converter.register_dataset_converter(FORMATTING, VideoConversationConverter)


def _data_loader(loader: ModuleType) -> None:
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

        from .data.loader import DatasetError, check_rows, load_conversations

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
        from .data.loader import DatasetError

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
        encoder = _record_encoder(template, tokenizer, processor, data_args, generation)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("the data set is empty; check max_samples and val_size")
        if training_args.process_index == 0:
            from datasets import concatenate_datasets

            from .data.loader import check_lengths

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

    _replace(loader, "_load_single_dataset", _load_single_dataset)
    _replace(loader, "_get_merged_dataset", _get_merged_dataset)
    _replace(loader, "_get_preprocessed_dataset", _get_preprocessed_dataset)


def _data_packing(supervised: ModuleType) -> None:
    """`neat_packing` packs what our own encoding makes; a record over the cutoff is an error, not cut."""
    from dataclasses import dataclass

    stock = supervised.PackedSupervisedDatasetProcessor

    @dataclass
    class PackedSupervisedDatasetProcessor(stock):
        def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            if hasattr(self.template, "thinking"):
                encoder = _record_encoder(self.template, self.tokenizer, self.processor, self.data_args)
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

    _replace(supervised, "PackedSupervisedDatasetProcessor", PackedSupervisedDatasetProcessor)


# --- Prompts and pixels ----------------------------------------------------------------------------------------------


def _clip_reader(processor: Any) -> "ClipReader":
    reader = getattr(processor, "clip_reader", None)
    if reader is None:
        found = "no processor" if processor is None else type(processor).__name__
        raise ValueError(f"template {TEMPLATE} needs a Qwen3-VL model with its processor files; found {found}")
    make_cache = processor.__dict__.pop("make_frame_cache", None)
    if make_cache is not None:
        reader.cache = make_cache()
    return reader


def _data_mm_plugin(mm_plugin: ModuleType) -> None:
    """The multimodal side of the template, for the collator, chat and the API."""
    from dataclasses import dataclass

    @dataclass
    class Qwen3VLVideoPlugin(mm_plugin.BasePlugin):
        def process_messages(self, messages, images, videos, audios, processor):
            from .data.conversation import IMAGE_PLACEHOLDER, TOOL, USER, VIDEO_PLACEHOLDER
            from .model.template import TemplateError, place_messages

            self._validate_input(processor, images, videos, audios)
            text = "".join(message["content"] for message in messages if message["role"] in (USER, TOOL))
            for mark, given in ((VIDEO_PLACEHOLDER, videos), (IMAGE_PLACEHOLDER, images)):
                if text.count(mark) != len(given):
                    raise TemplateError(f"{text.count(mark)} {mark} in the messages and {len(given)} given with them")
            clips = [_clip_reader(processor).show(video) for video in videos]
            if isinstance(videos, list):  # the same list comes again for the pixels, and a stream is read only once
                videos[:] = [v if isinstance(v, str) else clip for v, clip in zip(videos, clips, strict=True)]
            return place_messages(messages, [clip.plan for clip in clips], strip=True)

        def process_token_ids(self, input_ids, labels, images, videos, audios, tokenizer, processor):
            from .model.template import count_image_tokens, expand_pads

            if not input_ids:
                return input_ids, labels
            reader = _clip_reader(processor)
            image_tokens = [count_image_tokens(image, processor.image_processor, reader.sampling) for image in images]
            plans = [reader.plan(video) for video in videos]
            return expand_pads(
                input_ids, labels, image_tokens, plans, processor.image_token_id, processor.video_token_id
            )

        def get_mm_inputs(self, images, videos, audios, imglens, vidlens, audlens, batch_ids, processor):
            import torch

            from .model.template import token_type_ids, vision_inputs

            self._validate_input(processor, images, videos, audios)
            inputs = vision_inputs(images, videos, processor, _clip_reader(processor))
            types = [token_type_ids(torch.tensor(ids), processor).tolist() for ids in batch_ids]
            return {**inputs, "mm_token_type_ids": types}

    if TEMPLATE not in mm_plugin.PLUGINS:
        mm_plugin.register_mm_plugin(TEMPLATE, Qwen3VLVideoPlugin)


def _data_template(template: ModuleType) -> None:
    """The templates, which render with the model's own chat template."""
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass
    class VideoTemplate(template.Template):
        thinking: ClassVar[bool] = False

        def encode_oneturn(self, tokenizer, messages, system=None, tools=None):
            from .model.template import render

            prompt = render(tokenizer, messages[:-1], system or self.default_system, tools, ask=True)
            response = messages[-1]["content"] + "<|im_end|>\n"
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))

        def encode_multiturn(self, tokenizer, messages, system=None, tools=None, discarding_history_cot=False):
            from .model.template import IGNORE_INDEX, encode_text, render

            text = render(tokenizer, messages, system or self.default_system, tools, ask=False)
            ids, labels = encode_text(tokenizer, text, self.thinking)
            pairs: list[tuple[list[int], list[int]]] = []
            for token, label in zip(ids, labels, strict=True):
                said = label != IGNORE_INDEX
                if not pairs or (not said and pairs[-1][1]):
                    pairs.append(([], []))
                pairs[-1][said].append(token)
            return pairs

        def fix_jinja_template(self, tokenizer) -> None:
            from .model.template import check_chat_template

            check_chat_template(tokenizer, self.thinking)

    class ThinkingVideoTemplate(VideoTemplate):
        thinking: ClassVar[bool] = True

    stock = template.TEMPLATES["qwen3_vl"]
    plugin = template.get_mm_plugin(name=TEMPLATE, image_token="<|image_pad|>", video_token="<|video_pad|>")
    for name, cls in ((TEMPLATE, VideoTemplate), (THINKING_TEMPLATE, ThinkingVideoTemplate)):
        if name not in template.TEMPLATES:
            template.register_template(
                name=name,
                format_user=stock.format_user,
                format_assistant=stock.format_assistant,
                format_system=stock.format_system,
                format_function=stock.format_function,
                format_observation=stock.format_observation,
                format_tools=stock.format_tools,
                stop_words=["<|im_end|>"],
                replace_eos=True,
                mm_plugin=plugin,
                template_class=cls,
            )


def _data_collator(collator: ModuleType) -> None:
    """Token types at the width of the padded batch: the stock collator pads them less far than input_ids."""
    from dataclasses import dataclass

    import numpy as np

    stock = collator.SFTDataCollatorWith4DAttentionMask

    @dataclass
    class SFTDataCollatorWith4DAttentionMask(stock):
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            if not hasattr(self.template, "thinking"):
                return super().__call__(features)
            # Frames are read here, once a batch is wanted: what asks for lengths alone decodes nothing.
            features = [feature["show"]() if "show" in feature else feature for feature in features]
            # Counted before stock shows a picture that no record has, where a batch is of texts alone.
            images, clips = (
                sum(len(feature.get(kind) or ()) for feature in features) for kind in ("images", "videos")
            )
            # A packed row has its samples numbered from 1 in its mask.
            lengths = [n for feature in features for n in np.bincount(feature["attention_mask"])[1:].tolist()]
            batch = super().__call__(features)
            from .model.template import token_type_ids

            batch["mm_token_type_ids"] = token_type_ids(batch["input_ids"], self.processor)
            grids = (batch.get(name) for name in ("image_grid_thw", "video_grid_thw"))
            grids = [grid for grid in grids if grid is not None]
            # The trainer takes it out. Plain numbers: counting them never waits for the device.
            batch["shown"] = {
                "images": images,
                "clips": clips,
                "lengths": lengths,
                "grids": [tuple(row) for grid in grids for row in grid.tolist()],
            }
            return batch

    _replace(collator, "SFTDataCollatorWith4DAttentionMask", SFTDataCollatorWith4DAttentionMask)


# --- Model and optimizer ---------------------------------------------------------------------------------------------


def _saved_file(name: str, file: str, model_args: Any, **options: Any) -> str | None:
    """A file beside a model or an adapter, in its folder or on the hub; None if there is none."""
    from transformers.utils import cached_file

    options = {**options, "cache_dir": model_args.cache_dir, "token": model_args.hf_hub_token}
    errors = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(name, file, **options, **{f"_raise_exceptions_for_{error}": False for error in errors})


def _trained_contract(model_args: Any) -> "tuple[str, Contract] | None":
    """How the model was sampled when it was trained, and the folder that says so; an adapter's before its model's."""
    from .video.contract import FILE, agreed, read_contract

    def find(name: str, **options: Any) -> "list[tuple[str, Contract]]":
        file = _saved_file(name, FILE, model_args, **options)
        return [] if file is None else [(name, read_contract(Path(file)))]

    adapters = [pair for name in model_args.adapter_name_or_path or () for pair in find(name)]
    return agreed(adapters or find(model_args.model_name_or_path, revision=model_args.model_revision))


def _save_with_contract(processor: Any, contract: "Contract", log: Callable[[str], None]) -> None:
    """Have a processor write the contract wherever it is saved, and for plain transformers what comes nearest to it."""
    from .arguments import tell_processor
    from .video.contract import Contract, difference, nearest, write_contract

    save, told = processor.save_pretrained, []

    def save_pretrained(folder: Any, *args: Any, **kwargs: Any) -> Any:
        video_processor, own = processor.video_processor, copy(processor.video_processor)
        near = nearest(contract.clips)
        if near != contract.clips and not told:
            told.append(True)
            log(
                f"transformers without this plugin cannot sample as {contract.clips.dialect} does. For it, {folder} has "
                f"what comes nearest: {difference(contract, Contract(near, contract.image_pixels))}"
            )
        tell_processor(own, near)
        processor.video_processor = own
        try:
            saved = save(folder, *args, **kwargs)
        finally:
            processor.video_processor = video_processor
        write_contract(Path(folder), contract)
        return saved

    processor.save_pretrained = save_pretrained


def _add_trained_tokens(tokenizer: Any, model_args: Any, log: Callable[[str], None]) -> None:
    """Tokens that adapters were trained with and their model's tokenizer lacks, at the places that they had.

    Raises:
        ValueError: if such a place is taken by another token.
    """
    from transformers import AutoTokenizer

    for name in model_args.adapter_name_or_path or ():
        if _saved_file(name, "tokenizer_config.json", model_args) is None:
            continue
        known, added = tokenizer.get_vocab(), []
        for number, token in sorted(AutoTokenizer.from_pretrained(name).added_tokens_decoder.items()):
            if token.content not in known:
                tokenizer.add_tokens([token], special_tokens=token.special)
                added.append(token.content)
            found = tokenizer.convert_tokens_to_ids(token.content)
            if found != number:
                raise ValueError(
                    f"{name} was trained with the token {token.content} at {number}, and here it is at {found}: its model "
                    "or another adapter has other tokens. Give the model that it was trained on"
                )
        if added:
            model_args.resize_vocab = True
            log(
                f"{name} was trained with {len(added)} more tokens than its model has: {', '.join(added)}. They are added."
            )


def _model_patcher(patcher: ModuleType) -> None:
    """Sampling settings go onto the processor, where LLaMA-Factory's own go."""
    stock, stock_tokenizer = patcher.patch_processor, patcher.patch_tokenizer

    def patch_tokenizer(tokenizer: Any, model_args: Any) -> None:
        if model_args.video_template:
            _add_trained_tokens(tokenizer, model_args, patcher.logger.info_rank0)
        stock_tokenizer(tokenizer, model_args)

    def patch_processor(processor: Any, tokenizer: Any, model_args: Any) -> None:
        stock(processor, tokenizer, model_args)
        if model_args.video_template and type(processor).__name__ == "Qwen3VLProcessor":
            from .arguments import apply_to_processor, frame_cache, take_trained_processors
            from .video.cache import GIB
            from .video.clip import ClipReader
            from .video.contract import difference

            if not tokenizer.chat_template:
                tokenizer.chat_template = processor.chat_template
            found = _trained_contract(model_args)
            if found is None and model_args.video_sampling == "qwen_finetune":
                take_trained_processors(processor, model_args.adapter_name_or_path or ())
            name, trained = found or ("", None)
            contract = apply_to_processor(
                model_args.video_sampling, model_args.given_video_keys, processor, model_args.video_timestamps, trained
            )
            if trained is not None and (changed := difference(trained, contract)):
                say = patcher.logger.info_rank0 if model_args.video_training else patcher.logger.warning_rank0
                say(f"Sampling differs from how {name} was trained: {changed}")
            processor.clip_reader = ClipReader(
                contract.clips, timeout=model_args.video_timeout, remote=int(model_args.video_remote_gb * GIB)
            )
            _save_with_contract(processor, contract, patcher.logger.warning_rank0)
            # The cache is made when a template of ours asks for the reader.
            processor.make_frame_cache = functools.partial(frame_cache, model_args, patcher.logger.info_rank0)

    _replace(patcher, "patch_processor", patch_processor)
    _replace(patcher, "patch_tokenizer", patch_tokenizer)


def _model_loader(loader: ModuleType) -> None:
    """The projector is all that is named merger, as in the official trainer; stock counts deepstack as vision."""
    stock = loader.load_model

    def load_model(tokenizer: Any, model_args: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> Any:
        if not model_args.video_template:
            return stock(tokenizer, model_args, finetuning_args, *args, **kwargs)
        from llamafactory.model.model_utils.visual import COMPOSITE_MODELS

        models = [COMPOSITE_MODELS[name] for name in ("qwen3_vl", "qwen3_vl_moe")]
        before = [(model.projector_keys, model.vision_model_keys) for model in models]
        for model in models:
            model.projector_keys = ["visual.merger", "visual.deepstack_merger_list"]
            model.vision_model_keys = ["visual.pos_embed", "visual.patch_embed", "visual.blocks"]
        try:
            return stock(tokenizer, model_args, finetuning_args, *args, **kwargs)
        finally:
            for model, keys in zip(models, before, strict=True):
                model.projector_keys, model.vision_model_keys = keys

    _replace(loader, "load_model", load_model)


def _sft_trainer(trainer: ModuleType) -> None:
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

    _replace(trainer, "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer)


def _sft_workflow(workflow: ModuleType) -> None:
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
        from .train.run_record import describe_run
        from .train.trainer import VideoTrainer

        class VideoSeq2SeqTrainer(VideoTrainer, stock):
            pass

        keys = kwargs["finetuning_args"]
        data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        trainer = VideoSeq2SeqTrainer(
            loss_normalization=keys.loss_normalization,
            gradient_check=keys.gradient_check,
            describe=functools.partial(describe_run, tuple(arguments), kwargs["model"], kwargs["processor"], *data),
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
        from .train.failure import stopping_together

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
    _replace(workflow, "run_sft", run_sft)


def _train_optimizer(trainer_utils: ModuleType) -> None:
    """Learning rates by module."""
    stock = trainer_utils.create_custom_optimizer

    def create_custom_optimizer(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        from .train.optimizer import make_optimizer

        return make_optimizer(stock, model, training_args, finetuning_args, trainer_utils.logger.info_rank0)

    _replace(trainer_utils, "create_custom_optimizer", create_custom_optimizer)


# --- Chat ------------------------------------------------------------------------------------------------------------


def _chat_model(chat_model: ModuleType) -> None:
    """`<video>path</video>` in lines typed into `llamafactory-cli chat`; in no server, where it would read files."""
    run, stock = chat_model.run_chat, chat_model.ChatModel

    class VideoChatModel(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.shows_clips = hasattr(self.engine.template, "thinking")
            if self.shows_clips:
                print(
                    "Show a clip with <video>path/to/clip.mp4</video> in your message, a picture with <image>…</image>."
                )

        def stream_chat(self, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> Any:
            if not self.shows_clips:
                yield from super().stream_chat(messages, *args, **kwargs)
                return
            from .data.conversation import take_inline_media

            # A question that failed is not asked again with the next one.
            for i in reversed([i for i, m in enumerate(messages) if m["content"].startswith("[error: ")]):
                del messages[i - 1 : i + 1]
            try:
                asked, videos, images = take_inline_media(messages)
                yield from super().stream_chat(asked, *args, videos=videos or None, images=images or None, **kwargs)
            except ValueError as error:
                yield f"[error: {error}]"

    def run_chat() -> None:
        chat_model.ChatModel = VideoChatModel
        try:
            run()
        finally:
            chat_model.ChatModel = stock

    _replace(chat_model, "run_chat", run_chat)


# --- For lmf-video ---------------------------------------------------------------------------------------------------


def recipe_data(recipe: Path, overrides: list[str]) -> tuple[int, dict[str, Any], "RecordEncoder"]:
    """The data sets that a training recipe names, without its model's weights.

    Args:
        overrides: `key=value`, as for `llamafactory-cli`.

    Returns:
        How many records are wrong, the others by data set, in rows of `loader.FEATURES`, and their encoder.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.hparams import get_train_args, read_args
    from llamafactory.model import load_tokenizer

    from .data.loader import DatasetError

    sys.argv = ["lmf-video", str(recipe), *overrides]
    # What needs a GPU or several processes has no part in the data.
    args = {**read_args(), "deepspeed": None, "bf16": False, "fp16": False, "use_cpu": True, "streaming": False}
    model_args, data_args, training_args, _, _ = get_train_args(args)
    if data_args.template not in (TEMPLATE, THINKING_TEMPLATE):
        raise ValueError(f"{recipe} has template {data_args.template}; only {TEMPLATE} can be checked")
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    names = [*(data_args.dataset or ()), *(data_args.eval_dataset or ())]
    parts, wrong = {}, 0
    for name, attr in zip(names, get_dataset_list(names, data_args.dataset_dir), strict=True):
        try:
            parts[name] = _load_single_dataset(attr, model_args, data_args, training_args)
        except DatasetError as error:
            wrong += error.wrong
            print(error)
            with contextlib.suppress(DatasetError):  # the clips of the other records are to be checked all the same
                left = copy(data_args)
                left.skip_wrong_records = True
                parts[name] = _load_single_dataset(attr, model_args, left, training_args)
    return wrong, parts, _record_encoder(template, module["tokenizer"], module["processor"], data_args)


# --- The table -------------------------------------------------------------------------------------------------------

# module -> (what is needed there, what is installed once it is imported). Needed are names, with the parameters that
# are used, methods as Class.method, and words of the source that are no names.
TABLE: dict[str, tuple[dict[str, str], Callable[[ModuleType], None]]] = {
    "llamafactory.hparams.parser": (
        {
            "_TRAIN_ARGS": "",
            "_INFER_ARGS": "",
            "_EVAL_ARGS": "",
            "get_last_checkpoint": "",
            "logger": "",
            "_parse_train_args": "args",
            "_parse_infer_args": "args",
            "_parse_eval_args": "args",
            "ModelArguments": "",
            "DataArguments": "",
            "FinetuningArguments": "",
        },
        _hparams_parser,
    ),
    "llamafactory.data.converter": (
        {"register_dataset_converter": "name dataset_converter", "DATASET_CONVERTERS": "", "DatasetConverter": ""},
        _data_converter,
    ),
    "llamafactory.data.mm_plugin": (
        {
            "register_mm_plugin": "name plugin_class",
            "PLUGINS": "",
            "BasePlugin.process_messages": "messages images videos audios processor",
            "BasePlugin.process_token_ids": "input_ids labels images videos audios tokenizer processor",
            "BasePlugin.get_mm_inputs": "images videos audios imglens vidlens audlens batch_ids processor",
            "MMPluginMixin._validate_input": "processor images videos audios",
        },
        _data_mm_plugin,
    ),
    "llamafactory.data.template": (
        {
            "register_template": "name mm_plugin template_class",
            "TEMPLATES": "",
            "Template.encode_oneturn": "tokenizer messages system tools",
            "Template.encode_multiturn": "tokenizer messages system tools",
            "Template.fix_jinja_template": "tokenizer",
            "get_mm_plugin": "",
            'name="qwen3_vl"': "",
        },
        _data_template,
    ),
    "llamafactory.data.processor.supervised": (
        {
            "PackedSupervisedDatasetProcessor.preprocess_dataset": "examples",
            "SupervisedDatasetProcessor._encode_data_example": "prompt response system tools images videos audios",
        },
        _data_packing,
    ),
    "llamafactory.data.collator": ({"SFTDataCollatorWith4DAttentionMask.__call__": "features"}, _data_collator),
    "llamafactory.data.loader": (
        {
            "_load_single_dataset": "dataset_attr model_args data_args training_args",
            "_get_merged_dataset": "dataset_names model_args data_args training_args stage return_dict",
            "get_dataset_list": "",
            "_get_preprocessed_dataset": "dataset data_args training_args stage template tokenizer processor is_eval",
            "logger": "",
        },
        _data_loader,
    ),
    "llamafactory.model.patcher": (
        {
            "patch_processor": "processor tokenizer model_args",
            "patch_tokenizer": "tokenizer model_args",
            "logger": "",
        },
        _model_patcher,
    ),
    "llamafactory.model.model_utils.visual": (
        {
            "COMPOSITE_MODELS": "",
            "CompositeModel": "",
            'model_type="qwen3_vl"': "",
            'model_type="qwen3_vl_moe"': "",
            "projector_keys: list": "",
            "vision_model_keys: list": "",
        },
        lambda module: None,
    ),
    "llamafactory.model.loader": ({"load_model": "tokenizer model_args finetuning_args"}, _model_loader),
    "llamafactory.train.trainer_utils": (
        {"create_custom_optimizer": "model training_args finetuning_args", "logger": ""},
        _train_optimizer,
    ),
    "llamafactory.train.sft.trainer": (
        {"CustomSeq2SeqTrainer.save_predictions": "dataset predict_results skip_special_tokens"},
        _sft_trainer,
    ),
    "llamafactory.train.sft.workflow": (
        {
            "CustomSeq2SeqTrainer": "",
            "create_modelcard_and_push": "",
            "logger": "",
            "run_sft": "model_args data_args training_args finetuning_args generating_args",
        },
        _sft_workflow,
    ),
    "llamafactory.chat.chat_model": ({"run_chat": "", "ChatModel.stream_chat": "messages images videos"}, _chat_model),
}

installed: set[str] = set()


def _replace(module: ModuleType, name: str, new: Any) -> None:
    """Set a name in its module and wherever else in LLaMA-Factory it was imported already."""
    old = getattr(module, name)
    setattr(module, name, new)
    for other_name, other in list(sys.modules.items()):
        if other_name.startswith("llamafactory.") and getattr(other, name, None) is old:
            setattr(other, name, new)


def _defined_names(source: str) -> dict[str, set[str] | None]:
    """Names in a module's source, methods as Class.method; of functions with their parameters, else None."""
    names: dict[str, set[str] | None] = {}

    def take(node: ast.AST, prefix: str) -> None:
        if isinstance(node, ast.FunctionDef):
            names[prefix + node.name] = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
            for child in node.body:
                take(child, f"{node.name}.")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update({alias.asname or alias.name: None for alias in node.names})
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({target.id: None for target in targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.If | ast.Try):
            for child in ast.iter_child_nodes(node):
                take(child, prefix)

    for node in ast.parse(source).body:
        take(node, "")
    return names


@functools.cache
def check_places(root: Path) -> None:
    """Check that the package in folder `root` has every place of the table.

    Raises:
        UnsupportedLlamaFactory: naming the first missing place and the versions that work.
    """
    for module, (needed, _) in TABLE.items():
        file = root.joinpath(*module.split(".")[1:]).with_suffix(".py")
        source = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = _defined_names(source)
        for name, parameters in needed.items():
            missing = (
                name if name not in found and (name.replace(".", "").isidentifier() or name not in source) else None
            )
            if missing is None and found.get(name) is not None:
                missing = next((f"{name}({p}=…)" for p in parameters.split() if p not in found[name]), None)
            if missing:
                from importlib.metadata import version

                raise UnsupportedLlamaFactory(
                    f"llamafactory-video extends {module}.{missing}, which this LLaMA-Factory "
                    f"({version('llamafactory')}, in {root}) does not have. It works with LLaMA-Factory "
                    f"{SUPPORTED_VERSIONS}: pip install llamafactory=={SUPPORTED_VERSIONS}. To run LLaMA-Factory "
                    f"without this plugin, set {DISABLE_VARIABLE}=1."
                )


def prepare() -> None:
    """Check, before LLaMA-Factory's first module runs, that every place of the table is there."""
    check_places(Path(sys.modules["llamafactory"].__path__[0]))


def install(module: ModuleType) -> None:
    """Install into a module of the table that has just run."""
    TABLE[module.__name__][1](module)
    installed.add(module.__name__)
