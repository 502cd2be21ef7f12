"""`lmf-video export --for vllm|sglang`: what a server needs beside a model to show it clips as training did."""

from pathlib import Path
from typing import Any

from ..model.servers import SERVERS, bare_template, serving, template_file

_CLIENTS = {
    "vllm": '''"""Asks vLLM about a clip: its frames are sampled here, as training did, and sent with their times.

    {command}
    python vllm_client.py clip.mp4 "PROMPT" http://127.0.0.1:8000/v1
"""

import sys

import requests
from llamafactory_video import question
from llamafactory_video.model.loading import load_encoder
from llamafactory_video.model.served import asked_of_server

clip, prompt, address = sys.argv[1:]
encoder = load_encoder({folder!r})
body = asked_of_server(question(prompt, clip), encoder)
body |= {{"model": {folder!r}, "temperature": 0, "max_tokens": 512}}
answer = requests.post(f"{{address}}/chat/completions", json=body, timeout=600).json()
print(answer["choices"][0]["message"]["content"] if "choices" in answer else answer)
''',
    "sglang": '''"""Asks SGLang about a clip, exactly as training showed clips: its engine runs here, and is given what the encoder makes.

    python sglang_client.py clip.mp4 "PROMPT"
"""

import sys

import sglang
import torch
from llamafactory_video import question
from llamafactory_video.model.loading import load_encoder
from llamafactory_video.prompt.pixels import vision_inputs


def main(clip: str, prompt: str) -> None:
    encoder = load_encoder({folder!r})
    sample, clips = encoder.load(question(prompt, clip))
    shown = vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
    shown |= {{"input_ids": torch.tensor([sample.ids]), "format": "processor_output"}}
    engine = sglang.Engine(model_path={folder!r})
    settings = {{"temperature": 0, "max_new_tokens": 512}}
    print(engine.generate(input_ids=sample.ids, video_data=[shown], sampling_params=settings)["text"])


if __name__ == "__main__":  # the engine starts processes that read this file
    main(*sys.argv[1:])
''',
}


def export_for(server: str, folder: Path) -> None:
    """Write a server's command, chat template and client into a model's folder, and print what is exact and what is not.

    Raises:
        ValueError: if the folder holds no model that tells how its clips are sampled.
    """
    from ..model.loading import contract_of, load_encoder

    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter; merge it first: llamafactory-cli export recipes/wzry_export.yaml"
        )
    found = contract_of(str(folder))
    if not folder.is_dir() or found is None:
        raise ValueError(
            f"{folder}: give the folder of a model that was trained or exported here (video_sampling.json)"
        )
    told = serving(server, folder, found[1])
    tokenizer = load_encoder(str(folder), log=lambda _: None).tokenizer
    limits = [f"Exact: {told.exact}", *told.limits]
    heading = "".join(f"# {line}\n" for line in limits)
    files = {
        template_file(server): bare_template(tokenizer.chat_template),
        f"{server}.sh": f'#!/bin/sh\n{heading}exec {told.line} "$@"\n',
        f"{server}_client.py": _CLIENTS[server].format(folder=str(folder), command=told.line),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"written  {folder / name}")
    (folder / f"{server}.sh").chmod(0o755)
    print(f"\n{told.line}\n")
    print("\n".join(limits))


def add_export(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser(
        "export",
        help="write what vLLM or SGLang needs to show a model clips as training did",
        description="Writes a command, a chat template and a client into the folder of a model that was trained or exported here, "
        "and says what that server shows exactly, and what it does not. An adapter is merged first by `llamafactory-cli export`.",
    )
    parser.add_argument("folder", type=Path, help="of a whole model")
    parser.add_argument("--for", dest="server", choices=SERVERS, required=True)
    parser.set_defaults(run=lambda options: export_for(options.server, options.folder))
