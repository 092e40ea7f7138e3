"""The Trainer: what it optimises, what it reports, and that none of it waits for the device."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import LENGTH, QUIET, logged, tiny, trainer_of, windows
from transformers import TrainerCallback

from mor_ext.evaluation.evaluate import evaluate
from mor_ext.models import MoRForCausalLM, MoROutput
from mor_ext.training.metrics import Meter

pytestmark = pytest.mark.usefixtures("one_thread")
ROUTINGS = [
    "none",
    "fixed_depth",
    "expert_choice",
    "token_choice",
    "action",
    "mixture_of_depths",
    "random",
]
# Losses of routers that are means over tokens: of several batches they are the mean of theirs.
MEANS = [
    ("expert_choice", {"router_loss_coef": 1.0, "router_z_loss_coef": 0.1}),
    ("token_choice", {"balancing": "bias", "bias_update_rate": 0.3, "router_z_loss_coef": 0.1}),
]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_learns_one_batch(routing, tmp_path):
    trainer = trainer_of(tiny(routing), tmp_path, windows(2), steps=60, batch_size=2)
    trainer.train()
    nll = logged(trainer, "nll")
    assert nll[0] > 4 and nll[-1] < 1


class Gradients(TrainerCallback):
    """Those of the last step, before the optimizer's."""

    def on_pre_optimizer_step(self, *args, model, **others):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("routing", "fields"), MEANS)
def test_accumulated_batches_are_one_batch(routing, fields, tmp_path):
    runs = []
    for batch_size in (4, 1):
        settings = {"batch_size": batch_size, "gradient_accumulation": 4 // batch_size}
        model = tiny(routing, **fields).double()
        trainer = trainer_of(model, tmp_path, windows(4), steps=2, clip=1e9, **settings)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        assert logged(trainer, "aux_loss")[0] > 1e-3
        runs.append((trainer, gradients.seen))
    (one, one_gradients), (four, four_gradients) = runs
    for name in ("loss", "nll", "aux_loss", "effective_depth", "bits_per_byte", "load_2"):
        assert logged(one, name) == pytest.approx(logged(four, name), rel=1e-5), name
    for name in one_gradients:
        torch.testing.assert_close(one_gradients[name], four_gradients[name], msg=name)


def test_balance_loss_of_a_step_is_the_mean_of_its_batches(tmp_path):
    model, data = tiny("token_choice", router_loss_coef=0.5), windows(4)
    items = [data[i]["input_ids"][None] for i in range(4)]
    model.train()
    expected = sum(model(item, labels=item).aux_loss.item() for item in items) / 4
    trainer = trainer_of(model, tmp_path, data, steps=1, batch_size=1, gradient_accumulation=4)
    trainer.train()
    assert logged(trainer, "aux_loss") == [pytest.approx(expected, rel=1e-5)]
    assert logged(trainer, "loss") == [
        pytest.approx(logged(trainer, "nll")[0] + expected, rel=1e-5)
    ]


def test_routers_are_updated_once_an_optimizer_step(tmp_path, monkeypatch):
    model = tiny("token_choice", balancing="bias", bias_update_rate=0.25)
    router = model.stages[1].router
    loads = []
    update = model.update_routers
    monkeypatch.setattr(
        model, "update_routers", lambda: (loads.append(router.load.sum().item()), update())
    )
    trainer_of(model, tmp_path, windows(24), batch_size=2, gradient_accumulation=4).train()
    assert loads == [8 * LENGTH] * 3  # what the four batches of a step brought
    assert router.load.eq(0).all() and router.bias.abs().max() in (0.25, 0.5, 0.75)


def test_norms_and_biases_are_not_decayed(tmp_path):
    trainer = trainer_of(tiny("action"), tmp_path, windows(2), weight_decay=0.3)
    trainer.create_optimizer()
    decay = {
        id(p): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        expected = 0.3 if parameter.dim() > 1 else 0.0
        assert decay[id(parameter)] == expected, name
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            "cosine",
            [0.0, 0.5, 1.0, *(0.55 + 0.45 * math.cos(math.pi * i / 8) for i in range(1, 8))],
        ),
        ("wsd", [0.1, 0.55, *[1.0] * 5, 0.775, 0.55, 0.325]),
    ],
)
def test_schedules(schedule, rates, tmp_path):
    """Warm-up over 2 of 10 steps; the cosine falls to 0.1, wsd in the last 4."""
    shape = {"schedule": schedule, "warmup": 0.2, "decay": 0.4, "final": 0.1, "learning_rate": 1.0}
    trainer = trainer_of(tiny("none"), tmp_path, windows(2), steps=10, **shape)
    trainer.create_optimizer_and_scheduler(10)
    seen = []
    for _ in range(10):
        seen.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert seen == pytest.approx(rates)


def test_the_log_has_every_number(tmp_path):
    others = {"report_to": [], "save_strategy": "no"}
    trainer = trainer_of(
        tiny("expert_choice"), tmp_path, windows(8), windows(3, seed=1), others=others, eval_every=2
    )
    trainer.train()
    both = {"loss", "nll", "aux_loss", "bits_per_byte", "effective_depth", "max_vio"}
    both |= {"load_entropy", "load_1", "load_2", "load_3"}
    trained, held_out = trainer.state.log_history[0], trainer.state.log_history[2]
    assert both | {"tokens_per_second", "learning_rate", "grad_norm"} <= set(trained)
    assert {f"eval_{n}" for n in both | {"agreement", "dead_tokens"}} <= set(held_out)
    assert trained["load_1"] + trained["load_2"] + trained["load_3"] == pytest.approx(1)
    assert trained["effective_depth"] == pytest.approx(2 + 2 * (1 + 16 / 24 + 8 / 24))
    assert trained["tokens_per_second"] > 100


@pytest.mark.parametrize("routing", ["expert_choice", "action", "none"])
def test_evaluation_equals_that_of_the_evaluation_package(routing, tmp_path):
    model, held_out = tiny(routing), windows(5)
    trainer = trainer_of(model, tmp_path, windows(2), held_out, batch_size=2)
    torch.manual_seed(1)
    metrics = trainer.evaluate()
    torch.manual_seed(1)
    expected = evaluate(model, held_out, 2)
    assert metrics["eval_nll"] == pytest.approx(expected.causal.nll, rel=1e-5)
    assert metrics["eval_bits_per_byte"] == pytest.approx(expected.causal.bits_per_byte, rel=1e-5)
    assert metrics["eval_effective_depth"] == pytest.approx(expected.causal.layers)
    if routing == "expert_choice":  # the action router draws its training depths
        assert metrics["eval_agreement"] == pytest.approx(expected.agreement)


def test_a_meter_by_hand():
    """Two sequences of 4 tokens; of the stages, all of one recursion but the second, of three."""
    model = tiny("expert_choice")
    meter = Meter(model, torch.device("cpu"))
    depth = torch.tensor([[3, 1, 1, 1], [2, 3, 1, 1]])
    trained = torch.tensor([[3, 1, 1, 1], [3, 2, 1, 1]])

    def output(depth: torch.Tensor, nll: float) -> MoROutput:
        ones = torch.ones_like(depth)
        return MoROutput(
            nll=torch.tensor(nll),
            aux_loss=torch.tensor(0.25),
            layers=2 + 2 * depth,
            stage_depth=torch.stack([ones, depth, ones], dim=-1),
        )

    labels = torch.zeros(2, 4, dtype=torch.long)
    labels[1, :2] = -100  # 5 labels are scored: the first of a sequence never is
    meter.add(output(depth, 2.0), labels, torch.tensor([6, 4]), output(trained, 2.0))
    none = torch.full((2, 4), -100)  # nothing to score: its nll is NaN, and counts nothing
    meter.add(output(depth, math.nan), none, torch.tensor([0, 0]), output(trained, math.nan))
    result = meter.read(lambda tensor: tensor)
    share = torch.tensor([5, 1, 2]) / 8
    assert result == {
        "loss": 2.25,
        "nll": 2.0,
        "aux_loss": 0.25,
        "effective_depth": 2 + 2 * 13 / 8,
        "bits_per_byte": pytest.approx(2 * 5 / math.log(2) / 10),
        "agreement": 6 / 8,
        "dead_tokens": 3 / 4,  # only the first position ever went to depth 3
        "max_vio": pytest.approx(5 / 8 * 3 - 1),
        "load_entropy": pytest.approx(-(share * share.log()).sum().item()),
        **{f"load_{i + 1}": pytest.approx(share[i].item()) for i in range(3)},
    }
    assert math.isnan(meter.read(lambda tensor: tensor)["nll"])  # it began anew


class Waits(TorchDispatchMode):
    """Counts the ops that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **kwargs or {})


def test_a_batch_waits_for_no_number(tmp_path):
    trainer = trainer_of(tiny("expert_choice"), tmp_path, windows(2), batch_size=2)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with Waits() as waits:
        trainer.training_step(trainer.model, batch, torch.tensor(2 * LENGTH - 2))
    assert waits.count == 0
    with Waits() as waits:
        trainer.trained.read(lambda tensor: tensor).popitem()
        torch.ones(1).item()
    assert waits.count > 0  # the test can fail


def test_options_of_speed_and_memory(tmp_path):
    """Gradient checkpointing and compilation change nothing, bf16 little."""
    losses = {}
    for option in ("none", "gradient_checkpointing", "compile", "bf16"):
        others = {"torch_compile_backend": "eager"} if option == "compile" else {}
        options = {} if option == "none" else {option: True}
        model = tiny("expert_choice")
        trainer = trainer_of(
            model, tmp_path, windows(8), batch_size=4, others=QUIET | others, **options
        )
        trainer.train()
        losses[option] = logged(trainer, "loss")
    plain = losses.pop("none")
    assert losses["gradient_checkpointing"] == plain
    assert losses["compile"] == pytest.approx(plain, rel=1e-5)
    assert losses["bf16"] == pytest.approx(plain, rel=0.02) and losses["bf16"] != plain


def test_a_trained_config_loads_again(tmp_path):
    trainer = trainer_of(tiny("token_choice", balancing="bias"), tmp_path, windows(2))
    trainer.train()
    trainer.save_model()
    loaded = MoRForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("routing", ["expert_choice", "action"])
def test_share_of_the_routers(routing, tmp_path):
    trainer = trainer_of(tiny(routing), tmp_path, windows(2))
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < trainer.router_share(batch) < 0.9
    assert all(p.grad is None for p in trainer.model.parameters())
