"""A model's weights and processor, and adapters', for asking it."""

import json
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, GenerationConfig

from ..families import family_of
from ..prompt.encoder import Encoder
from ..prompt.tokens import TemplateError, check_chat_template
from ..video.cache import open_cache
from ..video.contract import SAMPLING_KEYS, Contract, difference
from ..video.reader import ClipReader
from .processor import SamplingProcessor, add_trained_tokens, apply_to_processor, saved_file, trained_contract

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def check_folder(name: str) -> None:
    """See that a name that can only be a folder's is one.

    Raises:
        ValueError: if there is no such folder.
    """
    # Qwen/Qwen3-VL-4B-Instruct is a name on the hub, also where there is a folder Qwen.
    is_local = name.startswith((".", "/", "~", "output/")) or name.count("/") > 1
    if is_local and not Path(name).is_dir():
        raise ValueError(f"no folder {name}; give the folder of a model or adapter, or the name of one on the hub")


def base_of(folder: str) -> str | None:
    """The model of an adapter's folder; None if it is no adapter's."""
    file = Path(folder, "adapter_config.json")
    if not file.is_file() or Path(folder, "config.json").is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def config_of(name: str) -> Any:
    """A model's config.

    Raises:
        ValueError: saying why there is none.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(name).is_dir():
            raise ValueError(
                f"{name} was not downloaded before, and HF_HUB_OFFLINE=1 forbids it now; unset it, or give a model's folder"
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: no model that can be loaded. {reason}") from error


def load_model(
    model: str,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    load_in_4bit: bool = False,
    device: str | None = None,
    video_cache: bool = True,
    remote_media: bool = False,
    sampled_as: str | None = None,
    log: Callable[[str], None] = print,
    **sampling: Any,
) -> tuple[Any, Encoder]:
    """Load a model and its processor.

    Args:
        model: folder of a model, or of an adapter, which names its model; or a name on the hub.
        adapters: folders; merged into the model in turn, but for a model in 4 bits, which keeps one beside it.
        dtype: one of `DTYPES`; None: bfloat16 on a GPU, float32 on a CPU.
        load_in_4bit: by bitsandbytes.
        device: such as "cuda:0" or "cpu"; None: a GPU if there is one.
        video_cache: keep decoded frames on disk, as training does.
        remote_media: fetch clips and pictures that are given by address, into that cache.
        sampled_as: folder of a model as whose clips are sampled, where this one's does not tell how.
        log: takes a line for the person who runs this.
        sampling: keys of `SAMPLING_KEYS`; where none is given, clips are sampled as the folder says.

    Returns:
        transformers' model, ready to be asked, and what makes its prompts.

    Raises:
        ValueError: naming what is wrong with a folder or an option.
    """
    if unknown := sampling.keys() - {*SAMPLING_KEYS}:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; sampling has {', '.join(SAMPLING_KEYS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; known are {', '.join(DTYPES)}")
    model, adapters = _resolved(model, adapters, log)
    config = config_of(model)
    family_of(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = DTYPES[dtype] if dtype else torch.float32 if device.startswith("cpu") else torch.bfloat16

    processor = AutoProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    grown = add_trained_tokens(tokenizer, adapters, log)
    # None, given, would take the place of how a model was quantized that is stored so (AWQ, FP8).
    quantized = {"quantization_config": _four_bits(kind)} if load_in_4bit else {}
    try:
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=kind, device_map={"": device}, **quantized)
    except ImportError as error:  # what a model that is stored quantized needs; the text says which package
        raise ValueError(f"{model}: {error}") from error
    rows = loaded.get_input_embeddings().weight.shape[0]
    if grown and len(tokenizer) > rows:
        loaded.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    loaded = _with_adapters(loaded, adapters, load_in_4bit).eval()
    loaded.generation_config = GenerationConfig()  # how answers are written is told with each question

    encoder = _encoder(model, adapters, processor, config, video_cache, remote_media, sampled_as, log, sampling)
    return loaded, encoder


def load_encoder(
    model: str,
    adapters: Sequence[str] = (),
    video_cache: bool = True,
    remote_media: bool = False,
    sampled_as: str | None = None,
    log: Callable[[str], None] = print,
    **sampling: Any,
) -> Encoder:
    """What shows clips to a model, without its weights; see `load_model`."""
    model, adapters = _resolved(model, adapters, log)
    config = config_of(model)
    family_of(config)
    processor = AutoProcessor.from_pretrained(model)
    add_trained_tokens(processor.tokenizer, adapters, log)
    return _encoder(model, adapters, processor, config, video_cache, remote_media, sampled_as, log, sampling)


def contract_of(model: str) -> tuple[str, Contract] | None:
    """How a model, or an adapter and its model, was sampled when it was trained, and the folder that says so."""
    return trained_contract(*_resolved(model, (), lambda _: None))


def _resolved(model: str, adapters: Sequence[str], log: Callable[[str], None]) -> tuple[str, list[str]]:
    """A model and its adapters, where an adapter may have been named as the model.

    Raises:
        ValueError: if one of them is not there.
    """
    adapters = list(adapters)
    for name in (model, *adapters):
        check_folder(name)
    base = base_of(model)
    if base is not None:
        if not base or (base.startswith(("/", ".")) and not Path(base).is_dir()):
            raise ValueError(
                f"{model} is an adapter, and its model {base or '(not named)'} is not here; give the model, and this folder "
                "as its adapter"
            )
        log(f"{model} is an adapter of {base}.")
        model, adapters = base, [model, *adapters]
    for name in adapters:
        if saved_file(name, "adapter_config.json") is None:
            raise ValueError(f"{name} has no adapter_config.json; an adapter's folder is needed")
    return model, adapters


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError('4 bits need bitsandbytes: pip install "llamafactory-video[qlora]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )


def _with_adapters(model: Any, adapters: Sequence[str], is_quantized: bool) -> Any:
    from peft import PeftModel

    if is_quantized and len(adapters) > 1:
        raise ValueError("a model in 4 bits takes one adapter; merge the others first (llamafactory-cli export)")
    for name in adapters:
        model = PeftModel.from_pretrained(model, name)
        if not is_quantized:
            model = model.merge_and_unload()
    return model


def _encoder(
    model: str,
    adapters: Sequence[str],
    processor: Any,
    config: Any,
    video_cache: bool,
    remote_media: bool,
    sampled_as: str | None,
    log: Callable[[str], None],
    sampling: dict[str, Any],
) -> Encoder:
    """What makes prompts, sampling as the folder says where nothing else is given."""
    tokenizer = processor.tokenizer
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor.chat_template
    given = {key: value for key, value in sampling.items() if value is not None}
    dialect, timestamps = given.pop("video_sampling", None), given.pop("video_timestamps", None)
    if "video_max_frames" in given:
        given["video_maxlen"] = given.pop("video_max_frames")
    own = trained_contract(model, adapters)
    other = contract_of(sampled_as) if own is None and sampled_as is not None else None
    if other is not None:
        log(f"{model} does not tell how it was sampled; its clips are, as those of {sampled_as}.")
    name, trained = own or other or ("", None)
    contract = apply_to_processor(dialect, given, processor, timestamps, trained)
    if trained is not None and (changed := difference(trained, contract)):
        log(f"Sampling differs from how {name} was trained: {changed}")

    def make_reader() -> ClipReader:
        cache = open_cache(None, None, lambda _: None) if video_cache else None
        return ClipReader(contract.clips, cache, may_fetch=remote_media)

    SamplingProcessor.prepare(processor, contract, make_reader, log)
    return Encoder(
        tokenizer,
        processor,
        processor.clip_reader,
        cutoff_len=config.text_config.max_position_embeddings,
        thinking=_thinks(tokenizer),
        generation=True,
    )


def _thinks(tokenizer: Any) -> bool:
    """Whether its chat template asks as a Thinking model's does."""
    try:
        check_chat_template(tokenizer, thinking=False)
    except TemplateError:
        check_chat_template(tokenizer, thinking=True)
        return True
    return False
