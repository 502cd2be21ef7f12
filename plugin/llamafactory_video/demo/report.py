"""Ask the untrained and the trained model about clips that neither has seen, and say how they did.

Answers are made by transformers alone, from frames decoded here: what the plugin trained must be right for whoever
uses the model without the plugin.
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLProcessor

from . import game

BATCH = 16
MAX_NEW_TOKENS = 64  # an answer has 42


@torch.inference_mode()
def answer(model_folder: Path, processor: Qwen3VLProcessor, clips: list[np.ndarray], label: str) -> list[str]:
    """What the model in `model_folder` says about each clip, (T, H, W, 3) uint8, decoded greedily."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    content = [{"type": "video"}, {"type": "text", "text": game.QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = []
    for start in tqdm(range(0, len(clips), BATCH), label, unit="batch"):
        batch = clips[start : start + BATCH]
        inputs = processor(
            text=[prompt] * len(batch),
            videos=batch,
            video_metadata=[{"fps": game.FPS, "total_num_frames": len(clip)} for clip in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_mm_token_type_ids=True,
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def parse(text: str) -> dict | None:
    """The JSON object that an answer is, None if it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def tags_f1(expected: list[str], said: object) -> float:
    """Harmonic mean of the shares of said tags that are right and of right tags that are said."""
    said = {tag for tag in said if isinstance(tag, str)} if isinstance(said, list) else set()
    return 2 * len(said & set(expected)) / (len(said) + len(set(expected)))


def score(expected: list[dict], answers: list[str]) -> dict[str, float]:
    """Shares of answers that are JSON objects and that are exactly right, and the mean F1 of their tags."""
    said = [parse(text) for text in answers]
    pairs = list(zip(expected, said, strict=True))
    figures = {
        "json_valid": [value is not None for value in said],
        "tags_f1": [tags_f1(right["tags"], (value or {}).get("tags")) for right, value in pairs],
        "exact": [value == right for right, value in pairs],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in figures.items()}


def data_url(data: bytes, kind: str) -> str:
    """Bytes that a page carries in itself."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def strip_of(frames: np.ndarray, gap: int = 4) -> Image.Image:
    """Frames side by side at twice their size, with white between them; frames (T, H, W, 3) uint8."""
    count, height, width, _ = frames.shape
    strip = Image.new("RGB", (count * (2 * width + gap) - gap, 2 * height), "white")
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((2 * width, 2 * height), Image.Resampling.NEAREST)
        strip.paste(picture, (i * (2 * width + gap), 0))
    return strip


PAGE = """<!DOCTYPE html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llamafactory-video demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em 1em; text-align: right; border-bottom: 1px solid #ccc }}
section {{ margin: 1.5em 0; border-top: 1px solid #ccc; padding-top: 1em }} dl {{ margin: 0 }} img {{ max-width: 100% }}
.seen {{ display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start }}
video {{ width: 128px; height: 128px; background: #000 }} .seen img {{ max-width: calc(100% - 140px) }}
dt {{ float: left; width: 6em; color: #777 }} dd {{ margin-left: 6em; overflow-wrap: anywhere }}
.right {{ color: #17803d }} .wrong {{ color: #b3261e }}
</style>
<h1>{headline}</h1>
{table}{sections}{curve}
"""


def write_page(
    path: Path, report: dict, rows: list[tuple[Path, np.ndarray, dict, dict[str, str]]], curve: Path
) -> None:
    """A page that needs no other file.

    Args:
        report: what report.json holds.
        rows: clips to show: the file, its frames (T, H, W, 3), the right answer, and each model's answer.
        curve: the picture of the training loss; left out where there is none.
    """
    names = list(report["tuned"])
    table = "".join(f"<th>{name}" for name in ["", *names])
    for model in ("base", "tuned"):
        table += f"<tr><th>{model}" + "".join(f"<td>{report[model][name]:.3f}" for name in names)
    sections = ""
    for file, frames, expected, answers in rows:
        buffer = io.BytesIO()
        strip_of(frames).save(buffer, "PNG")
        clip = f'<video controls loop muted preload="auto" src="{data_url(file.read_bytes(), "video/mp4")}"></video>'
        items = f"<dt>clip<dd>{html.escape(file.name)}<dt>prompt<dd>{html.escape(game.QUESTION)}"
        items += f"<dt>expected<dd>{html.escape(json.dumps(expected, ensure_ascii=False))}"
        for model, text in answers.items():
            verdict = "right" if parse(text) == expected else "wrong"
            items += f'<dt>{model}<dd class="{verdict}">{html.escape(text) or "(nothing)"}'
        shown = f'<div class="seen">{clip}<img src="{data_url(buffer.getvalue(), "image/png")}"></div>'
        sections += f"<section>{shown}<dl>{items}</dl></section>\n"
    tuned, base = report["tuned"]["exact"], report["base"]["exact"]
    path.write_text(
        PAGE.format(
            headline=f"{tuned:.1%} of {report['clips']} new clips described exactly; before training {base:.1%}",
            table=f"<table>{table}</table><p>None of the {report['clips']} clips was trained. {len(rows)} of them are shown "
            "here, those that the tuned model got wrong first, each with all frames that the models were shown.",
            sections=sections,
            curve=f'<img src="{data_url(curve.read_bytes(), "image/png")}">' if curve.exists() else "",
        ),
        encoding="utf-8",
    )


def write_report(folder: Path) -> dict:
    """Write report.json and report.html into the demo's folder and print the table; returns what report.json holds."""
    if not (folder / "tuned" / "config.json").exists():
        raise SystemExit(f"{folder}/tuned holds no trained model: run llamafactory-cli train recipes/demo.yaml first")
    records = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    expected = [record["conversations"][-1]["value"] for record in records]
    clips = [game.read_clip(folder / record["video"]) for record in records]
    # The trained folder's processor holds the sampling that the recipe trained with; both models get it.
    processor = AutoProcessor.from_pretrained(folder / "tuned")
    answers = {model: answer(folder / model, processor, clips, f"asking {model}") for model in ("base", "tuned")}
    report = {model: score(expected, texts) for model, texts in answers.items()} | {"clips": len(clips)}

    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    wrong_first = sorted(range(len(clips)), key=lambda i: parse(answers["tuned"][i]) == expected[i])
    rows = [
        (folder / records[i]["video"], clips[i], expected[i], {model: texts[i] for model, texts in answers.items()})
        for i in wrong_first[:12]
    ]
    write_page(folder / "report.html", report, rows, folder / "tuned" / "training_loss.png")

    print(f"\n{len(clips)} clips that were never trained\n")
    print("".join(f"{name:>12}" for name in ["", *report["tuned"]]))
    for model in answers:
        print(f"{model:>12}" + "".join(f"{value:12.3f}" for value in report[model].values()))
    print(f"\nexpected  {json.dumps(expected[0], ensure_ascii=False)}")
    for model, texts in answers.items():
        print(f"{model:8}  {' '.join(texts[0].split())[:120]}")
    print(f"\nfigures in {folder / 'report.json'}, clips and answers in {folder / 'report.html'}")
    return report
