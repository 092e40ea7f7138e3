"""The head and the cross entropy in one, against F.cross_entropy of F.linear."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_accurate, scaled_atol
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mor_ext.nn import loss
from mor_ext.nn.loss import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = ["random", "far apart"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk, so that small inputs have several and the last is not full."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", 7)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)


def inputs(n: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    """hidden ``[n, 24]``, weight ``[37, 24]``, targets ``[n]``, a third of them ignored."""
    targets = torch.randint(37, (n,)).masked_fill(torch.rand(n) < 1 / 3, -100)
    return [(scale * torch.randn(n, 24)).to(dtype), torch.randn(37, 24).to(dtype), targets]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets)


def results(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and 3 times its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    value = function(*leaves, targets)
    (3 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=LOGITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_cross_entropy(
    dtype: torch.dtype, scale: float, small_chunks: None, seed: int
) -> None:
    args = inputs(40, dtype, scale)
    exact = results(plain, args[0].double(), args[1].double(), args[2])
    actual, eager = results(linear_cross_entropy, *args), results(plain, *args)
    for name, a, e, x in zip(("loss", "hidden", "weight"), actual, eager, exact, strict=True):
        assert_accurate(a, e, x, scaled_atol(x, dtype), name)


def test_the_weights_gradient_is_summed_in_fp32(small_chunks: None, seed: int) -> None:
    """In bf16 a sum of some thousand equal parts stops growing after the first hundreds."""
    hidden = torch.ones(7000, 24, dtype=torch.bfloat16)
    weight, targets = torch.zeros(37, 24, dtype=torch.bfloat16), torch.zeros(7000).long()
    _, _, grad = results(linear_cross_entropy, hidden, weight, targets)
    torch.testing.assert_close(
        grad[0].float(), torch.full((24,), 3 * (1 / 37 - 1)), rtol=0.01, atol=0
    )


def test_gradcheck(small_chunks: None, seed: int) -> None:
    hidden, weight, targets = inputs(17)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, targets), leaves)


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
def test_opcheck(wanted: tuple[bool, bool], small_chunks: None, seed: int) -> None:
    hidden, weight, targets = inputs(17, torch.float32)
    leaves = [x.requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True)]
    op = torch.ops.mor_ext.linear_cross_entropy
    torch.library.opcheck(op, (*leaves, targets, torch.float32, *wanted))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_divides_the_sum(as_tensor: bool, seed: int) -> None:
    hidden, weight, targets = inputs(40)
    items = torch.tensor(123) if as_tensor else 123
    total = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, items), total / 123)


@pytest.mark.parametrize("n", [0, 20])
def test_nothing_to_score_gives_zero(n: int, seed: int) -> None:
    hidden, weight, _ = inputs(n, torch.float32)
    value, *grads = results(linear_cross_entropy, hidden, weight, torch.full((n,), -100))
    assert value == 0
    assert not any(grad.any() for grad in grads)


def test_ignored_rows_give_nothing_whatever_they_hold(seed: int) -> None:
    hidden, weight, targets = inputs(40)
    noisy = hidden.masked_fill((targets == -100)[:, None], 1e4)
    value, grad_hidden, grad_weight = results(linear_cross_entropy, noisy, weight, targets)
    expected = results(plain, hidden, weight, targets)
    assert not grad_hidden[targets == -100].any()
    torch.testing.assert_close([value, grad_hidden, grad_weight], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype(
    dtype: torch.dtype, small_chunks: None, seed: int
) -> None:
    """And gives gradients in the dtypes of the inputs, the weight's not rounded to that dtype."""
    hidden, weight, targets = inputs(40, torch.float32)
    with torch.autocast("cpu", dtype):
        actual = results(linear_cross_entropy, hidden, weight, targets)
        eager = results(plain, hidden, weight, targets)
    exact = results(plain, hidden.double(), weight.double(), targets)
    for name, a, e, x in zip(("loss", "hidden", "weight"), actual, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_accurate(a, e, x, scaled_atol(x, dtype), name)
    assert not torch.equal(actual[0], results(linear_cross_entropy, hidden, weight, targets)[0])
    assert not torch.equal(actual[2], actual[2].to(dtype).float())


class Outputs(TorchDispatchMode):
    """Name and number of elements of every tensor that an op gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.append((func.overloadpacket.__name__, out.numel()))
        return out


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1)])
def test_only_wanted_gradients_are_computed(wanted: tuple[int, ...], seed: int) -> None:
    """And FlopCounterMode, which does not look inside the op, knows its products."""
    hidden, weight, targets = inputs(40, torch.float32)
    with Outputs() as outputs:
        flags = [i in wanted for i in (0, 1)]
        loss.sum_and_gradients(hidden, weight, targets, torch.float32, *flags)
    products = sum(name.startswith(("mm", "addmm")) for name, _ in outputs.seen)
    assert products == 1 + len(wanted)

    for i in wanted:
        (hidden, weight)[i].requires_grad_()
    assert counted_flops(hidden, weight, targets) == 2 * 40 * 24 * 37 * products
    with torch.no_grad():
        assert counted_flops(hidden, weight, targets) == 2 * 40 * 24 * 37


def counted_flops(*args: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*args)
    return counter.get_total_flops()


def test_never_holds_all_logits(seed: int) -> None:
    n, vocab, d = 4096, 5000, 8
    hidden, weight = torch.randn(n, d), torch.randn(vocab, d)
    with Outputs() as outputs:
        loss.sum_and_gradients(
            hidden, weight, torch.randint(vocab, (n,)), torch.float32, True, True
        )
    chunk = max(loss.CHUNK_ROWS, loss.CHUNK_BYTES // (4 * vocab)) * vocab
    largest = max(elements for _, elements in outputs.seen)
    assert largest == max(chunk, n * d, vocab * d) < n * vocab / 8


def test_compile(seed: int) -> None:
    """One graph for all lengths, after the first that shows that they vary."""
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=frames)
    for n in (8, 300, 21, 700, 1000):
        args = inputs(n)
        expected = results(linear_cross_entropy, *args)
        torch.testing.assert_close(results(compiled, *args), expected)
    assert frames.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[n, d\], got shape \[3\]"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[vocab, 4\], got shape \[5, 3\]"),
        ({"weight": torch.zeros(5, 4).half()}, "weight must be of hidden's dtype torch.float32"),
        ({"targets": torch.zeros(2).long()}, r"targets must be int64 \[3\], got torch.int64 of"),
        ({"targets": torch.zeros(3).int()}, r"targets must be int64 \[3\], got torch.int32 of"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    args = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(args | {"targets": torch.zeros(3).long()} | change))


@pytest.mark.parametrize("target", [37, -1])
def test_a_target_out_of_range_is_an_error(target: int, seed: int) -> None:
    hidden, weight, _ = inputs(3)
    with pytest.raises(RuntimeError, match=r"index|range|bounds"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, target, 1]))
