"""Modules that should learn and have no usable gradient, runs that diverge, and the table of what trains."""

from unittest import mock

import pytest
import torch
from llamafactory_video.train.audit import GradientAudit, GradientError
from llamafactory_video.train.trainer import VideoTrainer
from runs import Start, train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainerCallback


class Cut(TrainerCallback):
    """Cuts the gradient of what a module returns, as wrong freezing or checkpointing would."""

    def __init__(self, name: str, change) -> None:
        self.name, self.change = name, change

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.get_submodule(self.name).register_forward_hook(lambda module, inputs, output: self.change(output))


def test_modules_without_a_gradient_stop_the_run_by_name(keys, tmp_path):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    with pytest.raises(GradientError) as caught:
        train(keys, tmp_path, cut, dataset="clips")
    text = str(caught.value)
    assert "after step 1" in text and "gradient missing: " in text and "model.visual.merger.linear_fc1" in text
    assert "model.language_model" not in text and "deepstack" not in text
    assert "gradient_check: warn" in text


def test_zero_gradients_and_those_that_are_not_finite_are_told_apart(keys, tmp_path):
    with pytest.raises(GradientError, match=r"gradient zero: .*model\.visual\.merger\.linear_fc2"):
        train(keys, tmp_path / "zero", Cut("model.visual.merger", lambda output: output * 0), dataset="clips")
    with pytest.raises(GradientError, match=r"gradient not finite: .*model\.visual\.patch_embed\.proj"):
        broken = Cut("model.visual.merger", lambda output: output * torch.inf)
        train(keys, tmp_path / "inf", broken, dataset="clips")


def test_a_run_goes_on_without_a_gradient_where_it_is_allowed(keys, tmp_path, told):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    lines = train(keys, tmp_path, cut, dataset="clips", gradient_check="warn", max_steps=2)
    assert len(lines) == 2
    assert len(told) == 1 and "gradient missing: " in told[0] and "model.visual.merger.linear_fc1" in told[0]


def test_vision_is_judged_once_something_is_shown(keys, tmp_path):
    """Texts alone give the vision tower no gradient, and that is right."""
    assert len(train(keys, tmp_path / "texts", dataset="texts", max_steps=2)) == 2
    cut = Cut("model.visual", lambda output: type(output)(**{k: _cut(v) for k, v in output.items()}))
    with pytest.raises(GradientError, match="after step 4"):  # 8 texts first, in batches of 4; asked at 1, 2, 4, 8, …
        train(keys, tmp_path / "later", cut, dataset="texts,clips", max_samples=8, max_steps=4)


def _cut(value):
    return [_cut(item) for item in value] if isinstance(value, list | tuple) else value.detach()


def test_a_run_that_diverges_stops_before_it_is_saved(keys, tmp_path):
    rates = {"learning_rate": 1e30, "mm_projector_lr": 1e30, "vision_tower_lr": 1e30}
    with pytest.raises(GradientError, match=r"training has diverged \(loss nan.* Lower the learning rates"):
        train(keys, tmp_path, **rates, logging_steps=5, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("logging", "saving"),
    [
        ({"logging_steps": 500}, {"save_strategy": "steps", "save_steps": 4}),
        pytest.param({"logging_steps": 500}, {"save_strategy": "no"}, marks=pytest.mark.thorough),
        pytest.param(
            {"logging_strategy": "no"}, {"save_strategy": "steps", "save_steps": 4}, marks=pytest.mark.thorough
        ),
        ({"logging_strategy": "no"}, {"save_strategy": "no"}),
    ],
)
def test_it_is_not_saved_where_no_line_of_the_log_tells(keys, tmp_path, logging, saving):
    rates = {"learning_rate": 1e30, "mm_projector_lr": 1e30, "vision_tower_lr": 1e30}
    with pytest.raises(GradientError, match=r"training has diverged \(loss nan"):
        train(keys, tmp_path, **rates, **logging, **saving, max_steps=6)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_hooks_are_gone_once_all_is_judged(keys, tmp_path):
    """DeepSpeed asks for the optimizer twice."""
    start, ask = Start(), VideoTrainer.create_optimizer
    with mock.patch.object(VideoTrainer, "create_optimizer", lambda self: (ask(self), ask(self))[1]):
        train(keys, tmp_path, start, dataset="clips", max_steps=1)
    assert not any(weight._backward_hooks for weight in start.model.parameters())


def test_a_layer_keeps_its_name_when_it_is_wrapped():
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    audit = GradientAudit(inner.named_parameters(), from_hooks=False)
    wrapped = torch.compile(torch.nn.Sequential(checkpoint_wrapper(inner[0])), backend="eager")
    wrapped(torch.ones(1, 2)).sum().backward()
    audit.take(wrapped.named_parameters())
    assert audit.check(torch.device("cpu")) == {} and audit.pending == []


def test_what_is_frozen_stands_in_the_table(keys, tmp_path):
    train(keys, tmp_path, max_steps=1, vision_tower_lr=None, freeze_vision_tower=True)
    rows = [line.split() for line in (tmp_path / "trained_modules.txt").read_text().splitlines()]
    assert [row[:1] + row[2:] for row in rows if "frozen" in row] == [["vision_tower", "frozen"]]
    assert [row[0] for row in rows].count("language_model") == 2  # with and without weight decay


def test_the_word_off_is_what_yaml_makes_of_it(keys, tmp_path):
    cut = Cut("model.visual.merger", torch.Tensor.detach)
    assert len(train(keys, tmp_path, cut, dataset="clips", gradient_check=False, max_steps=1)) == 1
