"""Whether what a model is tested on was trained on: clips of one recording, the same files, and clips that look alike."""

from collections.abc import Mapping, Sequence

import numpy as np

ALIKE = 6.0  # bits of 64 in which the frames of two clips may differ on average; chance gives 32
_ROWS = 256


def same(held: Mapping[str, str], trained: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of clips, one of each, that share a value: the recording that they are of, or a hash of their content.

    Args:
        held, trained: the value of each clip; "" where it is not known.
    """
    first: dict[str, str] = {}
    for clip, value in trained.items():
        if value:
            first.setdefault(value, clip)
    return [(clip, first[value]) for clip, value in held.items() if value in first]


def alike(
    held: Sequence[str], of_held: np.ndarray, trained: Sequence[str], of_trained: np.ndarray
) -> list[tuple[str, str]]:
    """Pairs of clips whose frames look alike, each with the one that is most like it.

    Args:
        held, trained: names of clips.
        of_held, of_trained: perceptual hashes of as many frames of each, (clips, frames) uint64, in order of time.
    """
    pairs = []
    for at in range(0, len(held), _ROWS):
        distances = np.zeros((len(of_held[at : at + _ROWS]), len(trained)))
        for frame in range(of_held.shape[1]):
            differing = of_held[at : at + _ROWS, frame, None] ^ of_trained[None, :, frame]
            distances += np.bitwise_count(differing)
        distances /= of_held.shape[1]
        for row, nearest in enumerate(distances.argmin(axis=1)):
            if distances[row, nearest] <= ALIKE:
                pairs.append((held[at + row], trained[nearest]))
    return pairs
