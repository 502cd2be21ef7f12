"""The size of frames and pictures, as each dialect rounds and bounds it."""

import math

from .sampling import ClipInfo, Sampling, SamplingError

# LLaMA-Factory pre-shrinks frames with PIL before the processor's own resize, never below this side (pixels).
_LLAMAFACTORY_MIN_SIDE = 28
# Bounds that qwen-vl-utils takes for granted, in visual tokens.
_UTILS_IMAGE_TOKENS = (4, 16384)
_UTILS_FRAME_TOKENS = (128, 768)
_UTILS_CONTEXT_TOKENS = 128000  # nine tenths of it are for a clip


def smart_resize(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """The size nearest to (height, width), in multiples of `factor`, within the pixel bounds.

    Follows `smart_resize` of transformers' Qwen3-VL video processor; with one frame, that of its image processor.

    Args:
        min_pixels, max_pixels: bounds on frames x height x width.
        num_frames: frames shown.
        temporal_factor: frames in a temporal patch.

    Returns:
        (height, width) in pixels.

    Raises:
        SamplingError: if one side is over 200 times the other.
    """
    _check_ratio(height, width)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    frames = math.ceil(num_frames / temporal_factor) * temporal_factor
    if frames * new_height * new_width > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def utils_smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size nearest to (height, width), as `smart_resize` of qwen-vl-utils 0.0.14, (height, width) in pixels.

    It differs from transformers' in frames smaller than half the factor, and in where it stops shrinking.

    Raises:
        SamplingError: if one side is over 200 times the other, or no size within the bounds is left.
    """
    _check_ratio(height, width)
    if max_pixels < min_pixels:
        raise SamplingError(
            f"max_pixels {max_pixels:g} is below min_pixels {min_pixels:g}; raise or lower one of them"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
        if not new_height * new_width:
            raise SamplingError(
                f"max_pixels {max_pixels:g} leaves no pixels of a frame of {width} x {height}; raise it"
            )
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def utils_frame_bounds(sampling: Sampling, frames: int) -> tuple[int, float]:
    """Least pixels of a frame in `qwen_vl_utils`, and the limit above which its max_pixels has no effect.

    Args:
        frames: shown of the clip.
    """
    token = sampling.factor**2
    least = sampling.min_pixels or _UTILS_FRAME_TOKENS[0] * token
    total = sampling.total_pixels or _UTILS_CONTEXT_TOKENS * token * 0.9
    return least, max(min(_UTILS_FRAME_TOKENS[1] * token, total / frames * 2), int(least * 1.05))


def _check_ratio(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        raise SamplingError(f"frames are {width} x {height}; one side may be at most 200 times the other")


def llamafactory_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size of LLaMA-Factory's first resize, (height, width); follows its Qwen2VLPlugin._preprocess_image."""
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    if width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        width, height = int(width * scale), int(height * scale)
    width, height = max(width, _LLAMAFACTORY_MIN_SIDE), max(height, _LLAMAFACTORY_MIN_SIDE)
    if width > 200 * height:
        width = height * 180
    if height > 200 * width:
        height = width * 180
    return height, width


def image_size(height: int, width: int, sampling: Sampling) -> tuple[int, int] | None:
    """The size to which the dialect resizes an image before the processor does, (height, width); None if it does not."""
    if sampling.image_bounds is None:
        return None
    if sampling.dialect == "qwen_vl_utils":
        return utils_smart_resize(height, width, sampling.factor, *sampling.image_bounds)
    return llamafactory_size(height, width, *sampling.image_bounds)


def tokens_of_image(height: int, width: int, sampling: Sampling, least: int, most: int) -> int:
    """Visual tokens of an image.

    Args:
        least, most: pixels that the image processor allows.

    Raises:
        SamplingError: if one side is over 200 times the other.
    """
    height, width = image_size(height, width, sampling) or (height, width)
    if sampling.dialect != "qwen_vl_utils":
        height, width = smart_resize(height, width, sampling.factor, least, most)
    return height * width // sampling.factor**2


def frame_size(
    info: ClipInfo, sampling: Sampling, sampled: int, shown: int
) -> tuple[int, int, tuple[int, int] | None]:
    """Height and width of the frames shown, and of a first resize by PIL."""
    height, width, factor = info.height, info.width, sampling.factor
    if sampling.dialect == "qwen_vl_utils":
        return _utils_size(info, sampling, shown)
    pre_size = None
    min_pixels, max_pixels = sampling.min_pixels, sampling.max_pixels
    if sampling.dialect == "llamafactory":
        pre_size = height, width = llamafactory_size(height, width, min_pixels, max_pixels)
        min_pixels, max_pixels = sampling.processor_min_pixels, sampling.processor_max_pixels
        sampled = shown  # here the odd frame is repeated before the size is chosen, elsewhere after
    if min(height, width) < factor:
        raise SamplingError(f"frames are {width} x {height}; Qwen3-VL needs at least {factor} on each side")
    size = smart_resize(height, width, factor, min_pixels, max_pixels, sampled, sampling.temporal_patch_size)
    return *size, pre_size


def _utils_size(info: ClipInfo, sampling: Sampling, shown: int) -> tuple[int, int, tuple[int, int] | None]:
    height, width, token = info.height, info.width, sampling.factor**2
    fixed = None if sampling.resized_height is None else (sampling.resized_height, sampling.resized_width)
    image_bounds = [tokens * token for tokens in _UTILS_IMAGE_TOKENS]
    pre_size = None
    if info.pictures:
        # Pictures pass through its image loader first, which is told a patch twice as large as the real one.
        least, most = (4 * pixels for pixels in image_bounds)
        if fixed is None:
            least, most = sampling.min_pixels or least, sampling.max_pixels or most
        pre_size = height, width = utils_smart_resize(*(fixed or (height, width)), 2 * sampling.factor, least, most)
    if fixed is not None:
        return *utils_smart_resize(*fixed, sampling.factor, *image_bounds), pre_size
    least, limit = utils_frame_bounds(sampling, shown)
    size = utils_smart_resize(height, width, sampling.factor, least, min(sampling.max_pixels or limit, limit))
    return *size, pre_size
