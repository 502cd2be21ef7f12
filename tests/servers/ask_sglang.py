"""What SGLang shows a model of clips, without its GPU kernels. Run in an environment of its own by tests/test_servers.py:

python ask_sglang.py JOB.json RESULTS.json
"""

import asyncio
import json
import sys
from types import SimpleNamespace

import torch
from sglang.srt import runtime_context
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig, AutoProcessor

torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # memory that only a GPU's driver has


def shown(processor: QwenVLImageProcessor, question: dict) -> dict:
    """As the tokenizer's process does: a clip of a request, or what an encoder has made of it."""
    clips = question["clips"]
    if "tensors" in question:
        clips = [{**torch.load(question["tensors"]), "format": "processor_output"}]
    request = SimpleNamespace(video_data=clips, image_data=[], audio_data=[], rid="a")
    output = asyncio.run(processor.process_mm_data_async([], question["prompt"], request))
    grids = [item.model_specific_data["video_grid_thw"].reshape(-1, 3) for item in output.mm_items]
    pixels = torch.cat([item.feature.double().reshape(-1, item.feature.shape[-1]) for item in output.mm_items])
    return {
        "ids": list(output.input_ids),
        "video_grid_thw": torch.cat(grids).tolist(),
        "pixels": [
            pixels.sum().item(),
            pixels.square().sum().item(),
            *pixels[:: max(1, len(pixels) // 64), 7].tolist(),
        ],
    }


def main(job_file: str, results_file: str) -> None:
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    arguments = ServerArgs(model_path=job["model"], device="cpu", mm_process_config=job["mm_process_config"])
    runtime_context.publish(arguments, role="tokenizer")
    config, processor = (kind.from_pretrained(job["model"]) for kind in (AutoConfig, AutoProcessor))
    asked = QwenVLImageProcessor(config, arguments, processor, "default")
    results = []
    for question in job["questions"]:
        try:
            results.append(shown(asked, question))
        except Exception as error:  # which is the result: what SGLang says of this clip
            results.append({"error": f"{type(error).__name__}: {error}"})
    with open(results_file, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
