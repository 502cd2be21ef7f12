"""How clips of a model are sampled, and how it is asked, for the person who finds its folder: two sections of its card."""

from pathlib import Path

from ..video.contract import EXAMPLE_CLIP, FILE, Contract, clip_text, nearest, read_contract
from .servers import serving

_MEANS = {
    "qwen_finetune": "of the whole clip, frames × height × width",
    "llamafactory": "of each frame",
    "qwen_vl_utils": "of each frame",
}
_TRANSFORMERS = """from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
frames, metadata = load_video("clip.mp4", backend="pyav")  # pip install av
messages = [{{"role": "user", "content": [{{"type": "video"}}, {{"type": "text", "text": "PROMPT"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=512, do_sample=False)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""


def how_to_ask(folder: Path, name: str) -> str:
    """Markdown on sampling and asking; "" for a folder that does not tell how its clips are sampled.

    Args:
        name: by which others know the model: its folder, or its name on a hub.
    """
    if not (folder / FILE).is_file():
        return ""
    contract = read_contract(folder / FILE)
    is_adapter = (folder / "adapter_config.json").is_file()
    parts = ["## How clips are sampled", _sampling(contract), "## How to ask it"]
    parts += [
        "Ask with the prompt of its training data, PROMPT below. As training showed clips, with llamafactory-video:",
        _block("bash", f"lmf-video infer --model {name} --video clip.mp4 --prompt 'PROMPT'"),
    ]
    if is_adapter:
        parts.append(
            "This is an adapter; `llamafactory-cli export` merges it into its model, for transformers, vLLM and SGLang."
        )
        return "\n\n".join(parts) + "\n"
    near = nearest(contract.clips) == contract.clips
    parts += [
        f"With plain transformers, {'the same for clips of a constant rate' if near else 'near to that'}:",
        _block("python", _TRANSFORMERS.format(name=name)),
    ]
    for server, title in (("vllm", "vLLM"), ("sglang", "SGLang")):
        told = serving(server, Path(name), contract)
        parts += [
            f"With {title}, once `lmf-video export --for {server} {name}` has written the chat template:",
            _block("bash", told.line),
            f"Exact: {told.exact} " + " ".join(told.limits),
        ]
    return "\n\n".join(parts) + "\n"


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _sampling(contract: Contract) -> str:
    clips = contract.clips
    frames = f"{clips.min_frames} to {clips.max_frames} frames" if clips.nframes is None else f"{clips.nframes} frames"
    least, most = clips.min_pixels, clips.max_pixels
    bounds = "" if most is None else f", {least} to {most} pixels {_MEANS[clips.dialect]}"
    if clips.total_pixels is not None:
        bounds += f", at most {clips.total_pixels} of the whole clip"
    info = EXAMPLE_CLIP
    return (
        f"{clips.fps:g} frames a second, {frames}{bounds} (dialect `{clips.dialect}`). A clip of {info.duration:g} s at "
        f"{info.width} x {info.height}, {info.fps:g} frames/s, is shown as {clip_text(clips)}. `{FILE}` has all of it."
    )
