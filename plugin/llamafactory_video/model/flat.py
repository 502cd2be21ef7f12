"""Qwen3-VL's forward pass on samples that lie end to end, without padding.

Attention stays inside each sample, as `data_flatten` of the official trainer has it, and in the vision tower inside each
picture or pair of frames; a layer makes one call for all of them. Logits are computed only where a label is. The layout
comes from `prompt.flat`.
"""

import itertools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.generic import is_flash_attention_requested

from ..prompt.pixels import normalise
from ..prompt.tokens import IGNORE_INDEX

ATTENTION = "segments"  # the name of our attention in transformers' register


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention inside each segment of tokens that lie end to end.

    On a GPU in half precision, one call of torch's kernel; elsewhere a call of scaled_dot_product_attention for each
    segment.

    Args:
        query: (tokens, heads, dim). key, value: (tokens, heads of keys, dim).
        cu_seqlens: where segments begin, and the end of the last, (segments + 1,) int32.
        longest: tokens of the longest segment, at least.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=window
        )
    out = []
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", and for samples end to end `segment_attention`; under the names that flash-attn has there."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out = segment_attention(query, key, value, cu_seq_lens_q, max_length_q, True, scaling, dropout)
    return out[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _vision_attention(
    attention: torch.nn.Module, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The vision tower's attention with one call for all pictures."""
    longest = kwargs.pop("longest", None)
    if longest is None:
        return type(attention).forward(attention, hidden_states, cu_seqlens, *args, **kwargs)
    count = len(hidden_states)
    query, key, value = attention.qkv(hidden_states).reshape(count, 3, attention.num_heads, -1).unbind(1)
    query, key = attention.rotate(query, key, *kwargs["position_embeddings"])
    out = segment_attention(query, key, value, cu_seqlens, longest, False, attention.scaling)
    return attention.proj(out.reshape(count, -1))


def run_flat(model: torch.nn.Module) -> None:
    """Let Qwen3-VL take batches of `lay_flat`, beside those that it takes anyway.

    Args:
        model: transformers' Qwen3VLModel or Qwen3VLMoeModel; `forward` of it and of its parts is replaced.
    """
    # Methods, so a deep copy of the model calls its own; of modules, so what wraps or watches these sees them called.
    forwards = {model: _forward, model.visual: _vision_forward, model.language_model: _language_forward}
    forwards |= {block.attn: _vision_attention for block in model.visual.blocks}
    forwards[model.visual.patch_embed.proj] = _as_product
    for module, forward in forwards.items():
        module.forward = MethodType(forward, module)
    for block in model.visual.blocks:  # as it is now: a package of kernels may have replaced it
        block.attn.rotate = sys.modules[type(block.attn).__module__].apply_rotary_pos_emb_vision
    text = model.language_model.config
    if text._attn_implementation != "eager" and not is_flash_attention_requested(text):
        text._attn_implementation = ATTENTION


def _as_product(convolution: torch.nn.Module, patches: torch.Tensor) -> torch.Tensor:
    """A convolution over the whole of each patch, which is a matrix product, (patches, channels, t, h, w)."""
    weight, bias = convolution.weight, convolution.bias
    return F.linear(patches.flatten(1), weight.flatten(1), bias)[:, :, None, None, None]


def _forward(model: torch.nn.Module, *args: Any, flat: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A forward pass of Qwen3-VL without its head.

    Args:
        flat: the layout of samples end to end. Of their tokens `cu_seqlens`, where samples begin, (samples + 1,),
            `longest`, the tokens of the longest, and `visual_at`, which tokens are visual, in the order in which the
            tower gives them, (visual tokens,), or None. For the tower, pictures and pairs of frames end to end:
            `patches` (patches, pixels) uint8, their `colour_scale`, `coordinates` (patches, 2), `table_index` and
            `table_weight` (4, patches), `vision_cu_seqlens` and `vision_longest`. `look`, if it is there, is called with the
            part after each layer.
    """
    if flat is None:
        with torch.compiler.set_stance("force_eager"):  # layouts for which layers were not compiled
            return _padded(model, *args, **kwargs)
    hidden = model.get_input_embeddings()(kwargs["input_ids"])
    seen, at = model.visual(flat=flat), flat["visual_at"]
    features, deepstack = seen.pooler_output, seen.deepstack_features
    if at is None:
        nothing = sum(feature.sum() for feature in (features, *deepstack)) * 0
        hidden, deepstack = hidden + nothing.to(hidden.dtype), ()
    else:
        hidden = hidden.index_copy(1, at, features.to(hidden.dtype)[None])
    hidden = model.language_model(hidden, kwargs["position_ids"], deepstack, flat=flat)
    outputs = getattr(sys.modules[type(model).__module__], f"{type(model).__name__}OutputWithPast")
    return outputs(last_hidden_state=hidden)


def _overlook(part: str) -> None:
    pass


def _language_forward(language: torch.nn.Module, *args: Any, flat: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    if flat is None:
        return type(language).forward(language, *args, **kwargs)
    hidden, positions, deepstack = args
    rotary = language.rotary_emb(hidden, positions)
    segments = {"cu_seq_lens_q": flat["cu_seqlens"], "cu_seq_lens_k": flat["cu_seqlens"]}
    segments |= {"max_length_q": flat["longest"], "max_length_k": flat["longest"]}
    look = flat.get("look", _overlook)
    for number, layer in enumerate(language.layers):
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, **segments)
        look("language_model")
        if number < len(deepstack):
            hidden = hidden.index_add(1, flat["visual_at"], deepstack[number].to(hidden.dtype)[None])
    return language.norm(hidden)


def _vision_forward(visual: torch.nn.Module, *args: Any, flat: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    if flat is None:
        return type(visual).forward(visual, *args, **kwargs)
    # Gradient checkpointing asks for gradients of what a tower takes, also of a frozen one.
    tower = (visual.patch_embed, visual.pos_embed, visual.blocks)
    learns = any(parameter.requires_grad for part in tower for parameter in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        hidden, tapped = _tower(visual, flat)
    mergers, indexes = visual.deepstack_merger_list, visual.deepstack_visual_indexes
    merged = [mergers[indexes.index(number)](given) for number, given in tapped.items()]
    outputs = sys.modules[type(visual).__module__].BaseModelOutputWithDeepstackFeatures
    return outputs(last_hidden_state=hidden, pooler_output=visual.merger(hidden), deepstack_features=merged)


def _tower(visual: torch.nn.Module, flat: dict[str, Any]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """What the last block of the vision tower gives, and by number those that the language model's first layers get."""
    patches = normalise(flat["patches"], *flat["colour_scale"])
    hidden = visual.patch_embed(patches.to(visual.dtype))
    table = visual.pos_embed(flat["table_index"]) * flat["table_weight"].to(visual.pos_embed.weight.dtype)[..., None]
    hidden = hidden + (table[0] + table[1] + table[2] + table[3])
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()  # with adapters: as what all later blocks take, so that one program fits all
    inverse = visual.rotary_pos_emb.inv_freq
    angles = (flat["coordinates"][..., None].to(inverse.dtype) * inverse).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    rotary = angles.cos(), angles.sin()
    tapped, look = {}, flat.get("look", _overlook)
    for number, block in enumerate(visual.blocks):
        hidden = block(
            hidden,
            cu_seqlens=flat["vision_cu_seqlens"],
            position_embeddings=rotary,
            longest=flat["vision_longest"],
        )
        look("vision_tower")
        if number in visual.deepstack_visual_indexes:
            tapped[number] = hidden
    return hidden, tapped


def loss_of_flat(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A loss that shifts labels itself, as LLaMA-Factory's for `use_dft_loss` does, for flat micro-batches too.

    Those have logits of their labels alone: they are laid out as a row in which each label stands one place behind its logits.
    """

    def of_row(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        if labels.dim() == 1:
            outputs = {"logits": F.pad(outputs["logits"], (0, 0, 0, 1))}
            labels = F.pad(labels, (1, 0), value=IGNORE_INDEX)[None]
        return loss(outputs, labels, num_items_in_batch)

    return of_row


def _padded(model: torch.nn.Module, *args: Any, pixel_values=None, pixel_values_videos=None, **kwargs: Any) -> Any:
    """transformers' own forward pass, with one call of the vision tower for the images and clips of a batch.

    transformers calls it once for images and once for clips. Where weights are spread over processes (ZeRO-3, FSDP),
    every call gathers them from all: a process whose batch has both would wait for one whose batch has clips alone.
    Patches attend within their own picture or time slice, so the result is the same.
    """
    shown = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
    if pixel_values is None or pixel_values_videos is None or "get_video_features" in vars(model):
        return type(model).forward(model, *args, **shown, **kwargs)
    images, clips = kwargs["image_grid_thw"], kwargs["video_grid_thw"]
    features = model.get_image_features(
        torch.cat([pixel_values, pixel_values_videos]), torch.cat([images, clips]), return_dict=True
    )
    tokens = sum(len(embeds) for embeds in features.pooler_output[: len(images)])

    def part(items: slice, rows: slice) -> Any:
        deepstack = [layer[rows] for layer in features.deepstack_features]
        return type(features)(pooler_output=features.pooler_output[items], deepstack_features=deepstack)

    model.get_image_features = lambda *_, **__: part(slice(len(images)), slice(tokens))
    model.get_video_features = lambda *_, **__: part(slice(len(images), None), slice(tokens, None))
    try:
        return type(model).forward(model, *args, **shown, **kwargs)
    finally:
        del model.get_image_features, model.get_video_features
