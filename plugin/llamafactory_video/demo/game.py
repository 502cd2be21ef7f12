"""A small game to learn from: a figure runs around a board and eats another one that lies in its way.

A clip is a real H.264 file of 8 frames, 64 x 64, at 4 frames/s. What is asked can be told from no single frame: the
hero goes from one corner to the opposite one, first across or first down, and what lies in the other corners is
eaten on the way, eaten at the end, or missed.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

SIZE, FRAMES, FPS = 64, 8, 4
RADIUS = 9  # of a figure, in points

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
    steps = ["向左", "向右", "向上", "向下"]
    furniture = [
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
    return [*COLOURS, *SHAPES, *CORNERS, *steps, *ENDINGS, *furniture, QUESTION]


@dataclass(frozen=True)
class Scene:
    """What happens in a clip, in the words of its answer."""

    colour: str
    shape: str
    start: str
    across_first: bool
    ending: str
    prey_colour: str
    prey_shape: str

    @property
    def path(self) -> np.ndarray:
        """The corners that the hero visits, (3, 2) as x, y in 0..1."""
        x, y = CORNERS[self.start]
        return np.array([(x, y), (1 - x, y) if self.across_first else (x, 1 - y), (1 - x, 1 - y)])

    @property
    def prey_corner(self) -> np.ndarray:
        turn, end = self.path[1:]
        return {"途中吃掉": turn, "最后吃掉": end, "没有碰到": 1 - turn}[self.ending]

    def answer(self) -> dict:
        x, y = CORNERS[self.start]
        steps = ["向左" if x else "向右", "向上" if y else "向下"]
        first, then = steps if self.across_first else steps[::-1]
        hero, prey = self.colour + self.shape, self.prey_colour + self.prey_shape
        return {
            "video_description": f"{hero}从{self.start}出发，先{first}，再{then}，{self.ending}{prey}。",
            "tags": [hero, self.start, first + then, self.ending, prey],
        }


def all_scenes() -> list[Scene]:
    """Every scene that the game knows, in a fixed order."""
    parts = itertools.product(COLOURS, SHAPES, CORNERS, (True, False), ENDINGS, COLOURS, SHAPES)
    return [scene for scene in itertools.starmap(Scene, parts) if scene.colour != scene.prey_colour]


def figure(shape: str, centre: np.ndarray) -> np.ndarray:
    """The points of the board that a figure covers, (SIZE, SIZE) bool."""
    y, x = np.mgrid[:SIZE, :SIZE] - centre[::-1, None, None]
    across, down = abs(x), abs(y)
    match shape:
        case "圆形":
            return x**2 + y**2 <= RADIUS**2
        case "方形":
            return np.maximum(across, down) <= 0.85 * RADIUS
        case "三角形":
            return (down <= RADIUS) & (across <= (y + RADIUS) / 2)
        case "十字形":
            return (np.minimum(across, down) <= RADIUS / 3) & (np.maximum(across, down) <= RADIUS)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The clip of a scene, (FRAMES, SIZE, SIZE, 3) uint8; `rng` shakes the places and the light a little."""

    def place(corners):
        return SIZE / 4 + corners * SIZE / 2 + rng.uniform(-3, 3, size=2)

    path, prey = place(scene.path), place(scene.prey_corner)
    frames = np.full((FRAMES, SIZE, SIZE, 3), rng.integers(10, 50), dtype=np.uint8)
    eaten = False
    for frame, time in zip(frames, np.linspace(0, 2.3, FRAMES), strict=True):
        hero = np.array([np.interp(time, [0, 1, 2], axis) for axis in path.T])
        eaten |= np.abs(hero - prey).max() < RADIUS
        if not eaten:
            frame[figure(scene.prey_shape, prey)] = COLOURS[scene.prey_colour]
        frame[figure(scene.shape, hero)] = COLOURS[scene.colour]
    return frames


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode (T, H, W, 3) uint8 frames as H.264 at FPS frames/s."""
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "crf": "16", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
