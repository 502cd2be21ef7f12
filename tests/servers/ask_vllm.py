"""What vLLM shows a model of clips, without its GPU kernels. Run in an environment of its own by tests/test_servers.py:

python ask_vllm.py JOB.json RESULTS.json
"""

import json
import sys

from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs


def shown(processor, question: dict, default: dict) -> dict:
    """As the server does: a clip's loader, then the processor, each with the request's settings over the command's."""
    given = (question.get("media_io_kwargs") or {}).get("video")
    loader = VideoMediaIO.merge_kwargs(default, given)
    connector = MediaConnector({"video": loader}, allowed_local_media_path="/")
    media = {
        "video": [connector.fetch_video(url, video_processor="Qwen3VLVideoProcessor") for url in question["clips"]]
    }
    media["image"] = [connector.fetch_image(url) for url in question["images"]]
    ids = processor.info.get_tokenizer().encode(question["prompt"], add_special_tokens=False)
    inputs = ProcessorInputs(
        prompt=ids,
        mm_data_items=processor.info.parse_mm_data({name: given for name, given in media.items() if given}),
        hf_processor_mm_kwargs=question.get("mm_processor_kwargs") or {},
    )
    output = processor.apply(inputs, TimingContext())
    tensors = output["mm_kwargs"].get_data()
    result = {"ids": output["prompt_token_ids"]}
    for name in ("video_grid_thw", "image_grid_thw"):
        result[name] = tensors[name].tolist() if name in tensors else []
    if "pixel_values_videos" in tensors:
        pixels = tensors["pixel_values_videos"].double()
        if pixels.max() > 8:  # vLLM leaves it to the model to bring 0..255 to -1..1
            pixels = pixels / 127.5 - 1
        result["pixels"] = [
            pixels.sum().item(),
            pixels.square().sum().item(),
            *pixels[:: max(1, len(pixels) // 64), 7].tolist(),
        ]
    return result


def main(job_file: str, results_file: str) -> None:
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    config = ModelConfig(
        model=job["model"], tokenizer=job["model"], dtype="float32", seed=0, media_io_kwargs=job["media_io_kwargs"]
    )
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    # The server takes the loader that goes with the model's processor, from what its config says.
    default = config.multimodal_config.media_io_kwargs.get("video")
    results = []
    for question in job["questions"]:
        try:
            results.append(shown(processor, question, default))
        except Exception as error:  # which is the result: what vLLM says of this clip
            results.append({"error": f"{type(error).__name__}: {error}"})
    with open(results_file, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
