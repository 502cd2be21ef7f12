"""Clips whose every picture carries its number as black and white blocks, over noise that moves.

So a frame taken for another, or decoded from wrong references, is seen. `python tests/drawing.py` draws those of
tests/clips again, whose bytes the tests of damage depend on.
"""

import itertools
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLIPS = Path(__file__).parent / "clips"

os.environ["SVT_LOG"] = "1"
ROWS, COLUMNS = 3, 4  # blocks of a picture: the bits of its number
X265 = {"x265-params": "log-level=none:pools=1"}
NOISE = np.random.default_rng(0).integers(-20, 21, (64, 64))


def picture(number, size=(64, 96)):
    """A picture of its number, (H, W, 3) uint8."""
    height, width = size
    rows, columns = np.arange(height) * ROWS // height, np.arange(width) * COLUMNS // width
    bits = number >> (rows[:, None] * COLUMNS + columns) & 1
    noise = np.roll(np.tile(NOISE, (height // 64 + 1, width // 64 + 1)), 3 * number, axis=1)[:height, :width]
    return np.repeat((40 + 170 * bits + noise)[..., None], 3, axis=2).astype(np.uint8)


def number_in(frame):
    """The number that a picture shows."""
    height, width = frame.shape[0] // ROWS, frame.shape[1] // COLUMNS
    middle = [
        frame[row * height + height // 4 : (row + 1) * height - height // 4, column * width + width // 4 :][
            :, : width // 2
        ].mean()
        for row, column in itertools.product(range(ROWS), range(COLUMNS))
    ]
    return sum((value > 125) << place for place, value in enumerate(middle))


def write(
    path,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    frames=24,
    first=0,
    rate=12,
    size=(64, 96),
    stamps=None,
    late=0,
    aspect=None,
    container_options=None,
    streams=1,
    audio=False,
    change=None,
):
    """A video whose pictures show the numbers from `first` on.

    Args:
        stamps: presentation times in ms, in place of those of the rate.
        late: frames' time that passes before the first one.
        streams: video streams; the second shows numbers from 1000 on.
        change: of each packet before it is written.
    """
    options = {"threads": "1", **(X265 if codec == "libx265" else {}), **(options or {})}
    if codec == "libx264":
        options.setdefault("preset", "veryfast")
    with av.open(str(path), "w", options=container_options or {}) as container:
        tracks = []
        for _ in range(streams):
            track = container.add_stream(codec, rate=rate, options=options)
            track.height, track.width, track.pix_fmt = *size, pix_fmt
            if aspect:
                track.codec_context.sample_aspect_ratio = aspect
            if stamps is not None:
                track.codec_context.time_base = Fraction(1, 1000)
            tracks.append(track)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for i in range(frames + 1):
            for place, track in enumerate(tracks):
                frame = None
                if i < frames:
                    frame = av.VideoFrame.from_ndarray(picture(first + i + 1000 * place, size), format="rgb24")
                    frame = frame.reformat(format=pix_fmt)
                    frame.pts, frame.time_base = i + late, Fraction(1, rate)
                    if stamps is not None:
                        frame.pts, frame.time_base = int(stamps[i]), Fraction(1, 1000)
                for packet in track.encode(frame):
                    container.mux(change(packet) if change else packet)
            if sound is not None:
                samples = None
                if i < frames:
                    samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000 // rate), np.float32), "fltp", "mono")
                    samples.sample_rate = 16000
                container.mux(sound.encode(samples))
    return path


# Drawn once and kept: what becomes of a byte that is damaged depends on what the encoder wrote.
KEPT = {
    "h264.mp4": dict(options={"g": "6", "bf": "2"}, container_options={"movflags": "faststart"}),
    "h264.mkv": dict(options={"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=6:scenecut=0"}),
    "fragments.mp4": dict(options={"g": "6"}, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "h264.ts": dict(options={"g": "6", "bf": "2"}),
    "hevc.mkv": dict(codec="libx265", options={"g": "6"}),
    "vp8.webm": dict(codec="libvpx", options={"deadline": "realtime", "g": "6"}),
    "mpeg4.avi": dict(codec="mpeg4", options={"g": "6"}),
}

if __name__ == "__main__":
    CLIPS.mkdir(exist_ok=True)
    for name, made in KEPT.items():
        write(CLIPS / name, **made)
