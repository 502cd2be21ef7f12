"""Loading: sampling settings onto the processor, and which parameters are the projector."""

import functools
from types import ModuleType
from typing import Any

from transformers import Qwen3VLProcessor

from ..families import FAMILIES, family_of
from ..video.contract import difference
from .core import is_ours, replace_everywhere
from .processor import (
    SamplingProcessor,
    add_trained_tokens,
    apply_to_processor,
    clip_reader,
    trained_contract,
)


def extend_patcher(patcher: ModuleType) -> None:
    """Sampling settings go onto the processor, where LLaMA-Factory's own go."""
    stock, stock_tokenizer = patcher.patch_processor, patcher.patch_tokenizer

    def patch_tokenizer(tokenizer: Any, model_args: Any) -> None:
        if is_ours(model_args):
            add_trained_tokens(tokenizer, model_args, patcher.logger.info_rank0)
        stock_tokenizer(tokenizer, model_args)

    def patch_processor(processor: Any, tokenizer: Any, model_args: Any) -> None:
        stock(processor, tokenizer, model_args)
        if not is_ours(model_args) or not isinstance(processor, Qwen3VLProcessor):
            return
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor.chat_template
        found = trained_contract(model_args)
        name, trained = found or ("", None)
        contract = apply_to_processor(
            model_args.video_sampling, model_args.given_video_keys, processor, model_args.video_timestamps, trained
        )
        if trained is not None and (changed := difference(trained, contract)):
            say = patcher.logger.info_rank0 if model_args.video_training else patcher.logger.warning_rank0
            say(f"Sampling differs from how {name} was trained: {changed}")
        make_reader = functools.partial(clip_reader, contract.clips, model_args, patcher.logger.info_rank0)
        SamplingProcessor.prepare(processor, contract, make_reader, patcher.logger.warning_rank0)

    replace_everywhere(patcher, "patch_processor", patch_processor)
    replace_everywhere(patcher, "patch_tokenizer", patch_tokenizer)


def extend_model_loader(loader: ModuleType) -> None:
    """The projector is all that is named merger, as in the official trainer; stock counts deepstack as vision."""
    stock = loader.load_model

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
