"""Learning rates by module, against plain loops: one optimizer for each tensor, its rate and decay set by hand.

Models, optimizers and schedulers are LLaMA-Factory's, transformers' and torch's own; gradients are drawn by name.
"""

import contextlib
import importlib
import importlib.util
import json
import math
from types import SimpleNamespace
from unittest import mock
from zlib import crc32

import pytest
import torch
from llamafactory.hparams import get_train_args, parser
from llamafactory.model import load_model, load_tokenizer
from llamafactory.train import trainer_utils
from llamafactory.train.trainer_utils import DummyOptimizer
from llamafactory_video.demo.tiny_model import save_tiny_model
from llamafactory_video.host.train import extend_optimizer
from llamafactory_video.train.optimizer import (
    GroupRow,
    check_deepspeed,
    check_groups,
    group_rows,
    group_table,
    make_optimizer,
    split_groups,
)
from llamafactory_video.train.rounding import check_rounding, rounding_loss
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, get_scheduler
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

RATE, VISION, PROJECTOR, DECAY = 1e-3, 2e-4, 5e-3, 0.1
UNFROZEN = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}


def needs(package: str, *values) -> pytest.param:
    """Values of a test with a package of the extra thorough, which `make thorough` installs."""
    return pytest.param(*values, marks=pytest.mark.thorough if package in EXTRA else [])


EXTRA = ("bitsandbytes", "galore_torch", "apollo_torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    save_tiny_model(folder / "float32", hidden_size=32, layers=2, heads=2)
    save_tiny_model(folder / "model", hidden_size=32, layers=2, heads=2)
    # In bfloat16, as the published weights are; LLaMA-Factory makes float32 of those that train, unless `pure_bf16`.
    AutoModelForImageTextToText.from_pretrained(folder / "float32", dtype=torch.bfloat16).save_pretrained(
        folder / "model"
    )
    return folder


@pytest.fixture
def load(folder, monkeypatch):
    """A model and the arguments for it, from the keys of a recipe, as LLaMA-Factory makes them."""
    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)  # `pure_bf16` wants a GPU

    def load(**keys) -> SimpleNamespace:
        recipe = {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "run"), "stage": "sft"}
        recipe |= {"do_train": True, "template": "qwen3_vl_video", "dataset": "any", "finetuning_type": "full"}
        recipe |= {"use_cpu": True, "optim": "adamw_torch", "report_to": "none", "weight_decay": DECAY}
        recipe |= {"learning_rate": RATE, "lora_rank": 4, **UNFROZEN, **keys}
        model_args, _, training_args, finetuning_args, _ = get_train_args(recipe)
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        model = load_model(tokenizer, model_args, finetuning_args, is_trainable=True)
        return SimpleNamespace(model=model, training=training_args, finetuning=finetuning_args)

    return load


def make(loaded: SimpleNamespace) -> torch.optim.Optimizer:
    return trainer_utils.create_custom_optimizer(loaded.model, loaded.training, loaded.finetuning)


@pytest.fixture
def eager():
    """torchao compiles its step, which takes a minute, and a C++ compiler where there is no GPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def rate_by_hand(name: str, vision: float | None, projector: float | None) -> float:
    if "visual.merger." in name or "visual.deepstack_merger_list." in name:
        return RATE if projector is None else projector
    if "visual." in name:
        return RATE if vision is None else vision
    return RATE


def decay_by_hand(weight: torch.Tensor) -> float:
    return 0.0 if weight.ndim == 1 else DECAY  # biases and norms, and DoRA's magnitudes


def gradient(name: str, weight: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(crc32(name.encode()) + step)
    return torch.randn(weight.shape, generator=generator).to(weight.dtype)


def train_beside(model, optimizer, one_optimizer, steps: int = 3, **tolerance) -> None:
    """Train with `optimizer`, and copies of the weights with one optimizer each; the weights must agree."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    copies = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in trained.items()}
    singles = {name: one_optimizer(name, weight) for name, weight in copies.items()}
    for each in (optimizer, *singles.values()):
        if hasattr(each, "train"):  # schedule-free
            each.train()
    for step in range(steps):
        for name, weight in trained.items():
            weight.grad, copies[name].grad = gradient(name, weight, step), gradient(name, weight, step)
        for single in singles.values():
            single.step()
        optimizer.step()
    for name, weight in trained.items():
        assert not torch.equal(weight, before[name]), name
        torch.testing.assert_close(weight, copies[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- What trains, and at which rate ----------------------------------------------------------------------------------

METHODS = {
    "full": {},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora": {"finetuning_type": "lora"},
    "dora": {"finetuning_type": "lora", "use_dora": True},
    "lora_plus": {"finetuning_type": "lora", "loraplus_lr_ratio": 16},
}


@pytest.mark.parametrize("given", [{"vision_tower_lr": VISION}, {"mm_projector_lr": PROJECTOR}, {}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_each_rate_works_without_the_other(load, method, given):
    loaded = load(**METHODS[method], **given)

    def one_optimizer(name, weight):
        rate = rate_by_hand(name, given.get("vision_tower_lr"), given.get("mm_projector_lr"))
        if method == "lora_plus" and "lora_B" in name:
            rate *= 16
        return torch.optim.AdamW([weight], lr=rate, weight_decay=decay_by_hand(weight))

    optimizer = make(loaded)
    assert {group["module"] for group in optimizer.param_groups} == {"language_model", "vision_tower", "mm_projector"}
    assert optimizer.param_groups[0]["name"] == "language_model"  # transformers logs its rate as learning_rate
    assert optimizer.param_groups[0]["lr"] == RATE
    train_beside(loaded.model, optimizer, one_optimizer)


def test_rates_are_exactly_those_of_the_recipe(load):
    optimizer = make(load(learning_rate=2e-5, vision_tower_lr=3e-6, mm_projector_lr=4e-5))
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        ("language_model", 2e-5, DECAY),
        ("language_model_no_decay", 2e-5, 0.0),
        ("vision_tower", 3e-6, DECAY),
        ("vision_tower_no_decay", 3e-6, 0.0),
        ("mm_projector", 4e-5, DECAY),
        ("mm_projector_no_decay", 4e-5, 0.0),
    ]


def test_lora_can_train_the_projector_beside_a_frozen_vision_tower(load):
    frozen = {"freeze_vision_tower": True, "lora_target": "q_proj,linear_fc1,linear_fc2"}
    groups = make(load(**METHODS["lora"], **frozen, mm_projector_lr=PROJECTOR)).param_groups
    assert {(group["module"], group["lr"]) for group in groups} == {
        ("language_model", RATE),
        ("mm_projector", PROJECTOR),
    }


def test_names_of_groups_differ(load):
    groups = make(load(**METHODS["lora_plus"], use_dora=True)).param_groups
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    assert {"language_model", "language_model_2", "vision_tower_no_decay"} <= set(names)


def test_without_our_template_or_a_rate_by_module_all_is_left_to_llamafactory():
    """A vision tower in 16 bits at a rate that cannot move it, too."""
    model, asked = torch.nn.ModuleDict({"visual": torch.nn.Linear(2, 2, dtype=torch.bfloat16)}), []
    keys = SimpleNamespace(vision_tower_lr=None, mm_projector_lr=None, video_template=False)
    utils = SimpleNamespace(create_custom_optimizer=lambda *args: asked.append(args), logger=None)
    extend_optimizer(utils)
    assert utils.create_custom_optimizer(model, None, keys) is None
    assert asked == [(model, None, keys)]


def test_a_resumed_optimizer_goes_on_as_an_unbroken_one(load):
    whole, first, second = (load(vision_tower_lr=VISION) for _ in range(3))

    def steps(loaded, optimizer, numbers):
        for step in numbers:
            for name, weight in loaded.model.named_parameters():
                weight.grad = gradient(name, weight, step)
            optimizer.step()

    steps(whole, make(whole), range(4))
    stopped = make(first)
    steps(first, stopped, range(2))
    resumed = make(second)
    second.model.load_state_dict(first.model.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    steps(second, resumed, range(2, 4))
    for (name, weight), other in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


# --- Optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    *((optim, "") for optim in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")),
    *(needs("schedulefree", f"schedule_free_{kind}", "") for kind in ("radam", "adamw", "sgd")),
    needs("optimi", "stable_adamw", ""),
    needs("optimi", "stable_adamw", "decouple_lr=True"),
    needs("torchao", "adamw_torch_8bit", ""),
    needs("torchao", "adamw_torch_4bit", ""),
    *(needs("bitsandbytes", optim, "") for optim in ("adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix")),
]


@pytest.fixture
def optimi_without_triton(monkeypatch):
    """optimi asks Triton for a GPU wherever Triton is installed."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr(importlib.import_module("optimi.stableadamw"), "_default_to_triton", lambda params: False)


@pytest.fixture
def bitsandbytes_anew(monkeypatch):
    """bitsandbytes keeps what it makes an exception of by a tensor's place in any optimizer."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr(importlib.import_module("bitsandbytes").optim.GlobalOptimManager, "_instance", None)


@pytest.mark.usefixtures("eager", "optimi_without_triton", "bitsandbytes_anew")
@pytest.mark.filterwarnings("ignore:You are using weight_decay")  # optimi's, of decouple_lr
@pytest.mark.parametrize(("optim", "optim_args"), OPTIMIZERS)
def test_optimizers_train_each_module_at_its_rate(load, optim, optim_args):
    rates = {"vision_tower_lr": VISION, "mm_projector_lr": PROJECTOR}
    loaded = load(optim=optim, optim_args=optim_args or None, **rates)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(loaded.training)

    def one_optimizer(name, weight):
        own = {"lr": rate_by_hand(name, VISION, PROJECTOR)}
        if "optim_bits" in options and name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            own["optim_bits"] = 32  # transformers' exception, for stable training
        return optimizer_class([{"params": [weight], "weight_decay": decay_by_hand(weight)}], **{**options, **own})

    train_beside(loaded.model, make(loaded), one_optimizer, steps=8)  # RAdam begins to move at the sixth


LOW_RANK = {"update_proj_gap": 200, "scale": 2.0, "proj_type": "std"}
APOLLO = {"rank": 16, "proj": "random", "scale_type": "channel", "scale_front": False, **LOW_RANK, "scale": 32.0}


@pytest.mark.parametrize(
    ("path", "key", "projection"),
    [
        needs("galore_torch", "galore_torch.GaLoreAdamW", "use_galore", {"rank": 16, **LOW_RANK}),
        needs("apollo_torch", "apollo_torch.APOLLOAdamW", "use_apollo", APOLLO),
    ],
)
def test_low_rank_optimizers_keep_their_projection(load, path, key, projection):
    package, _, name = path.partition(".")
    optimizer_class = getattr(importlib.import_module(package), name)
    loaded = load(**{key: True}, vision_tower_lr=VISION, mm_projector_lr=PROJECTOR)
    linear = {f"{name}.weight" for name, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)}
    optimizer, weights = make(loaded), dict(loaded.model.named_parameters())

    def one_optimizer(name, weight):
        group = {"params": [weight], "weight_decay": decay_by_hand(weight), **(projection if name in linear else {})}
        single = optimizer_class([group], lr=rate_by_hand(name, VISION, PROJECTOR), betas=(0.9, 0.999), eps=1e-8)
        # APOLLO draws a tensor's projection from a seed that it gives by the tensor's place when it is made.
        single.state[weight].update(optimizer.state.get(weights[name], {}))
        return single

    train_beside(loaded.model, optimizer, one_optimizer)


def test_muon_trains_each_module_at_its_rate(load):
    from llamafactory.third_party.muon import Muon

    loaded = load(use_muon=True, vision_tower_lr=VISION, mm_projector_lr=PROJECTOR)

    def one_optimizer(name, weight):
        muon = weight.ndim == 2 and "embed" not in name
        return Muon(
            lr=rate_by_hand(name, VISION, PROJECTOR),
            wd=decay_by_hand(weight),
            muon_params=[weight] if muon else [],
            adamw_params=[] if muon else [weight],
            adamw_betas=(0.9, 0.999),
        )

    train_beside(loaded.model, make(loaded), one_optimizer)


def test_adam_mini_keeps_the_names_it_goes_by(load):
    Adam_mini = pytest.importorskip("adam_mini").Adam_mini

    loaded = load(vision_tower_lr=VISION, mm_projector_lr=PROJECTOR)
    loaded.model.model.visual.patch_embed.requires_grad_(False)  # of five dimensions, which Adam-mini cannot train

    def adam_mini(named, rate=RATE, decay=DECAY):
        return Adam_mini(named, lr=rate, weight_decay=decay, dim=32, n_heads=2, n_kv_heads=1, verbose=False)

    optimizer = make_optimizer(
        lambda model, *_: adam_mini(model.named_parameters()), loaded.model, loaded.training, loaded.finetuning, print
    )

    def one_optimizer(name, weight):
        return adam_mini([(name, weight)], rate_by_hand(name, VISION, PROJECTOR), decay_by_hand(weight))

    train_beside(loaded.model, optimizer, one_optimizer)


# --- What cannot work ------------------------------------------------------------------------------------------------


def unsplittable(model: torch.nn.Module) -> dict:
    """Optimizers by what their error says."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    one_each = {weight: torch.optim.AdamW([weight]) for weight in weights}
    made = {
        "layer-wise GaLore and APOLLO": [DummyOptimizer(RATE, one_each), LayerWiseDummyOptimizer(one_each, lr=RATE)],
        "Adafactor with relative_step": [Adafactor(weights)],
        "not the model's": [torch.optim.AdamW([torch.zeros(1)])],
    }
    if importlib.util.find_spec("lomo_optim"):
        from lomo_optim import AdaLomo, Lomo

        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            made["all parameters at one rate"] = [Lomo(model, lr=RATE), AdaLomo(model, lr=RATE)]
    if importlib.util.find_spec("badam"):
        from badam import BlockOptimizerRatio

        groups = [{"params": weights, "weight_decay": 0.0}]
        whole = {"include_embedding": True, "include_lm_head": True}
        ratio = BlockOptimizerRatio(groups, list(model.named_parameters()), update_ratio=0.1, lr=RATE, **whole)
        made["changes the block"] = [ratio]
    if importlib.util.find_spec("grokadamw"):
        from grokadamw import GrokAdamW

        made["place within its group"] = [GrokAdamW(weights, lr=RATE)]
    return made


def test_optimizers_without_rates_by_module_are_refused_or_left_alone(load):
    asking, plain = load(vision_tower_lr=VISION, mm_projector_lr=PROJECTOR), load()
    for said, optimizers in unsplittable(asking.model).items():
        for optimizer in optimizers:
            with pytest.raises(
                ValueError, match=f"vision_tower_lr and mm_projector_lr cannot work.*{said}.*adamw_torch"
            ):
                make_optimizer(lambda *_, o=optimizer: o, asking.model, asking.training, asking.finetuning, print)
    for optimizers in unsplittable(plain.model).values():
        for optimizer in optimizers:
            groups = [(id(group), list(group)) for group in optimizer.param_groups]
            made = make_optimizer(lambda *_, o=optimizer: o, plain.model, plain.training, plain.finetuning, print)
            assert made is optimizer
            assert [(id(group), list(group)) for group in optimizer.param_groups] == groups


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"vision_tower_lr": VISION, "freeze_vision_tower": True}, "vision_tower_lr.*freeze_vision_tower: false"),
        (
            {"mm_projector_lr": PROJECTOR, "freeze_multi_modal_projector": True},
            "mm_projector_lr.*freeze_multi_modal_projector: false",
        ),
        (
            {"vision_tower_lr": VISION, "finetuning_type": "lora", "lora_target": "q_proj"},
            r"vision_tower_lr.*lora_target \(q_proj\)",
        ),
        (
            {"mm_projector_lr": PROJECTOR, "finetuning_type": "lora", "freeze_multi_modal_projector": True},
            "mm_projector_lr.*freeze_multi_modal_projector: false",
        ),
        (
            {"mm_projector_lr": PROJECTOR, "finetuning_type": "lora", "freeze_vision_tower": True},
            r"mm_projector_lr.*lora_target \(all\).*linear_fc1,linear_fc2",
        ),
        (
            {"vision_tower_lr": VISION, "finetuning_type": "freeze", "freeze_vision_tower": True},
            "vision_tower_lr.*freeze_vision_tower: false",
        ),
        (
            {"vision_tower_lr": VISION, "finetuning_type": "freeze", "freeze_trainable_modules": "input_layernorm"},
            "vision_tower_lr.*finetuning_type: freeze",
        ),
        ({"vision_tower_lr": VISION, "learning_rate": 0}, "learning_rate is 0.*freeze_language_model"),
        ({"mm_projector_lr": -1e-5}, "mm_projector_lr must be a number of at least 0; found -1e-05"),
    ],
)
def test_a_rate_that_cannot_be_applied_is_an_error(load, keys, said):
    with pytest.raises(ValueError, match=said):
        make(load(**keys))


def test_learning_rate_zero_is_allowed_without_other_rates(load):
    assert {group["lr"] for group in make(load(learning_rate=0)).param_groups} == {0.0}


def test_tensors_that_fsdp_has_joined_are_refused(load):
    loaded, model = load(vision_tower_lr=VISION), Tiny()
    model.language_model.register_parameter("_flat_param", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(ValueError, match="vision_tower_lr cannot work.*fsdp_use_orig_params: true"):
        make_optimizer(lambda *_: None, model, loaded.training, loaded.finetuning, print)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_deepspeed_must_leave_optimizer_and_scheduler_to_the_recipe(tmp_path, section, as_file):
    def config(value):
        if as_file:
            (tmp_path / "deepspeed.json").write_text(json.dumps(value))
        return str(tmp_path / "deepspeed.json") if as_file else value

    asking = SimpleNamespace(vision_tower_lr=None, mm_projector_lr=PROJECTOR)
    plain = SimpleNamespace(vision_tower_lr=None, mm_projector_lr=None)
    stage = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match=f"section {section}.*mm_projector_lr.*Remove"):
        check_deepspeed(config({**stage, section: {}}), asking)
    check_deepspeed(config({**stage, section: {}}), plain)
    check_deepspeed(config(stage), asking)
    check_deepspeed(None, asking)


def test_a_tensor_in_no_group_or_in_two_is_named():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([model.weight])
    with pytest.raises(ValueError, match="^bias trains and is in 0 groups"):
        check_groups(model.named_parameters(), optimizer)
    optimizer.param_groups.append({"params": [model.weight, model.bias]})
    with pytest.raises(ValueError, match="^weight trains and is in 2 groups"):
        check_groups(model.named_parameters(), optimizer)
    model.weight.requires_grad_(False)
    check_groups(model.named_parameters(), optimizer)


def test_an_optimizer_without_all_that_trains_is_refused(load):
    loaded = load(vision_tower_lr=VISION)
    lacking = torch.optim.AdamW(list(loaded.model.parameters())[1:])
    with pytest.raises(ValueError, match="trains and is in 0 groups"):
        make_optimizer(lambda *_: lacking, loaded.model, loaded.training, loaded.finetuning, print)


# --- Small rates in 16 bits ------------------------------------------------------------------------------------------

STEPS, SMALL = 200, 2e-6


def weights_of_sd(sd: float, dtype: torch.dtype, shape: tuple[int, ...] = (256, 256)) -> torch.nn.Parameter:
    return torch.nn.Parameter((sd * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype))


def moved(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """How far `STEPS` steps of one gradient move each weight, in double."""
    before = weight.detach().double()
    for _ in range(STEPS):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double() - before


def test_float32_moves_at_a_small_rate_and_bfloat16_does_not():
    weight = weights_of_sd(0.02, torch.float32)
    change = moved(weight, torch.optim.AdamW([weight], lr=SMALL, weight_decay=0.0))
    # Adam's step is the rate while the gradient stays; each is rounded by at most half of float32's spacing.
    error = STEPS * weight.abs().max().item() * 2**-24
    torch.testing.assert_close(change, torch.full_like(change, -STEPS * SMALL), atol=error, rtol=1e-4)

    weight = weights_of_sd(0.02, torch.bfloat16)
    lost = rounding_loss([{"params": [weight], "lr": SMALL, "module": "vision_tower"}])["vision_tower"]
    assert 0.9 < lost < 1
    change = moved(weight, torch.optim.AdamW([weight], lr=SMALL, weight_decay=0.0))
    assert (change == 0).double().mean() == pytest.approx(lost, abs=0.005)


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_stochastic_rounding_moves_bfloat16_at_a_small_rate(tmp_path, eager, optim):
    pytest.importorskip("torchao")
    options = "bf16_stochastic_round=True"
    args = TrainingArguments(str(tmp_path), optim=optim, learning_rate=SMALL, optim_args=options, report_to="none")
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    weight = weights_of_sd(0.02, torch.bfloat16)
    torch.manual_seed(0)
    change = moved(weight, optimizer_class([weight], **options))
    # A step d between numbers that are s apart goes the whole way s with chance d/s: on average d, with variance
    # s*d - d*d, below |w| * 2**-7 * d. The weights are rounded independently, as are the steps.
    variance = STEPS * SMALL * 2**-7 * (weight.detach().double().abs() + STEPS * SMALL).mean() / weight.numel()
    assert change.mean().item() == pytest.approx(-STEPS * SMALL, abs=4 * math.sqrt(variance))
    check_rounding(optimizer_class([weight], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sd", "rate"),
    [(0.02, 1e-7), (0.02, 2e-6), (0.02, 3e-5), (0.02, 1e-3), (1e-5, 2e-8)],  # in the last, float16 is subnormal
)
def test_rounding_loss_is_the_share_that_one_step_leaves_in_place(dtype, sd, rate):
    weight = weights_of_sd(sd, dtype)
    # Away from zero: towards it, numbers are half as far apart below a power of two.
    stays = (weight.float() + rate * weight.float().sign()).to(dtype) == weight
    loss = rounding_loss([{"params": [weight], "lr": rate, "module": "language_model"}])
    assert loss["language_model"] == pytest.approx(stays.float().mean().item(), abs=1e-3)


def test_rounding_loss_looks_at_a_sample_of_a_large_tensor(monkeypatch):
    weight = weights_of_sd(0.02, torch.bfloat16, (1024, 1024))
    groups = [{"params": [weight], "lr": 3e-5, "module": "language_model"}]
    sampled = rounding_loss(groups)["language_model"]
    monkeypatch.setattr("llamafactory_video.train.rounding.SAMPLE", weight.numel())
    whole = rounding_loss(groups)["language_model"]
    assert sampled != whole
    assert sampled == pytest.approx(whole, abs=4 * math.sqrt(whole * (1 - whole) / 90_000))


def test_weights_that_float32_or_deepspeed_keep_are_not_looked_at():
    frozen = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
    partitioned = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    partitioned.ds_id = 0
    params = [torch.nn.Parameter(torch.ones(8)), frozen, partitioned]
    assert rounding_loss([{"params": params, "lr": 1e-9, "module": "language_model"}]) == {}


BF16 = {"bf16": True, "pure_bf16": True, "learning_rate": 1e-2}


def test_a_rate_too_small_for_bfloat16_is_an_error(load):
    with pytest.raises(ValueError, match="rate 2e-06.*of the vision_tower's.*pure_bf16: false.*adamw_torch_8bit"):
        make(load(**BF16, vision_tower_lr=2e-6))
    make(load(**BF16))  # large enough
    make(load(**{**BF16, "pure_bf16": False}, vision_tower_lr=2e-6))  # weights in float32
    make(load(**BF16, optim="sgd", vision_tower_lr=2e-6))  # whose steps are not known before


@pytest.mark.parametrize(
    ("pure_bf16", "given", "found"),
    [
        (True, None, "bf16_stochastic_round=True"),
        (True, "block_size=128", "block_size=128,bf16_stochastic_round=True"),
        (False, None, None),
    ],
)
def test_torchao_rounds_bfloat16_at_random_by_itself(load, pure_bf16, given, found):
    pytest.importorskip("torchao")
    keys = {**BF16, "pure_bf16": pure_bf16, "optim": "adamw_torch_8bit", "vision_tower_lr": 2e-6}
    loaded = load(**keys, optim_args=given)
    assert make(loaded).bf16_stochastic_round == pure_bf16
    assert loaded.training.optim_args == found


def test_torchao_rounds_to_nearest_if_told_so(load):
    pytest.importorskip("torchao")
    told = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=False"}
    with pytest.raises(ValueError, match="vision_tower's weights cannot move"):
        make(load(**BF16, **told, vision_tower_lr=2e-6))


def test_kahan_summation_is_no_rounding_loss(load):
    pytest.importorskip("optimi")
    make(load(**BF16, optim="stable_adamw", vision_tower_lr=2e-6))


# --- Schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_stable_steps": 6, "num_decay_steps": 10, "min_lr_ratio": 0.1},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0, "min_lr": 1e-4},
    "greedy": {"factor": 0.5, "patience": 0, "min_lr": 1e-4, "max_lr": 2e-3},
}


def scheduled(optimizer, name: str, options: dict, steps: int = 21) -> list[list[float]]:
    """Rates of the groups at each step; metrics, where they are wanted, get better three times, then no more."""
    scheduler = get_scheduler(name, optimizer, 4, 20, scheduler_specific_kwargs=options)
    rates = []
    for step in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.ones_like(weight)
        optimizer.step()
        scheduler.step(*([1.0 / min(step + 1, 3)] if name in ("reduce_lr_on_plateau", "greedy") else []))
    return rates


class Tiny(torch.nn.Module):
    """One tensor of each module."""

    def __init__(self):
        super().__init__()
        self.language_model, self.visual = torch.nn.Linear(2, 2, bias=False), torch.nn.Module()
        self.visual.blocks, self.visual.merger = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_8bit"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_gives_each_module_its_share(tmp_path, eager, name, optim):
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao")
        if name == "greedy":
            pytest.skip("transformers' GreedyLR sets numbers where torchao wants tensors, with or without us")
    slow = 1e-9 if name in ("reduce_lr_on_plateau", "greedy") else VISION  # below those schedulers' least change
    keys = SimpleNamespace(vision_tower_lr=slow, mm_projector_lr=PROJECTOR, finetuning_type="full")
    args = TrainingArguments(
        optim=optim,
        learning_rate=RATE,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=dict(SCHEDULERS[name]),
        eval_strategy="steps",
        eval_steps=1,
        output_dir=str(tmp_path),
        report_to="none",
    )
    optimizer = make_optimizer(lambda *_: None, Tiny(), args, keys, print)
    found = scheduled(optimizer, name, args.lr_scheduler_kwargs)

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    single = optimizer_class([torch.nn.Parameter(torch.ones(2, 2))], **options)
    expected = scheduled(single, name, SCHEDULERS[name])
    assert len({rate for (rate,) in expected}) > 1 or name == "constant"
    for step, (rates, (rate,)) in enumerate(zip(found, expected, strict=True)):
        by_hand = [rate, rate * slow / RATE, rate * PROJECTOR / RATE]
        assert rates == pytest.approx(by_hand, rel=1e-6, abs=0), step
    if name in ("cosine_with_min_lr", "reduce_lr_on_plateau", "greedy"):
        assert found[-1] == pytest.approx([1e-4, slow / 10, PROJECTOR / 10], rel=1e-6, abs=0)


def test_schedulers_keep_their_bounds_without_rates_by_module(load):
    options = {"min_lr": 1e-4}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 0.5}
    loaded = load(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=options, **evaluation)
    make(loaded)
    assert loaded.training.lr_scheduler_kwargs == options


# --- The table -------------------------------------------------------------------------------------------------------


def test_the_table_has_every_trainable_parameter():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    split_groups(optimizer, model.named_parameters(), ["language_model.weight"], {"vision_tower": 2e-6}, 1e-3)
    model.visual.blocks.weight.ds_numel = 1_000_000  # DeepSpeed ZeRO-3
    rows = group_rows(optimizer)
    assert rows == [
        GroupRow("language_model", 4, 1, 1e-3, 0.1, "float32"),
        GroupRow("vision_tower", 1_000_000, 1, 2e-6, 0.0, "float32"),
        GroupRow("mm_projector", 4, 1, 1e-3, 0.0, "float32"),
    ]
    assert group_table(rows).splitlines() == [
        "  module          parameters  tensors  learning rate  weight decay  dtypes",
        "  language_model           4        1          0.001           0.1  float32",
        "  vision_tower     1,000,000        1          2e-06             0  float32",
        "  mm_projector             4        1          0.001             0  float32",
    ]


def test_the_log_says_what_trains(load):
    loaded, lines = load(**METHODS["lora"], vision_tower_lr=VISION), []
    optimizer = make_optimizer(lambda *_: None, loaded.model, loaded.training, loaded.finetuning, lines.append)
    (line,) = lines
    title, _, *rows = line.splitlines()
    assert title == "Optimizer groups (AdamW):"
    cells = [row.split() for row in rows]
    trained = {"language_model": 0, "vision_tower": 0, "mm_projector": 0}
    frozen = dict(trained)
    for name, weight in loaded.model.named_parameters():
        module = "mm_projector" if "merger" in name else "vision_tower" if "visual" in name else "language_model"
        (trained if weight.requires_grad else frozen)[module] += weight.numel()
    rates = {"language_model": "0.001", "vision_tower": "0.0002", "mm_projector": "0.001"}
    assert [(name, number, rate) for name, number, _, rate, *_ in cells[:3]] == [
        (module, f"{trained[module]:,}", rates[module]) for module in trained
    ]
    assert cells[3:] == [[module, f"{frozen[module]:,}", "frozen"] for module in frozen]
    weights = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    assert sum(row.parameters for row in group_rows(optimizer)) == sum(weight.numel() for weight in weights)
    assert sum(row.tensors for row in group_rows(optimizer)) == len(weights)
