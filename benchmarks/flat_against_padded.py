"""Flat micro-batches in bfloat16 on a GPU, beside transformers' own padded forward pass in the same precision.

    python benchmarks/flat_against_padded.py --config Qwen3-VL-4B-Instruct/ --clips clips/ --size 2B

Both round; what they are measured against is the padded pass in float32, of the same random weights and the same clips, a
text and a picture. Prints, of the logits before each label and of the loss's gradients by module, the mean distance from
float32 in parts of the mean size: of a flat pass that is as good as the padded one the two columns are alike.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llamafactory_video.model.flat import run_flat
from llamafactory_video.prompt.encoder import Encoder
from llamafactory_video.prompt.flat import lay_flat
from llamafactory_video.prompt.pixels import token_type_ids, vision_inputs
from llamafactory_video.prompt.tokens import IGNORE_INDEX
from llamafactory_video.records.parse import parse_record
from llamafactory_video.train.compiled import compile_layers
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from train_recipe import make_dataset, make_model
from transformers import AutoModelForImageTextToText, AutoProcessor

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=4, max_frames=32, min_pixels=4096, max_pixels=60000)


def load_samples(clips: Path, folder: Path, encoder: Encoder, count: int) -> list[Any]:
    """Samples with their decoded clips: clips, a text, a picture, a picture beside a clip in turn."""
    folder.mkdir(exist_ok=True)
    make_dataset(clips, folder, count, mixed=True)
    rows = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    conversations = [parse_record(row, str)[0] for row in rows]
    return [encoder.load(replace(each, source=str(n))) for n, each in enumerate(conversations)]


def padded_inputs(samples: list[Any], encoder: Encoder, device: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What transformers' own forward pass takes, padded on the right, and labels (samples, tokens)."""
    longest = max(len(sample.ids) for sample, _ in samples)
    ids = torch.full((len(samples), longest), encoder.processor.tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (sample, _) in enumerate(samples):
        n = len(sample.ids)
        ids[row, :n], labels[row, :n] = torch.tensor(sample.ids), torch.tensor(sample.labels)
        mask[row, :n] = 1
    images = [image for sample, _ in samples for image in sample.images]
    clips = [clip for _, decoded in samples for clip in decoded]
    shown = vision_inputs(images, clips, encoder.processor, SAMPLING)
    types = token_type_ids(ids, encoder.processor)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **shown}
    return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


def flat_inputs(samples: list[Any], encoder: Encoder, model: Any, device: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What our forward pass takes, and its labels (labels,)."""

    def to_device(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: to_device(part) for name, part in value.items()}
        if isinstance(value, tuple):
            return tuple(map(to_device, value))
        return value.to(device) if torch.is_tensor(value) else value

    side = int(model.config.vision_config.num_position_embeddings**0.5)
    images = [image for sample, _ in samples for image in sample.images]
    clips = [clip for _, decoded in samples for clip in decoded]
    pairs = [(sample.ids, sample.labels) for sample, _ in samples]
    batch = to_device(lay_flat(pairs, images, clips, encoder.processor, SAMPLING, side))
    del batch["counts"]
    return batch, batch.pop("labels")


def logits_and_gradients(
    model: Any, inputs: dict[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """Logits before each label, gradients by name, on the CPU in float32, and the loss."""
    logits = model(**inputs, use_cache=False).logits
    if labels.dim() == 1:
        logits = logits[0]
    else:
        learnt = labels[:, 1:] != IGNORE_INDEX
        logits, labels = logits[:, :-1][learnt], labels[:, 1:][learnt]
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach().float().cpu(), gradients, loss.item()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean distance in parts of the mean size."""
    return ((found - expected).abs().mean() / expected.abs().mean().clamp(min=1e-30)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, help="folder with the model's config and processor files"
    )
    parser.add_argument("--clips", type=Path, required=True, help="folder of clips")
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="for the model and records")
    parser.add_argument("--size", default="2B")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU, with a small config")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    folder, device = options.work.resolve() / options.size, "cpu" if options.cpu else "cuda"
    make_model(options.config, folder, options.size)
    processor = AutoProcessor.from_pretrained(folder)
    encoder = Encoder(processor.tokenizer, processor, ClipReader(SAMPLING), cutoff_len=8192)
    samples = load_samples(options.clips, options.work / "mixed_kinds", encoder, options.samples)

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).train()

    padded = padded_inputs(samples, encoder, device)
    model = load(torch.float32)
    exact = logits_and_gradients(model, *padded)
    model = load(torch.bfloat16)
    runs = {"padded": logits_and_gradients(model, *padded)}
    run_flat(model.model)
    flat = flat_inputs(samples, encoder, model, device)
    runs["flat"] = logits_and_gradients(model, *flat)
    if not options.cpu:
        compile_layers(model.model)
        runs["flat, compiled"] = logits_and_gradients(model, *flat)
    modules = {"language model": "language_model", "vision tower": "visual.blocks", "projector": "merger"}
    print(f"| against float32 (loss {exact[2]:.5f}) | loss | logits | " + " | ".join(modules) + " |")
    print("|---" * (3 + len(modules)) + "|")
    for name, (logits, gradients, loss) in runs.items():
        cells = [f"{loss:.5f}", f"{distance(logits, exact[0]):.4f}"]
        for part in modules.values():
            pairs = [(g, exact[1][key]) for key, g in gradients.items() if part in key and exact[1][key].any()]
            cells.append(f"{sum(distance(*pair) for pair in pairs) / len(pairs):.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
