"""Samples end to end against transformers' own forward pass on each alone."""

import functools
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_clip
from llamafactory.model.model_utils.checkpointing import get_custom_gradient_checkpointing_func
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.model import flat
from llamafactory_video.model.flat import run_flat, segment_attention
from llamafactory_video.prompt.encoder import Encoder
from llamafactory_video.prompt.flat import _grid, lay_flat, rope_positions
from llamafactory_video.prompt.pixels import colour_scale, normalise, token_type_ids, vision_inputs
from llamafactory_video.records.parse import parse_record
from llamafactory_video.train.compiled import CompileWatch, compile_layers
from llamafactory_video.train.recompute import checkpoint_frozen_layers
from llamafactory_video.video.reader import ClipReader
from llamafactory_video.video.sampling import Sampling
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

SAMPLING = Sampling("qwen_finetune", fps=4, min_frames=2, max_frames=8, min_pixels=4096, max_pixels=60000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    save_tiny_model(folder / "model", hidden_size=32, layers=4, heads=2)
    for i in range(3):
        write_clip(folder / f"{i}.mp4", frames=9 + 8 * i, seed=i)
    Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "a.png")
    Image.effect_noise((50, 130), 60).convert("RGB").save(folder / "b.png")
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    return Encoder(processor.tokenizer, processor, ClipReader(SAMPLING), cutoff_len=4096)


RECORDS = [
    ({"video": "0.mp4"}, "<video>看"),
    ({}, "没有图"),
    ({"image": ["a.png", "b.png"]}, "<image>和<image>"),
    ({"video": ["1.mp4", "2.mp4"], "image": "b.png"}, "<video>a<image>b<video>"),
    ({"video": "2.mp4"}, "<video>"),
]


@pytest.fixture(scope="module")
def conversations(folder):
    found = []
    for number, (media, text) in enumerate(RECORDS):
        answer = {"from": "gpt", "value": "好" * (3 * number + 1)}
        record = {**media, "conversations": [{"from": "human", "value": text}, answer]}
        conversation, problems = parse_record(record, lambda name: str(folder / name))
        assert not problems
        found.append(replace(conversation, source=f"{number}"))
    return found


@pytest.fixture(scope="module")
def samples(conversations, encoder):
    """Samples with their decoded clips."""
    return [encoder.load(conversation) for conversation in conversations]


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float64)


def alone(model, sample, encoder):
    """Logits before each label, by transformers' own forward pass."""
    sample, clips = sample
    ids = torch.tensor([sample.ids])
    shown = vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
    logits = model(input_ids=ids, mm_token_type_ids=token_type_ids(ids, encoder.processor), **shown).logits[0]
    labels = torch.tensor(sample.labels)
    return logits[:-1][labels[1:] != -100], labels[1:][labels[1:] != -100]


def flat_inputs(samples, encoder, model):
    side = int(model.config.vision_config.num_position_embeddings**0.5)
    images = [image for sample, _ in samples for image in sample.images]
    clips = [clip for _, decoded in samples for clip in decoded]
    pairs = [(sample.ids, sample.labels) for sample, _ in samples]
    batch = lay_flat(pairs, images, clips, encoder.processor, encoder.reader.sampling, side)
    counts, labels = batch.pop("counts"), batch.pop("labels")
    return batch, labels, counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [3, 0], [1, 4, 3, 2, 0], [1, 1]], ids=str)
def test_logits_and_gradients_are_those_of_each_sample_alone(folder, encoder, samples, chosen, checkpointing):
    chosen = [samples[i] for i in chosen]
    model = load(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pairs = [alone(model, sample, encoder) for sample in chosen]
    expected, targets = torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])
    F.cross_entropy(expected, targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    run_flat(model.model)
    batch, labels, _ = flat_inputs(chosen, encoder, model)
    logits = model(**batch).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-8)  # positions are interpolated in float32
    assert torch.equal(labels, targets)
    F.cross_entropy(logits, labels).backward()
    for name, parameter in model.named_parameters():
        if gradients[name] is None:  # of a tower that was shown nothing
            assert "visual" in name and not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-9)


def shard(rank, model_folder, work, checkpointing):
    """One of two processes under FSDP2: gradients of the mean over the tokens of both."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = load(model_folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    run_flat(model.model)
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers, model):
        fully_shard(layer, mesh=mesh)
    batches = torch.load(work / "batches.pt", weights_only=False)
    batch, labels = batches[rank]
    tokens = sum(len(labels) for _, labels in batches)
    loss = F.cross_entropy(model(**batch).logits[0], labels, reduction="sum") * 2 / tokens  # FSDP2 takes the mean
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, work / "gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_fsdp2_are_those_of_one_process(folder, encoder, samples, checkpointing, tmp_path):
    """Clips and pictures on one process, a text alone on the other."""
    model = load(folder).train()
    pairs = [alone(model, samples[i], encoder) for i in (0, 3, 1)]
    logits, targets = torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])
    F.cross_entropy(logits, targets).backward()
    batches = [flat_inputs([samples[i] for i in chosen], encoder, model)[:2] for chosen in ([0, 3], [1])]
    torch.save(batches, tmp_path / "batches.pt")
    torch.multiprocessing.spawn(shard, (folder, tmp_path, checkpointing), nprocs=2)
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-9)


def test_layers_compile_once_for_all_lengths(folder, encoder, samples, monkeypatch):
    """With the eager backend: what is looked at is how often a layer is traced, and that nothing else changes."""

    @torch.library.custom_op("test::attention", mutates_args=())  # one node of the graph, as the kernel of a GPU is
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, causal: bool) -> torch.Tensor:
        return segment_attention(q, k, v, at, len(q), causal).contiguous()

    attention.register_fake(lambda q, *_: torch.empty_like(q))
    monkeypatch.setattr(
        flat, "segment_attention", lambda q, k, v, at, longest, causal, *_: attention(q, k, v, at, causal)
    )
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    model = load(folder)
    run_flat(model.model)
    batches = [samples[i : i + n] for n in (1, 2, 3, 4) for i in range(len(samples) - n + 1)]
    inputs = [flat_inputs(batch, encoder, model)[0] for batch in batches]
    plain = [model(**each).logits for each in inputs]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(model.model)
    lines = []
    watch = CompileWatch(lines.append)
    watch.on_train_begin()
    for step, (each, expected) in enumerate(zip(inputs, plain, strict=True), 1):
        torch.testing.assert_close(model(**each).logits, expected)
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    found = torch._dynamo.utils.counters
    assert len(batches) > 10 > found["stats"]["unique_graphs"] == 2  # a layer's and a block's
    assert not found["graph_break"]
    assert len(lines) == 1
    assert re.fullmatch(r"torch.compile took \d+\.\d s: 2 programs, 0 of them from its cache on disk.", lines[0])
    for step in (15, 16):  # other programs: without gradients, and for inputs of another type
        with torch.no_grad():
            model(**inputs[0])
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
        model.float()
    watch.on_train_end()
    assert len(lines) == 2
    assert lines[1].startswith("By step 15, torch.compile was needed again and took ")


@pytest.mark.parametrize(
    "trained", ["visual.merger", "visual", "language_model.layers", "embed_tokens", "language_model.norm"]
)
def test_frozen_layers_compute_again_where_gradients_pass_through_them(folder, encoder, samples, trained):
    """LLaMA-Factory's way of checkpointing leaves layers without trained weights out."""
    found = {}
    for checkpointing in (False, True):
        model = load(folder).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        if checkpointing:
            wrapped = get_custom_gradient_checkpointing_func(functools.partial(checkpoint, use_reentrant=True))
            model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=wrapped)
        run_flat(model.model)
        if checkpointing:
            checkpoint_frozen_layers(model.model)
        calls = [0]
        for layer in model.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        batch, labels, _ = flat_inputs(samples[:2], encoder, model)
        F.cross_entropy(model(**batch).logits[0], labels).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found[checkpointing] = calls[0], gradients
    layers = len(model.model.language_model.layers)
    assert found[False][0] == layers
    assert found[True][0] == layers * (1 if trained == "language_model.norm" else 2)
    assert found[True][1].keys() == found[False][1].keys() != set()
    for name, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], gradient, rtol=1e-9, atol=1e-12)


def test_what_was_not_laid_flat_goes_through_as_before(folder, encoder, samples):
    model = load(folder).eval()
    expected = [alone(model, sample, encoder)[0] for sample in samples]
    run_flat(model.model)
    for sample, logits in zip(samples, expected, strict=True):
        torch.testing.assert_close(alone(model, sample, encoder)[0], logits)


def test_layout_holds_what_the_trainer_counts(folder, encoder, samples):
    _, labels, shown = flat_inputs(samples, encoder, load(folder))
    assert shown["lengths"] == [len(sample.ids) for sample, _ in samples]
    assert (shown["images"], shown["clips"]) == (3, 4)
    assert shown["grids"][3:] == [clip.plan.grid for _, clips in samples for clip in clips]
    assert shown["supervised"] == [sum(label != -100 for label in sample.labels) for sample, _ in samples]
    assert len(labels) == sum(shown["supervised"])


def test_positions_are_those_of_the_model(folder, encoder, samples):
    model = load(folder).model
    merge, pads = 2, (encoder.processor.image_token_id, encoder.processor.video_token_id)
    for sample, clips in samples:
        ids = torch.tensor([sample.ids])
        shown = vision_inputs(sample.images, clips, encoder.processor, encoder.reader.sampling)
        grids = {f"{kind}_grid_thw": shown.get(f"{kind}_grid_thw") for kind in ("image", "video")}
        expected, _ = model.get_rope_index(ids, token_type_ids(ids, encoder.processor), **grids)
        in_tokens = [
            iter(
                [(h // merge, w // merge) for t, h, w in (grid.tolist() if grid is not None else ()) for _ in range(t)]
            )
            for grid in grids.values()
        ]
        assert np.array_equal(rope_positions(ids[0].numpy(), *in_tokens, pads), expected[:, 0])


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 4, 6), (1, 16, 10), (3, 2, 30)], ids=str)
def test_the_towers_positions_are_its_own(folder, grid):
    visual = load(folder).float().model.visual
    time, height, width = grid
    coordinates, index, weight = _grid(height, width, visual.spatial_merge_size, visual.num_grid_per_side)
    expected = visual.fast_pos_embed_interpolate(torch.tensor([grid]))
    found = (visual.pos_embed(index) * weight[..., None]).sum(0).repeat(time, 1)
    torch.testing.assert_close(found, expected)
    angles = (coordinates[..., None].float() * visual.rotary_pos_emb.inv_freq).flatten(1).repeat(time, 1)
    assert torch.equal(angles, visual.rot_pos_emb(torch.tensor([grid])))


def test_what_a_question_laid_out_can_be_trained_with():
    with torch.inference_mode():
        assert not any(tensor.is_inference() for tensor in _grid(6, 14, 2, 48))


def test_bytes_normalised_later_are_what_the_processors_give(encoder, samples):
    images = [image for sample, _ in samples for image in sample.images]
    clips = [clip for _, decoded in samples for clip in decoded]
    expected = vision_inputs(images, clips, encoder.processor, encoder.reader.sampling)
    raw = vision_inputs(images, clips, encoder.processor, encoder.reader.sampling, normalised=False)
    for name in ("pixel_values", "pixel_values_videos"):
        assert raw[name].dtype == torch.uint8
        assert torch.equal(normalise(raw[name], *colour_scale(encoder.processor.video_processor)), expected[name])


@pytest.mark.parametrize("causal", [True, False])
def test_attention_stays_inside_each_segment(causal):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 3]
    query = torch.randn(18, 4, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, 18, 2, 8, dtype=torch.float64, generator=generator)
    bounds = [0, *itertools.accumulate(lengths)]
    found = segment_attention(query, key, value, torch.tensor(bounds, dtype=torch.int32), 16, causal, 0.3)
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = segment[:, None] == segment
    if causal:
        mask &= torch.ones_like(mask).tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


def test_neighbours_change_nothing(folder, encoder, samples):
    """On the CPU to the last bit: attention is asked for each sample by itself, and all else is by token."""
    model = load(folder).float().eval()
    run_flat(model.model)
    rows = []
    for chosen in ([3], [0, 3], [3, 4, 1]):
        batch, _, counts = flat_inputs([samples[i] for i in chosen], encoder, model)
        at = sum(counts["supervised"][: chosen.index(3)])
        rows.append(model(**batch).logits[0, at : at + counts["supervised"][chosen.index(3)]])
    for other in rows[1:]:
        torch.testing.assert_close(other, rows[0], rtol=0, atol=2e-6)  # products of other sizes round otherwise
