"""The plugin's keys in LLaMA-Factory's parser, and checks of a recipe before anything is loaded."""

import ast
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..words import meant
from .core import TEMPLATE, is_ours, replace_everywhere
from .known import check_datasets, check_given, check_template, known_keys


def extend_parser(parser: ModuleType) -> None:
    """The YAML keys of keys.py, and a check that they go with the template."""
    from dataclasses import dataclass

    from .keys import VideoDataKeys, VideoFinetuningKeys, VideoModelKeys, check_keys

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
        replace_everywhere(parser, cls.__name__, cls)

    environment: dict[str, str | None] = {}  # what variables were before a parse set them
    ours = is_on_cpu = False  # whether the recipe that was parsed last is for our templates; and for a CPU
    parser.logger.addFilter(lambda record: not (is_on_cpu and "mixed precision training" in record.getMessage()))

    def checked(parse: Callable) -> Callable:
        def parse_and_check(args: Any = None) -> tuple:
            nonlocal ours, is_on_cpu
            for name, value in environment.items():  # a run before this one in the same process, in a notebook say
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            environment.clear()
            args = parser.read_args(args)
            ours = isinstance(args, dict) and is_ours(args.get("template"))
            check_template(args.get("template") if isinstance(args, dict) else None)
            is_on_cpu = False
            with contextlib.ExitStack() as during:
                if ours:
                    check_given(args)
                    args = _for_this_machine(args, parser.logger.warning_rank0)
                    is_on_cpu = bool(args.get("use_cpu"))
                    if args.get("fsdp"):
                        during.enter_context(_fsdp(args, environment))
                else:
                    during.enter_context(_explaining_keys())
                parsed = parse(args)
            finetuning_args = next(p for p in parsed if hasattr(p, "finetuning_type"))
            ours = is_ours(parsed[1].template)
            parsed[0].video_template = finetuning_args.video_template = ours
            _check_keys_fit_template(parsed[0], parsed[1], finetuning_args)
            for training_args in (p for p in parsed if hasattr(p, "do_train")):
                parsed[0].video_training = training_args.do_train
                if ours and finetuning_args.stage != "sft":
                    raise ValueError(
                        f"stage: {finetuning_args.stage} does not go with template {parsed[1].template}, which trains "
                        "with `stage: sft`; for other stages LLaMA-Factory has its own template qwen3_vl"
                    )
                from ..train.optimizer import check_deepspeed

                # transformers asks nobody for an optimizer that DeepSpeed makes, so it is seen here.
                check_deepspeed(training_args.deepspeed, finetuning_args)
            if ours:
                for training_args in (p for p in parsed if hasattr(p, "do_train")):
                    _check_eval_generate(parsed[1], training_args)
                training = next((p for p in parsed if hasattr(p, "do_train")), None)
                check_datasets(parsed[1].dataset_dir, parsed[1].dataset, parsed[1].eval_dataset)
                _check_folders(parser.logger, parsed[0], training, finetuning_args)
            return parsed

        return parse_and_check

    for name in ("_parse_train_args", "_parse_infer_args", "_parse_eval_args"):
        replace_everywhere(parser, name, checked(getattr(parser, name)))

    def telling(get: Callable) -> Callable:
        def get_and_tell(args: Any = None) -> tuple:
            try:
                return get(args)
            except (ValueError, AssertionError, OSError) as error:
                if ours:  # then it is an error of ours, for a person (see start.py)
                    raise ValueError(str(error)) from error
                raise

        return get_and_tell

    for name in ("get_train_args", "get_infer_args"):
        replace_everywhere(parser, name, telling(getattr(parser, name)))

    stock_last_checkpoint = parser.get_last_checkpoint

    def get_last_checkpoint(folder: str) -> str | None:
        from ..train.checkpoint import last_whole_checkpoint
        from ..train.run_record import FILE

        # Only our trainer writes that file, before its first checkpoint.
        return (last_whole_checkpoint if Path(folder, FILE).is_file() else stock_last_checkpoint)(folder)

    replace_everywhere(parser, "get_last_checkpoint", get_last_checkpoint)


def _check_eval_generate(data_args: Any, training_args: Any) -> None:
    if data_args.eval_generate is None:
        return
    if data_args.streaming:
        raise ValueError(
            "eval_generate needs an evaluation set that is read whole; it does not go with streaming: true"
        )
    if (
        training_args.do_train
        and str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy)) == "no"
    ):
        raise ValueError("eval_generate: nothing is evaluated; set eval_strategy, and eval_dataset or val_size")


@contextlib.contextmanager
def _explaining_keys() -> Iterator[None]:
    """Say which key is meant by one that is misspelt; the parser of transformers lists it alone."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"Some keys are not used by the HfArgumentParser: (\[.*\])", str(error))
        if found is None:
            raise
        told = [f"{name}{meant(name, known_keys())}" for name in ast.literal_eval(found[1])]
        raise ValueError(f"unknown key {', '.join(told)}") from error


def _for_this_machine(args: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """A training recipe on a machine without a GPU: in float32 on the CPU, so that data and steps can be tried there."""
    import torch

    asks = not args.get("use_cpu") and (args.get("do_train") or args.get("do_predict"))
    if torch.accelerator.is_available() or not asks:
        return args
    spread = () if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ("deepspeed", "fsdp", "fsdp_config")
    dropped = [name for name in (*_ON_GPU, *spread) if args.get(name)]
    log(f"No GPU is found: this runs on the CPU in float32{', without ' if dropped else ''}{', '.join(dropped)}.")
    return {**{name: value for name, value in args.items() if name not in dropped}, "use_cpu": True}


# Keys of arithmetic and kernels that a CPU lacks, or is slower with.
_ON_GPU = ("bf16", "fp16", "pure_bf16", "tf32", "enable_liger_kernel", "use_liger_kernel")
_FSDP = ("FSDP_", "ACCELERATE_USE_FSDP")  # how variables begin that set up FSDP, by us or by transformers


@contextlib.contextmanager
def _fsdp(args: dict[str, Any], environment: dict[str, str | None]) -> Iterator[None]:
    """What `accelerate launch` sets for FSDP, and LLaMA-Factory and accelerate read before they read the recipe.

    Args:
        environment: takes the variables that were set, as they were before.
    """
    before = dict(os.environ)
    config = args.get("fsdp_config") or {}
    if isinstance(config, str):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    version = config.get("version", config.get("fsdp_version", 1))
    # Otherwise accelerate saves parts that no other program can load.
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    try:
        yield
    finally:
        changed = [n for n in os.environ if n.startswith(_FSDP) and os.environ[n] != before.get(n)]
        environment.update({name: before.get(name) for name in changed})


def _check_folders(logger: Any, model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """A folder that is missing is not asked of the hub; one that holds another run, or cannot be written, is said."""
    from ..model.loading import base_of, check_folder

    for path in (model_args.model_name_or_path, *(model_args.adapter_name_or_path or ())):
        if not path:
            raise ValueError("model_name_or_path is empty; give the folder of a model, or the name of one on the hub")
        check_folder(path)
    adapter, base = model_args.model_name_or_path, base_of(model_args.model_name_or_path)
    if base is not None:
        if not base or (training_args is not None and training_args.do_train):
            raise ValueError(
                f"model_name_or_path: {adapter} holds an adapter of {base or 'a model that it does not name'}; give that model "
                f"there, and `adapter_name_or_path: {adapter}`"
            )
        logger.info_rank0(f"{adapter} is an adapter of {base}.")
        check_folder(base)
        model_args.model_name_or_path, finetuning_args.finetuning_type = base, "lora"
        model_args.adapter_name_or_path = [adapter, *(model_args.adapter_name_or_path or ())]
    if training_args is None:
        return
    folder = Path(training_args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {folder} cannot be written: {there} is read-only")
    if not training_args.do_train:
        return
    from ..train.checkpoint import check_resumable, last_whole_checkpoint

    given = training_args.resume_from_checkpoint
    before = given
    if given is True or (given is None and not getattr(training_args, "overwrite_output_dir", False)):
        before = last_whole_checkpoint(folder)
        if given is True:
            if before is None:
                raise ValueError(f"resume_from_checkpoint is true, but {folder} has no complete checkpoint")
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
            f"{training_args.output_dir} holds {_run_in(folder)}; this one resumes from its last checkpoint. To start "
            "over, set another output_dir or remove that folder."
        )


def _run_in(folder: Path) -> str:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        step, steps = state["global_step"], state["max_steps"]
    except (OSError, ValueError, KeyError):
        return "a finished run"
    return "a finished run" if step >= steps else f"a run that was stopped at step {step} of {steps}"


def _check_keys_fit_template(model_args: Any, data_args: Any, finetuning_args: Any) -> None:
    from ..video.dialects import LLAMAFACTORY_DEFAULTS

    if is_ours(data_args.template):
        if data_args.packing and not data_args.neat_packing:
            raise ValueError("packing lets samples attend to each other; use `neat_packing: true` instead")
        if finetuning_args.use_asft_loss:
            raise ValueError(
                "use_asft_loss compares with a model that LLaMA-Factory shows no clips; use_dft_loss needs none"
            )
        if model_args.split_special_tokens:
            raise ValueError(
                "split_special_tokens takes the marks of clips and turns apart, so nothing would be shown"
            )
        if data_args.tokenized_path is not None:
            raise ValueError("tokenized_path is not supported: video templates tokenize a record when it is needed")
        if model_args.infer_backend != "huggingface":
            raise ValueError(
                f"infer_backend {model_args.infer_backend} samples clips differently from what the prompt says; "
                f"video templates work with `infer_backend: huggingface`"
            )
        return
    for kind in ("video", "image"):  # which our keys fit to each other, and LLaMA-Factory refuses
        least, most = f"{kind}_min_pixels", f"{kind}_max_pixels"
        given = {**LLAMAFACTORY_DEFAULTS, **model_args.given_video_keys}
        if given[least] > given[most]:
            raise ValueError(f"`{most}` cannot be smaller than `{least}`.")
    # Those of our keys that do something only with our templates, at other values than their defaults.
    keys = (
        (
            model_args,
            "video_sampling video_timestamps video_min_frames video_total_pixels video_cache_dir video_cache_gb",
        ),
        (data_args, "video_fit"),
        (
            finetuning_args,
            "loss_normalization gradient_check data_flatten compile_layers gradient_checkpointing_policy",
        ),
    )
    names = [(given, name) for given, line in keys for name in line.split()]
    given = next((name for args, name in names if getattr(args, name) != getattr(type(args), name)), None)
    if given:
        raise ValueError(f"{given} works with `template: {TEMPLATE}`; found template {data_args.template}")
