"""How `lmf-video infer` and `eval` load a model, show it clips and have it answer: their options in common."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..media import is_address
from ..records.schema import given_schema
from ..video.contract import SAMPLING_KEYS

_TEXTS = ("video_sampling", "video_timestamps")
_LOADING = ("adapter", "dtype", "load_in_4bit", "device")


def add_answering(parser: argparse.ArgumentParser) -> None:
    """Add the options on how a model is loaded, shown clips, and answers."""
    written = parser.add_argument_group("how answers are written")
    written.add_argument("--max-new-tokens", type=int, default=1024)
    written.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    written.add_argument("--top-p", type=float, default=1.0)
    written.add_argument("--top-k", type=int, default=0)
    written.add_argument("--repetition-penalty", type=float, default=1.0)
    written.add_argument("--seed", type=int, help="of what is drawn, with a temperature")
    written.add_argument("--schema", type=Path, help="a JSON Schema (a file) that every answer is held to")
    written.add_argument(
        "--schema-from", type=Path, metavar="DATA", help="the same, as the answers of these records tell it"
    )
    written.add_argument(
        "--schema-vocabulary",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="with --schema-from: fields that hold only texts which were seen there, such as tags",
    )
    loaded = parser.add_argument_group("how the model is loaded")
    loaded.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    loaded.add_argument("--remote-media", action="store_true", help="fetch clips that are given by address, once")
    loaded.add_argument("--load-in-4bit", action="store_true", help="needs bitsandbytes")
    loaded.add_argument("--device", help="such as cuda:1 or cpu (default: a GPU if there is one)")
    loaded.add_argument(
        "--batch-size",
        type=int,
        help="questions answered at once (default: as many as memory has room for; 8 on a CPU; 16 of a server)",
    )
    sampling = parser.add_argument_group("sampling, where it is to differ from how the model was trained")
    sampling.add_argument(
        "--sampled-as",
        metavar="MODEL",
        help="as this model, where the folder of the one that is asked does not tell how",
    )
    sampling.add_argument(
        "--send",
        choices=("clips", "frames"),
        default="clips",
        help="to an address: clips whole (default), or frames that are sampled here, as --sampled-as says, with their times; "
        "vLLM takes them (lmf-video export --for vllm)",
    )
    for key in SAMPLING_KEYS:
        kind = str if key in _TEXTS else float if key == "video_fps" else int
        sampling.add_argument(f"--{key.replace('_', '-')}", type=kind)


def see_followed(models: Sequence[str], options: argparse.Namespace) -> None:
    """See that each option has a model that follows it.

    Raises:
        ValueError: naming one that has none.
    """
    served, frames = [is_address(model) for model in models], options.send == "frames"
    if frames and not any(served):
        raise ValueError("--send frames is for models behind an address; those that are loaded here see frames anyhow")
    if not served or not all(served):
        return
    of_clips = () if frames else ("sampled_as", *SAMPLING_KEYS)
    for name in (*_LOADING, *of_clips):
        value = getattr(options, name, None)
        if value is None or value is False or value == []:
            continue
        where = f"--{name.replace('_', '-')}"
        if name in of_clips:
            raise ValueError(
                f"{where}: a server samples whole clips as it was told to; --send frames has them sampled here"
            )
        raise ValueError(
            f"{where} is for models that are loaded here; one behind an address is as its server loaded it"
        )


def decoding_of(options: argparse.Namespace) -> Any:
    """How answers are written, as a command's options say."""
    from ..model.decoding import Decoding

    schema = given_schema(
        options.schema,
        options.schema_from,
        options.schema_vocabulary,
        ("--schema", "--schema-from", "--schema-vocabulary"),
    )
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return Decoding(**{name: getattr(options, name) for name in names}, schema=schema)


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """How clips are sampled, where a command's options say so."""
    return {key: getattr(options, key) for key in SAMPLING_KEYS if getattr(options, key) is not None}


def load(options: argparse.Namespace) -> Any:
    """The model that is asked; one behind an address knows `ask_many` alone."""
    if is_address(options.model):
        from ..model.loading import load_encoder
        from ..model.served import ServedModel

        if options.send == "clips":
            return ServedModel(options.model)
        if options.sampled_as is None:
            raise ValueError(
                "--send frames: give --sampled-as FOLDER, of the model, which tells how its clips are sampled"
            )
        shared = {"remote_media": options.remote_media, "log": say, **sampling_of(options)}
        return ServedModel(options.model, encoder=load_encoder(options.sampled_as, **shared))
    from ..model.video_model import VideoModel

    return VideoModel.load(
        options.model,
        options.adapter,
        dtype=options.dtype,
        load_in_4bit=options.load_in_4bit,
        device=options.device,
        remote_media=options.remote_media,
        sampled_as=options.sampled_as,
        log=say,
        **sampling_of(options),
    )


def say(text: str) -> None:
    """Tell the person who runs the command; answers go to the other stream."""
    print(f"lmf-video: {text}", file=sys.stderr)
