"""A small game to learn from: a figure runs across a board and eats another one, or misses it.

A clip is a real H.264 file of 8 frames, 64 x 64 points, at 4 frames/s. Its answer can be told from no single frame:
the hero goes from a corner to the opposite one, first sideways or first up and down, and the prey, which lies in one
of the other corners, is eaten on the way, eaten at the end, or not met.
"""

import itertools
import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

SIZE, FRAMES, FPS = 64, 8, 4  # points a side, frames, frames/s
RADIUS = 11  # of a figure, in points; at 9, shapes and places are learned too late for some random weights

QUESTION = "描述这个视频并进行打标,使用json输出标签"
COLOURS = {
    "红色": (230, 40, 40),
    "绿色": (40, 200, 60),
    "蓝色": (50, 90, 250),
    "黄色": (240, 220, 40),
    "紫色": (190, 50, 220),
    "白色": (240, 240, 240),
}
SHAPES = ("圆形", "方形", "三角形", "十字形")
CORNERS = {"左上": (0, 0), "右上": (1, 0), "左下": (0, 1), "右下": (1, 1)}
ENDINGS = ("途中吃掉", "最后吃掉", "没有碰到")


def words() -> list[str]:
    """The words that questions and answers are made of, for the tokenizer: one token each."""
    directions = ["向左", "向右", "向上", "向下"]
    rest = [
        '{"',
        "video",
        "_description",
        '":',
        ' "',
        "从",
        "出发",
        "，先",
        "，再",
        "，",
        '。",',
        "tags",
        ' ["',
        '",',
        '"]}',
    ]
    return [*COLOURS, *SHAPES, *CORNERS, *directions, *ENDINGS, *rest, QUESTION]


@dataclass(frozen=True)
class Scene:
    """What happens in a clip, in the words of its answer."""

    colour: str
    shape: str
    start: str
    sideways_first: bool
    ending: str
    prey_colour: str
    prey_shape: str

    @property
    def path(self) -> np.ndarray:
        """The corners where the hero starts, turns and ends, (3, 2) as x, y in 0..1."""
        x, y = CORNERS[self.start]
        return np.array([(x, y), (1 - x, y) if self.sideways_first else (x, 1 - y), (1 - x, 1 - y)])

    @property
    def prey_corner(self) -> np.ndarray:
        """Where the prey lies, (2,) as x, y in 0..1."""
        _, turn, end = self.path
        return {"途中吃掉": turn, "最后吃掉": end, "没有碰到": 1 - turn}[self.ending]

    def answer(self) -> dict:
        """What the model shall say. The start comes before the directions: known first, it makes them easier."""
        x, y = CORNERS[self.start]
        steps = ["向左" if x else "向右", "向上" if y else "向下"]
        first, then = steps if self.sideways_first else steps[::-1]
        hero, prey = self.colour + self.shape, self.prey_colour + self.prey_shape
        return {
            "video_description": f"{hero}从{self.start}出发，先{first}，再{then}，{self.ending}{prey}。",
            "tags": [hero, self.start, first + then, self.ending, prey],
        }


def all_scenes() -> list[Scene]:
    """Every scene of the game, 11520, in a fixed order. A scene's number in it names its clip."""
    parts = itertools.product(COLOURS, SHAPES, CORNERS, (True, False), ENDINGS, COLOURS, SHAPES)
    return [scene for scene in itertools.starmap(Scene, parts) if scene.colour != scene.prey_colour]


def figure(shape: str, centre: np.ndarray) -> np.ndarray:
    """The points that a figure covers, (SIZE, SIZE) bool; `centre` is (2,) as x, y in points."""
    y, x = np.mgrid[:SIZE, :SIZE] - centre[::-1, None, None]
    match shape:
        case "圆形":
            return x**2 + y**2 <= RADIUS**2
        case "方形":
            return np.maximum(abs(x), abs(y)) <= 0.85 * RADIUS
        case "三角形":
            return (abs(y) <= RADIUS) & (abs(x) <= (y + RADIUS) / 2)
        case "十字形":
            return (np.minimum(abs(x), abs(y)) <= RADIUS / 3) & (np.maximum(abs(x), abs(y)) <= RADIUS)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The clip of a scene, (FRAMES, SIZE, SIZE, 3) uint8; `rng` varies places and background a little."""
    path, prey = (SIZE * (0.25 + 0.5 * at) + rng.uniform(-3, 3, 2) for at in (scene.path, scene.prey_corner))
    frames = np.full((FRAMES, SIZE, SIZE, 3), rng.integers(50, 90), np.uint8)
    eaten = False
    # The hero turns at time 1, arrives at 2 and stays there, so that the end is seen.
    for frame, time in zip(frames, np.linspace(0, 2.3, FRAMES), strict=True):
        hero = np.array([np.interp(time, [0, 1, 2], axis) for axis in path.T])
        eaten |= np.abs(hero - prey).max() < RADIUS
        if not eaten:
            frame[figure(scene.prey_shape, prey)] = COLOURS[scene.prey_colour]
        frame[figure(scene.shape, hero)] = COLOURS[scene.colour]
    return frames


def write_clip(path: Path, number: int, scene: Scene) -> None:
    """Draw scene `number` and encode it, unless it is there. The file appears under its name when it is whole."""
    if path.exists():
        return
    unfinished = path.with_suffix(".unfinished")
    with av.open(unfinished, "w", format="mp4") as file:
        # crf 16: nearly lossless. One thread: clips are encoded side by side.
        stream = file.add_stream("libx264", FPS, options={"preset": "ultrafast", "crf": "16", "threads": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in draw(scene, np.random.default_rng(number)):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    unfinished.rename(path)


def write_dataset(folder: Path, train: int, test: int) -> None:
    """Write clips, annotations and their registration, as LLaMA-Factory's `dataset_dir` and `media_dir`.

    Every clip shows another scene, so what is tested was never trained, not even in other places.

    Args:
        folder: gets clips/, train.json, test.json and dataset_info.json; clips that are there are kept.
        train, test: numbers of clips.
    """
    scenes = all_scenes()
    if train + test > len(scenes):
        raise ValueError(f"{train} training and {test} test clips: the game has {len(scenes)} scenes in all")
    numbers = random.Random(0).sample(range(len(scenes)), len(scenes))
    parts = {"test": numbers[:test], "train": numbers[test : test + train]}

    (folder / "clips").mkdir(parents=True, exist_ok=True)
    names = {number: f"clips/{number:05d}.mp4" for numbers in parts.values() for number in numbers}
    with ProcessPoolExecutor() as pool:
        work = pool.map(
            write_clip, [folder / name for name in names.values()], names, [scenes[n] for n in names], chunksize=32
        )
        for _ in tqdm(work, "drawing clips", len(names), unit="clip"):
            pass

    def write_json(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")

    for part, numbers in parts.items():
        write_json(f"{part}.json", [record(names[number], scenes[number]) for number in numbers])
    write_json(
        "dataset_info.json",
        {f"demo_{part}": {"file_name": f"{part}.json", "formatting": "video_conversation"} for part in parts},
    )


def record(video: str, scene: Scene) -> dict:
    """A line of the annotation file."""
    question = {"from": "human", "value": f"<video>\n{QUESTION}"}
    return {"video": video, "conversations": [question, {"from": "gpt", "value": scene.answer()}]}
