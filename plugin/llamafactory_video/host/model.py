"""Loading: sampling settings onto the processor, and which parameters are the projector."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers import Qwen3VLProcessor

from ..families import FAMILIES, family_of
from ..model.loading import config_of
from ..model.processor import SamplingProcessor, add_trained_tokens, apply_to_processor, trained_contract
from ..video.cache import GIB, open_cache
from ..video.contract import difference
from ..video.reader import ClipReader
from ..video.sampling import Sampling
from .core import is_ours, replace_everywhere
from .keys import VideoModelKeys


def _clip_reader(sampling: Sampling, keys: VideoModelKeys, log: Callable[[str], None]) -> ClipReader:
    """The reader of clips that a recipe asks for, with its cache."""
    cache = open_cache(keys.video_cache_dir, keys.video_cache_gb, log) if keys.video_cache else None
    return ClipReader(
        sampling, cache, keys.video_timeout, remote=int(keys.video_remote_gb * GIB), may_fetch=keys.remote_media
    )


def _hub(model_args: Any) -> dict[str, Any]:
    return {"cache_dir": model_args.cache_dir, "token": model_args.hf_hub_token}


def extend_patcher(patcher: ModuleType) -> None:
    """Sampling settings go onto the processor, where LLaMA-Factory's own go."""
    stock, stock_tokenizer = patcher.patch_processor, patcher.patch_tokenizer

    def patch_tokenizer(tokenizer: Any, model_args: Any) -> None:
        if is_ours(model_args):
            adapters = model_args.adapter_name_or_path or ()
            if add_trained_tokens(tokenizer, adapters, patcher.logger.info_rank0, **_hub(model_args)):
                model_args.resize_vocab = True
        stock_tokenizer(tokenizer, model_args)

    def patch_processor(processor: Any, tokenizer: Any, model_args: Any) -> None:
        stock(processor, tokenizer, model_args)
        if not is_ours(model_args) or not isinstance(processor, Qwen3VLProcessor):
            return
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor.chat_template
        adapters = model_args.adapter_name_or_path or ()
        revision = model_args.model_revision
        found = trained_contract(model_args.model_name_or_path, adapters, revision, **_hub(model_args))
        name, trained = found or ("", None)
        contract = apply_to_processor(
            model_args.video_sampling, model_args.given_video_keys, processor, model_args.video_timestamps, trained
        )
        if trained is not None and (changed := difference(trained, contract)):
            say = patcher.logger.info_rank0 if model_args.video_training else patcher.logger.warning_rank0
            say(f"Sampling differs from how {name} was trained: {changed}")
        make_reader = functools.partial(_clip_reader, contract.clips, model_args, patcher.logger.info_rank0)
        SamplingProcessor.prepare(processor, contract, make_reader, patcher.logger.warning_rank0)

    replace_everywhere(patcher, "patch_processor", patch_processor)
    replace_everywhere(patcher, "patch_tokenizer", patch_tokenizer)


def extend_model_loader(loader: ModuleType) -> None:
    """The projector is all that is named merger, as in the official trainer; stock counts deepstack as vision."""
    stock, stock_tokenizer = loader.load_model, loader.load_tokenizer

    def load_tokenizer(model_args: Any) -> Any:
        try:
            return stock_tokenizer(model_args)
        except OSError as error:
            if not is_ours(model_args):
                raise
            config_of(model_args.model_name_or_path)  # says more of a model that is not there
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{model_args.model_name_or_path}: its tokenizer cannot be loaded. {reason}") from error

    def load_model(tokenizer: Any, model_args: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_ours(model_args):
            return stock(tokenizer, model_args, finetuning_args, *args, **kwargs)
        from llamafactory.model.model_utils.visual import COMPOSITE_MODELS

        models = [(COMPOSITE_MODELS[family.model_type], family) for family in FAMILIES.values()]
        before = [(stated.projector_keys, stated.vision_model_keys) for stated, _ in models]
        for stated, family in models:
            stated.projector_keys, stated.vision_model_keys = list(family.projector), list(family.vision)
        try:
            model = stock(tokenizer, model_args, finetuning_args, *args, **kwargs)
        finally:
            for (stated, _), keys in zip(models, before, strict=True):
                stated.projector_keys, stated.vision_model_keys = keys
        if model_args.block_diag_attn and not family_of(model.config).packs:
            raise ValueError(
                f"neat_packing does not work with {model.config.model_type}, whose samples would see each other"
            )
        return model

    replace_everywhere(loader, "load_model", load_model)
    replace_everywhere(loader, "load_tokenizer", load_tokenizer)
