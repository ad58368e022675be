"""Divergences against their textbook definitions.

The judge is ``Exact``: the definition in decimal arithmetic of 60 digits, its gradient by central differences of the
value with steps of 1e-20. It shares neither code nor a formula with the package. Properties that need no reference
follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.divergences import KINDS, Divergence
from understudy.errors import ZeroProbabilityError
from understudy.losses import Tail, distribution_divergence, topk_divergence
from understudy.types import LossOutput

INF = float("inf")
TAILS: tuple[Tail, ...] = Tail.__args__
BETAS = (0.0, 1e-8, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-8, 1.0)
SKEWS = (0.0, 1e-8, 0.1, 0.5, 0.99)

# Every kind, with options at their ends, near their ends and in the middle.
CASES = [
    Divergence("reverse_kl"),
    Divergence("forward_kl"),
    *(Divergence("jsd", beta=beta) for beta in BETAS),
    *(Divergence("skewed_kl", skew=skew) for skew in SKEWS),
    *(Divergence("skewed_reverse_kl", skew=skew) for skew in SKEWS),
    *(Divergence("entropy_gated", entropy_threshold=threshold) for threshold in (-1.0, 0.8, 99.0)),
]
# One of each, for what does not depend on the options.
PLAIN = [Divergence(kind, entropy_threshold=0.8) for kind in KINDS]


def name_of(case: object) -> str | None:
    if not isinstance(case, Divergence):
        return None
    option = {"jsd": case.beta, "entropy_gated": case.entropy_threshold}.get(case.kind, case.skew)
    return case.kind if case.kind in ("reverse_kl", "forward_kl") else f"{case.kind} {option}"


each_case = pytest.mark.parametrize("case", CASES, ids=name_of)
each_kind = pytest.mark.parametrize("case", PLAIN, ids=name_of)
each_tail = pytest.mark.parametrize("tail", TAILS)
properties = settings(deadline=None, max_examples=60, derandomize=True)


def all_of(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def measure(case: Divergence, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = all_of(student) if mask is None else mask
    return distribution_divergence(student, teacher, mask, **asdict(case), **options)


def value_and_gradient(loss: Callable[[Tensor], LossOutput], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf).loss
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def random_logits(rows: int, width: int, *, seed: int, scale: float = 2.0, dtype: Any = torch.float64) -> Tensor:
    return scale * torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# The judge


@dataclass(frozen=True)
class Exact:
    """A function of the student's probabilities, evaluated and differentiated in 60 digits."""

    of: Callable[[list[Decimal]], Decimal]

    def __call__(self, student_logits: Sequence[float]) -> tuple[float, list[float]]:
        """One position's value, and its derivative by every logit."""
        step = Decimal("1e-20")
        with localcontext(prec=60):
            logits = [Decimal(x) for x in student_logits]
            slopes = []
            for i in range(len(logits)):
                up, down = ([x + sign * step * (i == j) for j, x in enumerate(logits)] for sign in (1, -1))
                slopes.append((self.of(softmax(up)) - self.of(softmax(down))) / (2 * step))
            return float(self.of(softmax(logits))), [float(slope) for slope in slopes]


def softmax(logits: Sequence[Decimal]) -> list[Decimal]:
    weights = [(x - max(logits)).exp() for x in logits]
    return [w / sum(weights) for w in weights]


def exact_kl(first: Sequence[Decimal], second: Sequence[Decimal]) -> Decimal:
    return sum((a * (a / b).ln() for a, b in zip(first, second, strict=True) if a > 0), Decimal(0))


def mixed(share: Decimal, first: Sequence[Decimal], second: Sequence[Decimal]) -> list[Decimal]:
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def exact(case: Divergence, teacher_logits: Sequence[float]) -> Exact:
    """The definition, word for word."""
    with localcontext(prec=60):
        q = softmax([Decimal(x) for x in teacher_logits])
        beta, skew = Decimal(case.beta), Decimal(case.skew)
        entropy = -sum(x * x.ln() for x in q if x > 0)
    gate = entropy > Decimal(case.entropy_threshold)

    def jsd(p: list[Decimal]) -> Decimal:
        if beta in (0, 1):
            return exact_kl(p, q) if beta else exact_kl(q, p)
        m = mixed(beta, q, p)
        return (beta * exact_kl(q, m) + (1 - beta) * exact_kl(p, m)) / (beta * (1 - beta))

    return Exact(
        {
            "reverse_kl": lambda p: exact_kl(p, q),
            "forward_kl": lambda p: exact_kl(q, p),
            "jsd": jsd,
            "skewed_kl": lambda p: exact_kl(q, mixed(skew, q, p)),
            "skewed_reverse_kl": lambda p: exact_kl(p, mixed(skew, p, q)),
            "entropy_gated": lambda p: exact_kl(p, q) + (exact_kl(q, p) if gate else 0),
        }[case.kind]
    )


def exact_topk(tail: Tail, chosen: Sequence[int], student_logits: Sequence[float], teacher: Sequence[float]) -> Exact:
    with localcontext(prec=60):
        q = softmax([Decimal(x) for x in teacher])
        p0 = softmax([Decimal(x) for x in student_logits])
        gaps = {i: (p0[i] / q[i]).ln() for i in chosen}

    def of(p: list[Decimal]) -> Decimal:
        own, other = [p[i] for i in chosen], [q[i] for i in chosen]
        if tail == "bucket":
            return exact_kl([*own, 1 - sum(own)], [*other, 1 - sum(other)])
        if tail == "renormalize":
            return exact_kl([x / sum(own) for x in own], [x / sum(other) for x in other])
        return sum((p[i] * gaps[i] for i in chosen), Decimal(0))  # the bracket does not move

    return Exact(of)


def exact_rows(
    judge: Callable[[list[float], list[float]], tuple[float, list[float]]], student: Tensor, teacher: Tensor
) -> tuple[float, Tensor]:
    """The rows' values added up, and their gradients [N, V]."""
    answers = [judge(p, q) for p, q in zip(student.tolist(), teacher.tolist(), strict=True)]
    return sum(value for value, _ in answers), torch.tensor([slope for _, slope in answers], dtype=torch.float64)


def rounding(student: Tensor, teacher: Tensor, case: Divergence | None = None) -> float:
    """What float arithmetic may do to a sum over these rows. A log-probability is off by a few eps of its size and
    so is each product; entries weigh (p + q) times the gap at most, over the option that divides."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    log_p, log_q = (x.masked_fill(~torch.isfinite(x), 0.0) for x in (log_p, log_q))
    # Underflow ends a row's tail: what is lost is below tiny * its logarithm.
    size = 1 + log_p.abs() + log_q.abs()
    divisor = min(case.beta, 1 - case.beta) if case is not None and case.kind == "jsd" else 1.0
    eps = torch.finfo(torch.promote_types(student.dtype, torch.float32)).eps
    return 8 * eps * float(((p + q) * size * size).sum()) / (divisor or 1.0)


# Value and gradient


@each_case
def test_value_and_gradient_are_those_of_the_definition(case: Divergence) -> None:
    student, teacher = random_logits(4, 5, seed=1), random_logits(4, 5, seed=2)
    value, slopes = exact_rows(lambda p, q: exact(case, q)(p), student, teacher)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-13)


def textbook(case: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """[N, V] probabilities -> [N], with ordinary operations only."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if case.kind == "jsd":
        m = case.beta * q + (1 - case.beta) * p
        return (case.beta * kl(q, m) + (1 - case.beta) * kl(p, m)) / (case.beta * (1 - case.beta))
    entropy = -(q * q.log()).sum(-1)
    return {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "skewed_kl": kl(q, case.skew * q + (1 - case.skew) * p),
        "skewed_reverse_kl": kl(p, case.skew * p + (1 - case.skew) * q),
        "entropy_gated": kl(p, q) + (entropy > case.entropy_threshold) * kl(q, p),
    }[case.kind]


@each_kind
def test_gradient_is_what_back_propagation_makes_of_the_definition(case: Divergence) -> None:
    student, teacher = random_logits(30, 7, seed=3, scale=1.5), random_logits(30, 7, seed=4, scale=1.5)
    leaf = student.clone().requires_grad_()
    expected = textbook(case, leaf.softmax(-1), teacher.softmax(-1)).sum()
    expected.backward()
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-13)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_distributions_keep_their_precision(case: Divergence, dtype: torch.dtype) -> None:
    """Entries that one of the two gives 1e-10 or 1e-17 of what the other does: mixtures taken as 1 - share + share * x
    lose the difference to rounding, and their logarithm becomes infinite."""
    student = torch.tensor([[0, -23, -9, 1.0], [-40, 0, -1, 0.5]], dtype=dtype)
    teacher = torch.tensor([[-23, 0, -9, 0.5], [0, -40, 0, 0.25]], dtype=dtype)
    value, slopes = exact_rows(lambda p, q: exact(case, q)(p), student, teacher)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    precision = 20 * torch.finfo(dtype).eps / (1 - case.skew)  # a gradient that is 1 - skew of its parts
    assert loss.item() == pytest.approx(value, rel=precision)
    torch.testing.assert_close(gradient.double(), slopes, rtol=0, atol=precision * float(slopes.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (Divergence("jsd", beta=1e-8), Divergence("forward_kl")),
        (Divergence("jsd", beta=1e-4), Divergence("forward_kl")),
        (Divergence("jsd", beta=1 - 1e-8), Divergence("reverse_kl")),
        (Divergence("jsd", beta=1 - 1e-4), Divergence("reverse_kl")),
        (Divergence("jsd", beta=1e-300), Divergence("forward_kl")),
        (Divergence("skewed_kl", skew=1e-8), Divergence("forward_kl")),
        (Divergence("skewed_reverse_kl", skew=1e-8), Divergence("reverse_kl")),
        (Divergence("skewed_kl", skew=1e-300), Divergence("forward_kl")),
        (Divergence("skewed_reverse_kl", skew=1e-300), Divergence("reverse_kl")),
    ],
    ids=name_of,
)
def test_options_near_their_ends_go_over_into_the_kl(near: Divergence, limit: Divergence, dtype: torch.dtype) -> None:
    """They differ by O(option); by less than 20 times the option where no probability ratio is extreme."""
    student = random_logits(4, 5, seed=1, dtype=dtype)
    teacher = student + random_logits(4, 5, seed=2, scale=0.5, dtype=dtype)
    option = min(near.beta, 1 - near.beta) if near.kind == "jsd" else near.skew
    tolerance = 100 * torch.finfo(dtype).eps + 20 * option
    here, there = (value_and_gradient(lambda x, c=case: measure(c, x, teacher), student) for case in (near, limit))
    torch.testing.assert_close(here[0], there[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(here[1], there[1], rtol=0, atol=tolerance * float(there[1].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("end", "limit"),
    [
        (Divergence("jsd", beta=0.0), Divergence("forward_kl")),
        (Divergence("jsd", beta=1.0), Divergence("reverse_kl")),
        (Divergence("skewed_kl", skew=0.0), Divergence("forward_kl")),
        (Divergence("skewed_reverse_kl", skew=0.0), Divergence("reverse_kl")),
        (Divergence("entropy_gated", entropy_threshold=99.0), Divergence("reverse_kl")),
    ],
    ids=name_of,
)
def test_options_at_their_ends_are_the_kl_to_the_last_bit(
    end: Divergence, limit: Divergence, dtype: torch.dtype
) -> None:
    student, teacher = random_logits(9, 6, seed=5, dtype=dtype), random_logits(9, 6, seed=6, dtype=dtype)
    here, there = (value_and_gradient(lambda x, c=case: measure(c, x, teacher), student) for case in (end, limit))
    assert here[0].item() == there[0].item() > 1
    assert torch.equal(here[1], there[1])


def test_an_open_gate_adds_the_two_kls() -> None:
    student, teacher = random_logits(9, 6, seed=5), random_logits(9, 6, seed=6)
    kls = [
        value_and_gradient(lambda x, k=kind: measure(Divergence(k), x, teacher), student)
        for kind in ("reverse_kl", "forward_kl")
    ]
    both = Divergence("entropy_gated", entropy_threshold=-1.0)
    loss, gradient = value_and_gradient(lambda x: measure(both, x, teacher), student)
    torch.testing.assert_close(loss, kls[0][0] + kls[1][0], rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, kls[0][1] + kls[1][1], rtol=1e-12, atol=1e-14)


def test_the_gate_opens_above_the_threshold_position_by_position() -> None:
    """Teacher entropies log 2 and 0.325; the threshold itself does not open it."""
    teacher = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64).log()
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    output = measure(Divergence("entropy_gated", entropy_threshold=0.5), student, teacher)
    assert output.loss.item() == pytest.approx(sum(reverse) + forward, rel=1e-12)
    assert output.metrics["gate"] == 1
    for row in (slice(0, 1), slice(1, 2)):
        at_it = measure(Divergence(), student[row], teacher[row]).metrics["teacher_entropy"]
        for threshold, gate in ((at_it, 0), (math.nextafter(at_it, 0), 1)):
            case = Divergence("entropy_gated", entropy_threshold=threshold)
            assert measure(case, student[row], teacher[row]).metrics["gate"] == gate


def test_jensen_shannon_is_symmetric_at_one_half() -> None:
    student, teacher = random_logits(20, 6, seed=7), random_logits(20, 6, seed=8)
    for beta in (0.5, 0.1):
        there = measure(Divergence("jsd", beta=beta), student, teacher).loss.item()
        back = measure(Divergence("jsd", beta=1 - beta), teacher, student).loss.item()
        assert there == pytest.approx(back, rel=1e-13)
    uneven, student, teacher = Divergence("jsd", beta=0.1), student[:1], teacher[:1]
    assert measure(uneven, student, teacher).loss.item() != pytest.approx(
        measure(uneven, teacher, student).loss.item(), rel=1e-2
    )


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.9])
def test_jensen_shannon_is_bounded_by_what_disjoint_supports_have(beta: float) -> None:
    """H(beta) / (beta (1 - beta)), 4 log 2 at one half; nothing pulls the student there, as there is no overlap."""
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    case = Divergence("jsd", beta=beta)
    student, teacher = torch.tensor([[1.0, 0.0, -INF, -INF]]), torch.tensor([[-INF, -INF, 2.0, 0.0]])
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    assert loss.item() == pytest.approx(entropy / (beta * (1 - beta)), rel=1e-6)
    torch.testing.assert_close(gradient, torch.zeros(1, 4), rtol=0, atol=1e-6 / beta)
    if beta == 0.5:
        assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-6)
    wide = random_logits(50, 5, seed=9, scale=20), random_logits(50, 5, seed=10, scale=20)
    each = [float(measure(case, wide[0][n : n + 1], wide[1][n : n + 1]).loss) for n in range(50)]
    assert max(each) <= entropy / (beta * (1 - beta)) * (1 + 1e-12)


@pytest.mark.parametrize("beta", [1e-8, 1 - 1e-8])
def test_jensen_shannon_of_disjoint_supports_is_finite_near_its_ends_in_float32(beta: float) -> None:
    student, teacher = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    loss, gradient = value_and_gradient(lambda x: measure(Divergence("jsd", beta=beta), x, teacher), student)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert loss.item() == pytest.approx(entropy / (beta * (1 - beta)), rel=1e-6)
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["skewed_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("skew", [1e-8, 0.1, 0.9])
def test_skewed_kls_are_bounded_by_minus_log_skew_and_reach_it(kind: Any, skew: float) -> None:
    case = Divergence(kind, skew=skew)
    student, teacher = torch.tensor([[1.0, 0.0, -INF]]), torch.tensor([[-INF, -INF, 0.0]])
    assert measure(case, student, teacher).loss.item() == pytest.approx(-math.log(skew), rel=1e-6)
    wide = random_logits(50, 5, seed=9, scale=20), random_logits(50, 5, seed=10, scale=20)
    each = [float(measure(case, wide[0][n : n + 1], wide[1][n : n + 1]).loss) for n in range(50)]
    assert max(each) <= -math.log(skew) * (1 + 1e-12)
    assert max(each) > -0.9 * math.log(skew)


@pytest.mark.parametrize(
    ("case", "factor"),
    [
        (Divergence("reverse_kl"), 1.0),
        (Divergence("forward_kl"), 1.0),
        *((Divergence("jsd", beta=beta), 1.0) for beta in BETAS),
        *((Divergence("skewed_kl", skew=skew), (1 - skew) ** 2) for skew in (0.0, 0.1, 0.5)),
        *((Divergence("skewed_reverse_kl", skew=skew), (1 - skew) ** 2) for skew in (0.0, 0.1, 0.5)),
        (Divergence("entropy_gated", entropy_threshold=-1.0), 2.0),
    ],
)
def test_curvature_at_equality(case: Divergence, factor: float) -> None:
    """Half the variance of the logits' shift under p, for the KL and for every Jensen-Shannon divergence alike."""
    teacher, shift = random_logits(1, 6, seed=11), random_logits(1, 6, seed=12)
    p, step = teacher.softmax(-1), 1e-4
    half_variance = float((p * (shift - (p * shift).sum()) ** 2).sum()) / 2
    both = [float(measure(case, teacher + sign * step * shift, teacher).loss) for sign in (1, -1)]
    assert sum(both) / (2 * step**2) == pytest.approx(factor * half_variance, rel=1e-5)


# Equality is the one place to stand still


def logits_with_zeros(dtype: torch.dtype) -> Tensor:
    logits = random_logits(8, 30, seed=13, scale=5, dtype=torch.float64)
    logits[2, 3:20] = -INF
    logits[5] = -INF
    logits[5, 7] = 0.0  # certain
    logits[6, 0] = 1e4
    return logits.to(dtype)


def some(rows: Tensor) -> Tensor:
    return torch.arange(len(rows)) % 3 != 1


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", [all_of, some])
def test_equals_have_no_divergence_and_no_gradient_at_all(
    case: Divergence, dtype: torch.dtype, mask: Callable[..., Tensor]
) -> None:
    logits = logits_with_zeros(dtype)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, logits.clone(), mask(logits)), logits)
    assert loss.item() == 0.0
    assert torch.count_nonzero(gradient) == 0


@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", [all_of, some])
@pytest.mark.parametrize("chosen", [range(1), range(4, 9), range(30)], ids=["1", "5", "all"])
def test_equals_have_no_topk_divergence_and_no_gradient_at_all(
    tail: Tail, dtype: torch.dtype, mask: Callable[..., Tensor], chosen: range
) -> None:
    logprobs = logits_with_zeros(torch.float64).log_softmax(-1)[:, list(chosen)].to(dtype)
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, logprobs, mask(logprobs), tail=tail), logprobs)
    assert loss.item() == 0.0
    assert torch.count_nonzero(gradient) == 0


@each_case
def test_a_small_step_down_the_gradient_lowers_the_divergence_as_far_as_it_promises(case: Divergence) -> None:
    student, teacher = random_logits(5, 6, seed=14), random_logits(5, 6, seed=15)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    step = 1e-4
    after = measure(case, student - step * gradient, teacher).loss
    assert float(loss - after) == pytest.approx(step * float(gradient.square().sum()), rel=0.01)
    assert after < loss


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_small_step_down_the_gradient_lowers_the_topk_divergence(tail: Tail) -> None:
    student, teacher = random_logits(5, 9, seed=14), random_logits(5, 9, seed=15).log_softmax(-1)

    def topk(x: Tensor) -> LossOutput:
        return topk_divergence(x.log_softmax(-1)[:, :4], teacher[:, :4], all_of(x), tail=tail)

    loss, gradient = value_and_gradient(topk, student)
    step = 1e-4
    after = topk(student - step * gradient).loss
    assert float(loss - after) == pytest.approx(step * float(gradient.square().sum()), rel=0.01)
    assert after < loss


# Zeros


@pytest.mark.parametrize("kind", ["reverse_kl", "entropy_gated"])
def test_a_token_the_teacher_rules_out_is_named(kind: Any) -> None:
    student = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 0.25]])
    teacher = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.0]]).log()
    with pytest.raises(ZeroProbabilityError, match=r"position 1: the teacher gives token 2 .* student gives 0\.305"):
        measure(Divergence(kind), student, teacher)


@pytest.mark.parametrize(
    "case",
    [
        Divergence("forward_kl"),
        Divergence("jsd", beta=0.0),
        Divergence("skewed_kl", skew=0.0),
        Divergence("entropy_gated", entropy_threshold=0.1),
    ],
    ids=name_of,
)
def test_a_token_the_student_rules_out_is_named(case: Divergence) -> None:
    student = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]).log()
    teacher = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    with pytest.raises(ZeroProbabilityError, match=r"position 1: the student gives token 1 .* teacher gives 0\.5"):
        measure(case, student, teacher)


def test_the_forward_kl_blames_the_zero_that_makes_it_infinite() -> None:
    """Both have one; the teacher's costs nothing in this direction, and the student's nothing in the other."""
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.5, 0.0, 0.5]]).log()
    for kind, culprit in (("forward_kl", "student gives token 2"), ("reverse_kl", "teacher gives token 1")):
        with pytest.raises(ZeroProbabilityError, match=culprit):
            measure(Divergence(kind), student, teacher)


def test_a_closed_gate_does_not_look_at_the_students_zeros() -> None:
    """The forward KL is infinite there, but is not counted."""
    student, teacher = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.9, 0.1]]).log()
    case = Divergence("entropy_gated", entropy_threshold=0.5)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    assert loss.item() == pytest.approx(-math.log(0.9), rel=1e-6)
    assert gradient.tolist() == [[0.0, 0.0]]
    with pytest.raises(ZeroProbabilityError, match="student gives token 1"):
        measure(Divergence("entropy_gated", entropy_threshold=0.1), student, teacher)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Divergence("forward_kl"), math.log(2)),
        (Divergence("jsd", beta=0.5), 2 * (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2))),
        (Divergence("skewed_reverse_kl", skew=0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        (Divergence("skewed_kl", skew=0.5), math.log(4 / 3)),
    ],
    ids=name_of,
)
def test_a_one_hot_teacher_costs_a_finite_price_where_the_definition_has_one(case: Divergence, expected: float) -> None:
    """Student (1/2, 1/2), teacher (1, 0), so the even mixture is (3/4, 1/4)."""
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, -INF]], dtype=torch.float64)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert gradient[0, 0] < 0 < gradient[0, 1]  # towards the teacher's token
    assert torch.isfinite(gradient).all()


def test_masked_positions_may_be_infinite() -> None:
    student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, -INF]])
    assert measure(Divergence("reverse_kl"), student, teacher, torch.tensor([True, False])).loss.item() == 0.0


@pytest.mark.parametrize("broken", [math.nan, INF])
def test_logits_that_have_overflowed_are_refused(broken: float) -> None:
    for case in PLAIN:
        with pytest.raises(ZeroProbabilityError, match=r"position 1: .* not finite there"):
            measure(case, torch.tensor([[0.0, 1.0], [0.0, broken]]), torch.zeros(2, 2))
    for tail in TAILS:
        with pytest.raises(ZeroProbabilityError, match=r"position 1: .* not finite there"):
            topk_divergence(torch.tensor([[-1.0], [broken]]), -torch.ones(2, 1), torch.tensor([True, True]), tail=tail)


@each_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_of_the_topk_set_that_the_teacher_rules_out_is_named(tail: Tail, dtype: torch.dtype) -> None:
    student = torch.tensor([[-1.0, -2.0], [-1.0, -1.5]], dtype=dtype)
    teacher = torch.tensor([[-1.0, -INF], [-1.0, -INF]], dtype=dtype)
    with pytest.raises(ZeroProbabilityError, match=r"position 1: .* entry 1 of the top-k set"):
        topk_divergence(student, teacher, torch.tensor([False, True]), tail=tail)


@pytest.mark.parametrize("tail", ["bucket", "stop_gradient"])
def test_a_zero_of_the_teacher_is_free_where_the_students_probability_underflows(tail: Tail) -> None:
    """exp(-1000) is 0: as in distribution_divergence, 0 log 0 = 0."""
    student, teacher = torch.tensor([[-1.0, -1000.0]]), torch.tensor([[-2.0, -INF]])
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, teacher, all_of(x), tail=tail), student)
    without = topk_divergence(student[:, :1], teacher[:, :1], torch.tensor([True]), tail=tail).loss
    torch.testing.assert_close(loss, without)
    assert gradient[0, 1] == 0
    assert torch.isfinite(gradient).all()


# Top-k


@each_tail
@pytest.mark.parametrize("chosen", [[2], [0, 3], [1, 2, 4, 5]])
def test_topk_value_and_gradient_are_those_of_the_definition(tail: Tail, chosen: list[int]) -> None:
    student, teacher = random_logits(4, 6, seed=16, scale=1.5), random_logits(4, 6, seed=17, scale=1.5)
    value, slopes = exact_rows(lambda p, q: exact_topk(tail, chosen, p, q)(p), student, teacher)
    fixed = teacher.log_softmax(-1)[:, chosen]

    def topk(x: Tensor) -> LossOutput:
        return topk_divergence(x.log_softmax(-1)[:, chosen], fixed, all_of(x), tail=tail)

    loss, gradient = value_and_gradient(topk, student)
    assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-13)
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-13)


def test_topk_by_hand() -> None:
    """p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2)."""
    student, teacher = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
    expected = {
        "bucket": 0.5 * math.log(2) - 0.25 * math.log(2),
        "renormalize": 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3),
        "stop_gradient": 0.5 * math.log(2),
    }
    slopes = {
        "bucket": [0.5 * 2 * math.log(2), 0.25 * math.log(2)],  # p (gap - tail's gap), the tail's is -log 2
        "renormalize": [
            2 / 3 * (math.log(4 / 3) - expected["renormalize"]),
            1 / 3 * (math.log(2 / 3) - expected["renormalize"]),
        ],
        "stop_gradient": [0.5 * math.log(2), 0.0],
    }
    for tail in TAILS:
        output = topk_divergence(student, teacher, torch.tensor([True]), tail=tail)
        assert output.loss.item() == pytest.approx(expected[tail], rel=1e-6)
        _, gradient = value_and_gradient(lambda x, t=tail: topk_divergence(x, teacher, all_of(x), tail=t), student)
        assert gradient[0].tolist() == pytest.approx(slopes[tail], rel=1e-6)
        assert output.metrics == pytest.approx(
            {"topk": expected[tail], "topk_student_mass": 0.75, "topk_teacher_mass": 0.5}, rel=1e-6
        )


@each_tail
def test_plain_back_propagation_through_a_truncated_sum_would_push_the_student_away_from_equality(tail: Tail) -> None:
    """sum_S p (log p - log q) adds the gradient of p(S): at p = q, where the tails stand still, descent drives
    probability out of S."""
    logits = random_logits(1, 6, seed=18).requires_grad_()
    logprobs = logits.log_softmax(-1)[:, :3]
    fixed = logprobs.detach()
    naive = (logprobs.exp() * (logprobs - fixed)).sum()
    [slope] = torch.autograd.grad(naive, logits, retain_graph=True)
    [mass_slope] = torch.autograd.grad(logprobs.exp().sum(), logits, retain_graph=True)
    torch.testing.assert_close(slope, mass_slope)
    assert float(slope.norm()) > 0.05
    assert (logits - 0.1 * slope).softmax(-1)[:, :3].sum() < logits.softmax(-1)[:, :3].sum()
    [own] = torch.autograd.grad(topk_divergence(logprobs, fixed, torch.tensor([True]), tail=tail).loss, logits)
    assert torch.count_nonzero(own) == 0


def test_the_tails_are_three_different_objectives() -> None:
    student, teacher = random_logits(3, 8, seed=19), random_logits(3, 8, seed=20).log_softmax(-1)
    whole = value_and_gradient(lambda x: measure(Divergence("reverse_kl"), x, teacher), student)[1]

    def slope_of(tail: Tail) -> Tensor:
        def topk(x: Tensor) -> LossOutput:
            return topk_divergence(x.log_softmax(-1)[:, :3], teacher[:, :3], all_of(x), tail=tail)

        return value_and_gradient(topk, student)[1]

    slopes = [whole, *(slope_of(tail) for tail in TAILS)]
    for i, one in enumerate(slopes):
        for other in slopes[:i]:
            assert float((one - other).norm()) > 0.05 * float(one.norm())


@each_tail
def test_places_not_in_use_do_not_exist(tail: Tail) -> None:
    student = random_logits(3, 6, seed=21).log_softmax(-1)[:, :4]
    teacher = random_logits(3, 6, seed=22).log_softmax(-1)[:, :4]
    padding = torch.full((3, 2), -INF, dtype=torch.float64)
    expected = value_and_gradient(lambda x: topk_divergence(x, teacher, all_of(x), tail=tail), student)
    padded = torch.cat([teacher, padding], -1)
    loss, gradient = value_and_gradient(
        lambda x: topk_divergence(x, padded, all_of(x), tail=tail), torch.cat([student, padding], -1)
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient[:, :4], expected[1], rtol=1e-14, atol=1e-14)
    assert torch.count_nonzero(gradient[:, 4:]) == 0


def test_a_row_with_no_place_in_use_is_nothing() -> None:
    nothing = torch.full((1, 3), -INF)
    for tail in TAILS:
        loss, gradient = value_and_gradient(
            lambda x, t=tail: topk_divergence(x, nothing.clone(), all_of(x), tail=t), nothing
        )
        assert loss.item() == 0.0
        assert torch.count_nonzero(gradient) == 0


def test_a_zero_of_the_student_keeps_its_share_of_the_teachers_mass() -> None:
    """p = (1, 0), q = (1/2, 1/2): log 2, and not a renormalised 0."""
    student, teacher = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    for tail in TAILS:
        output = topk_divergence(student, teacher, torch.tensor([True]), tail=tail)
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-5)
        assert output.metrics["topk_teacher_mass"] == pytest.approx(1.0)


def test_renormalised_sets_beyond_exp_keep_their_shares() -> None:
    """exp(-1000) is 0, but the ratios inside S are 1 : e and 1 : 1."""
    student, teacher = torch.tensor([[-1000.0, -999.0]]), torch.tensor([[-2000.0, -2000.0]])
    share = 1 / (1 + math.e)
    expected = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, teacher, all_of(x), tail="renormalize"), student)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    slope = share * (math.log(2 * share) - expected)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-4)


def test_tails_below_rounding_do_not_speak() -> None:
    """Two certain positions whose true tails are 1e-9 and 1e-12: in float32 both masses are 1 up to rounding either
    way. What the bucket says about them is below rounding too."""
    student = torch.tensor([[0.7, 0.3]]).log() + 2e-7
    teacher = torch.tensor([[0.7, 0.3]]).log() - 2e-7
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, teacher, all_of(x), tail="bucket"), student)
    assert abs(loss.item()) < 2e-6
    to_logits = gradient - student.exp() * gradient.sum()
    assert float(to_logits.abs().max()) < 2e-6


def test_a_tail_in_bfloat16_is_not_read_from_the_rounding_of_its_logprobs() -> None:
    """The same certain distribution, rounded to bfloat16 on one side: masses 1 and 1.002, so both tails are unknown
    and say nothing. Without a floor of bfloat16's own rounding they would differ by a factor of 2000."""
    logprobs = torch.tensor([[0.6, 0.4]]).log()
    rounded = logprobs.bfloat16()
    for student, teacher in ((rounded, logprobs), (logprobs, rounded)):
        output = topk_divergence(student, teacher, torch.tensor([True]), tail="bucket")
        assert output.loss.dtype == torch.float32
        _, gradient = value_and_gradient(lambda x, q=teacher: topk_divergence(x, q, all_of(x), tail="bucket"), student)
        assert float(gradient.abs().max()) < 0.005
        assert abs(output.loss.item()) < 0.005


@pytest.mark.parametrize(
    ("student", "teacher", "tail", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), "bag", "got tail 'bag'; expected one of bucket, renormalize"),
        (torch.zeros(2, 3), torch.zeros(2, 2), "bucket", r"got \(2, 3\) student's and \(2, 2\)"),
        (torch.zeros(2), torch.zeros(2), "bucket", r"expected \[N, K\]"),
    ],
)
def test_topk_inputs_that_cannot_be_meant(student: Tensor, teacher: Tensor, tail: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_divergence(student, teacher, torch.tensor([True, True]), tail=tail)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kl"}, "got kind 'kl'; expected one of reverse_kl, forward_kl"),
        ({"kind": "jsd", "beta": 1.1}, r"got beta = 1\.1"),
        ({"kind": "jsd", "beta": math.nan}, "got beta = nan"),
        ({"kind": "skewed_kl", "skew": 1.0}, r"got skew = 1\.0; expected at least 0 and below 1"),
        ({"kind": "skewed_kl", "skew": -0.1}, r"got skew = -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distribution_divergence(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([True]), **options)


@each_case
def test_metrics_are_the_masked_sums(case: Divergence) -> None:
    student, teacher = random_logits(4, 6, seed=23), random_logits(4, 6, seed=24)
    mask = torch.tensor([True, False, True, True])
    output = measure(case, student, teacher, mask, weights=torch.full((4,), 7.0))  # do not count here
    p, q = student[mask].softmax(-1), teacher[mask].softmax(-1)
    entropies = -(p * p.log()).sum(-1), -(q * q.log()).sum(-1)
    expected = {
        f"{case.kind}_full": output.loss.item() / 7,
        "student_entropy": float(entropies[0].sum()),
        "teacher_entropy": float(entropies[1].sum()),
    }
    if case.kind == "entropy_gated":
        expected["gate"] = float((entropies[1] > case.entropy_threshold).sum())
    assert output.metrics == pytest.approx(expected, rel=1e-12)


# Properties


@dataclass(frozen=True)
class Rows:
    student: Tensor
    teacher: Tensor
    mask: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.student, self.teacher

    def infinite(self, case: Divergence) -> bool:
        """Whether a zero makes the divergence infinite at a position that trains."""
        wide = torch.promote_types(self.student.dtype, torch.float32)
        log_p, log_q = (x.log_softmax(-1, dtype=wide) for x in self.pair)
        reverse = (torch.isneginf(log_q) & (log_p.exp() > 0)).any(-1)
        forward = (torch.isneginf(log_p) & (log_q.exp() > 0)).any(-1)
        gate = torch.special.entr(log_q.exp()).sum(-1) > case.entropy_threshold
        never = torch.zeros_like(gate)
        rows = {
            "reverse_kl": reverse,
            "forward_kl": forward,
            "jsd": {0.0: forward, 1.0: reverse}.get(case.beta, never),
            "skewed_kl": never if case.skew else forward,
            "skewed_reverse_kl": never if case.skew else reverse,
            "entropy_gated": reverse | (gate & forward),
        }[case.kind]
        return bool((rows & self.mask).any())


@st.composite
def rows(draw: st.DrawFn, *, zeros: bool = False, largest: float = 10.0, dtype: torch.dtype = torch.float64) -> Rows:
    """N of 1 to 6, V of 2 to 9. ``zeros``: some entries are -inf, or all but one (one-hot)."""
    n, v = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    scale = draw(st.sampled_from([x for x in (1e-3, 1.0, 10.0, 1e3, 1e4) if x <= largest]))
    unit = st.integers(-1000, 1000).map(lambda x: x / 1000)

    def table() -> Tensor:
        logits = scale * torch.tensor(draw(st.lists(unit, min_size=n * v, max_size=n * v)), dtype=torch.float64)
        logits = logits.reshape(n, v)
        if zeros:
            gone = draw(st.lists(st.sampled_from(["none", "none", "one", "most"]), min_size=n, max_size=n))
            for row, what in zip(logits, gone, strict=True):
                token = draw(st.integers(0, v - 1)) if what != "none" else 0
                if what == "one":
                    row[token] = -INF
                elif what == "most":
                    row[torch.arange(v) != token] = -INF
        return logits.to(dtype)

    return Rows(table(), table(), torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))))


cases = st.sampled_from(CASES)
tails = st.sampled_from(TAILS)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@settings(properties, max_examples=200)
@given(st.data(), cases, dtypes)
def test_a_divergence_is_finite_and_not_negative_or_refused_for_a_zero(
    data: st.DataObject, case: Divergence, dtype: torch.dtype
) -> None:
    given_rows = data.draw(rows(zeros=True, largest=1e4, dtype=dtype))
    student, teacher, mask = given_rows.student, given_rows.teacher, given_rows.mask
    if given_rows.infinite(case):
        with pytest.raises(ZeroProbabilityError, match="probability zero"):
            measure(case, student, teacher, mask)
        return
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher, mask), student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert loss.item() >= -rounding(student[mask], teacher[mask], case)
    assert gradient[~mask].count_nonzero() == 0


@settings(properties, max_examples=200)
@given(st.data(), tails, dtypes)
def test_a_topk_divergence_is_finite_and_not_negative_or_refused_for_a_zero(
    data: st.DataObject, tail: Tail, dtype: torch.dtype
) -> None:
    given_rows = data.draw(rows(zeros=True, largest=1e4))
    size = data.draw(st.integers(1, given_rows.student.shape[1]))
    mask = given_rows.mask
    student, teacher = (x.log_softmax(-1)[:, :size].to(dtype) for x in given_rows.pair)
    shares = student.to(torch.promote_types(dtype, torch.float32))
    if tail == "renormalize":
        shares = shares - shares.logsumexp(-1, keepdim=True).clamp(min=-1e30)
    if (torch.isneginf(teacher) & (shares.exp() > 0))[mask].any():
        with pytest.raises(ZeroProbabilityError, match="probability zero"):
            topk_divergence(student, teacher, mask, tail=tail)
        return
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, teacher, mask, tail=tail), student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if tail != "stop_gradient":  # which may have any sign: it leaves the mass outside S alone
        floor = size * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
        floor = 0.01 if dtype == torch.bfloat16 else floor
        count = len(student) * (1 + float(given_rows.student.abs().masked_fill(given_rows.student == -INF, 0).max()))
        assert loss.item() >= -40 * floor * count


@properties
@given(rows(zeros=True, largest=1e4), cases, st.integers(-3000, 3000))
def test_adding_a_constant_to_logits_changes_nothing(rows: Rows, case: Divergence, constant: int) -> None:
    case = bounded(case)
    before = value_and_gradient(lambda x: measure(case, x, rows.teacher, rows.mask), rows.student)
    after = value_and_gradient(lambda x: measure(case, x, rows.teacher - constant, rows.mask), rows.student + constant)
    tolerance = 1e-15 * 4e4**2
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


def bounded(case: Divergence) -> Divergence:
    """Itself, or a divergence in its place that zeros do not make infinite."""
    ends = case.kind == "jsd" and case.beta in (0, 1), case.kind.startswith("skewed") and case.skew == 0
    return Divergence("jsd") if case.kind in ("reverse_kl", "forward_kl", "entropy_gated") or any(ends) else case


@properties
@given(st.data(), cases)
def test_the_order_of_the_vocabulary_and_of_the_rows_changes_nothing(data: st.DataObject, case: Divergence) -> None:
    given_rows = data.draw(rows())
    student, teacher, mask = given_rows.student, given_rows.teacher, given_rows.mask
    n, v = student.shape
    row_order, word_order = (torch.tensor(data.draw(st.permutations(range(size)))) for size in (n, v))
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher, mask), student)
    moved_loss, moved_gradient = value_and_gradient(
        lambda x: measure(case, x, teacher[row_order][:, word_order], mask[row_order]),
        student[row_order][:, word_order],
    )
    torch.testing.assert_close(moved_loss, loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(moved_gradient, gradient[row_order][:, word_order], rtol=1e-9, atol=1e-12)


@properties
@given(st.data(), tails)
def test_the_order_inside_a_topk_set_and_of_the_rows_changes_nothing(data: st.DataObject, tail: Tail) -> None:
    given_rows = data.draw(rows())
    student, teacher = (x.log_softmax(-1)[:, :-1] for x in given_rows.pair)
    mask = given_rows.mask
    n, k = student.shape
    row_order, place_order = (torch.tensor(data.draw(st.permutations(range(size)))) for size in (n, k))
    loss, gradient = value_and_gradient(lambda x: topk_divergence(x, teacher, mask, tail=tail), student)
    moved_loss, moved_gradient = value_and_gradient(
        lambda x: topk_divergence(x, teacher[row_order][:, place_order], mask[row_order], tail=tail),
        student[row_order][:, place_order],
    )
    # The tail is what 1 - mass leaves, down to exp(-20).
    torch.testing.assert_close(moved_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved_gradient, gradient[row_order][:, place_order], rtol=1e-6, atol=1e-6)


@properties
@given(rows(), cases, tails, dtypes, st.sampled_from([math.nan, INF, -INF, 1e30]))
def test_masked_rows_do_not_exist(rows: Rows, case: Divergence, tail: Tail, dtype: torch.dtype, junk: float) -> None:
    """To the last bit, in value, gradient and metrics, weights included."""
    gone = ~rows.mask
    student, teacher = (x.log_softmax(-1).to(dtype) for x in rows.pair)  # logits as well, whose softmax they are
    junk_student, junk_teacher = (x.masked_fill(gone[:, None], junk) for x in (student, teacher))
    weights = torch.linspace(0.5, 2, len(student))
    junk_weights = weights.masked_fill(gone, junk)

    def check(loss: Callable[[Tensor, Tensor, Tensor], LossOutput]) -> None:
        clean, gradient = value_and_gradient(lambda x: loss(x, teacher, weights), student)
        dirty, dirty_gradient = value_and_gradient(lambda x: loss(x, junk_teacher, junk_weights), junk_student)
        assert clean.item() == dirty.item()
        assert torch.equal(gradient, dirty_gradient)
        assert dirty_gradient[gone].count_nonzero() == 0
        metrics = loss(student, teacher, weights).metrics
        assert loss(junk_student, junk_teacher, junk_weights).metrics == metrics

    check(lambda p, q, w: measure(case, p, q, rows.mask, weights=w))
    check(lambda p, q, w: topk_divergence(p, q, rows.mask, tail=tail, weights=w))


@properties
@given(st.data(), cases, tails)
def test_sums_add_up_weights_multiply_and_means_divide(data: st.DataObject, case: Divergence, tail: Tail) -> None:
    given_rows = data.draw(rows())
    mask, n = given_rows.mask, len(given_rows.mask)
    cut = data.draw(st.integers(0, n))
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=n, max_size=n)))
    student, teacher = (x.log_softmax(-1) for x in given_rows.pair)
    for loss in (
        lambda p, q, m, **o: measure(case, p, q, m, **o),
        lambda p, q, m, **o: topk_divergence(p, q, m, tail=tail, **o),
    ):

        def call(f: Any = loss, part: slice = slice(None), **options: Any) -> tuple[Tensor, Tensor]:
            return value_and_gradient(lambda x: f(x, teacher[part], mask[part], **options), student[part])

        total, slope = call()
        each = torch.stack([call(part=slice(i, i + 1))[0] for i in range(n)])
        parts = [call(part=part) for part in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(parts[0][0] + parts[1][0], total, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.cat([parts[0][1], parts[1][1]]), slope)
        mean, mean_slope = call(reduction="mean")
        count = max(int(mask.sum()), 1)
        torch.testing.assert_close(mean * count, total, rtol=1e-12, atol=0)
        torch.testing.assert_close(mean_slope * count, slope, rtol=1e-12, atol=0)
        weighted, weighted_slope = call(weights=weights)
        torch.testing.assert_close(weighted, (weights * each).sum(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weighted_slope, weights[:, None] * slope, rtol=1e-12, atol=0)


@settings(properties, max_examples=150)
@given(rows())
def test_the_bucket_is_a_lower_bound_that_grows_with_the_set_up_to_the_whole_kl(rows: Rows) -> None:
    """Data processing: a coarser partition can only lose divergence."""
    student, teacher = (x.log_softmax(-1) for x in rows.pair)
    everyone = all_of(student)
    whole = measure(Divergence("reverse_kl"), student, teacher).loss.item()
    sizes = range(1, student.shape[1] + 1)
    bounds = [topk_divergence(student[:, :k], teacher[:, :k], everyone, tail="bucket").loss.item() for k in sizes]
    # Tails of exp(-20) are known to 1e-16 / 2e-9 of themselves.
    slack = 1e-6
    assert all(small <= large + slack for small, large in zip(bounds, [*bounds[1:], whole], strict=True))
    assert bounds[-1] == pytest.approx(whole, rel=1e-12, abs=1e-12)
    assert bounds[0] >= -slack


@settings(properties, max_examples=100)
@given(rows(), tails)
def test_with_the_whole_vocabulary_every_tail_is_the_whole_kl(rows: Rows, tail: Tail) -> None:
    teacher = rows.teacher.log_softmax(-1)
    whole = value_and_gradient(lambda x: measure(Divergence("reverse_kl"), x, teacher, rows.mask), rows.student)
    topk = value_and_gradient(lambda x: topk_divergence(x.log_softmax(-1), teacher, rows.mask, tail=tail), rows.student)
    torch.testing.assert_close(topk[0], whole[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(topk[1], whole[1], rtol=1e-10, atol=1e-13)


@settings(properties, max_examples=150)
@given(rows(largest=1e4, dtype=torch.float32), cases)
def test_float32_agrees_with_float64_up_to_its_rounding(rows: Rows, case: Divergence) -> None:
    narrow, gradient = value_and_gradient(lambda x: measure(case, x, rows.teacher, rows.mask), rows.student)
    wide, expected = value_and_gradient(
        lambda x: measure(case, x, rows.teacher.double(), rows.mask), rows.student.double()
    )
    if case.kind == "entropy_gated":  # a threshold may lie between the two entropies
        gates = [
            measure(case, p, q, rows.mask).metrics["gate"] for p, q in (rows.pair, [x.double() for x in rows.pair])
        ]
        if gates[0] != gates[1]:
            return
    slack = rounding(rows.student[rows.mask], rows.teacher[rows.mask], case)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-6, abs=slack + 1e-12)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=slack + 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_the_float32_loss_of_the_same_numbers(dtype: torch.dtype) -> None:
    student, teacher = random_logits(5, 40, seed=25).to(dtype), random_logits(5, 40, seed=26).to(dtype)
    for case in CASES:
        loss, gradient = value_and_gradient(lambda x, c=case: measure(c, x, teacher), student)
        expected, slope = value_and_gradient(lambda x, c=case: measure(c, x, teacher.float()), student.float())
        assert loss.dtype == torch.float32
        assert loss.item() == expected.item()
        assert torch.equal(gradient, slope.to(dtype))
    for tail in TAILS:
        logprobs = student.float().log_softmax(-1).to(dtype)[:, :8], teacher.float().log_softmax(-1).to(dtype)[:, :8]
        loss = topk_divergence(*logprobs, all_of(student), tail=tail).loss
        assert loss.dtype == torch.float32
        wide = topk_divergence(logprobs[0].float(), logprobs[1].float(), all_of(student), tail=tail).loss
        assert loss.item() == wide.item()  # the tails here are far above the rounding


@each_kind
def test_the_teacher_gets_no_gradient(case: Divergence) -> None:
    student, teacher = (random_logits(2, 5, seed=seed).requires_grad_() for seed in (27, 28))
    measure(case, student, teacher).loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    logprobs = random_logits(2, 5, seed=29).log_softmax(-1).requires_grad_()
    topk_divergence(student.log_softmax(-1), logprobs, all_of(student)).loss.backward()
    assert logprobs.grad is None


def test_no_rows_and_none_that_train_are_zero_in_sum_and_mean() -> None:
    for shape, mask in (((0, 4), torch.zeros(0, dtype=torch.bool)), ((2, 4), torch.tensor([False, False]))):
        logits = torch.zeros(shape)
        for reduction in ("sum", "mean"):
            for case in PLAIN:
                assert measure(case, logits, logits, mask, reduction=reduction).loss.item() == 0.0
            for tail in TAILS:
                assert topk_divergence(logits, logits, mask, tail=tail, reduction=reduction).loss.item() == 0.0


def test_probabilities_that_all_underflow_but_one_are_not_lost() -> None:
    """Logits 1e4 apart: the reverse KL is the gap of the student's one token, the forward KL that of the teacher's."""
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    for kind in ("reverse_kl", "forward_kl"):
        assert measure(Divergence(kind), student, teacher).loss.item() == 2e4
    assert measure(Divergence("jsd"), student, teacher).loss.item() == pytest.approx(4 * math.log(2))


@each_case
def test_gaps_beyond_the_range_of_exp_leave_value_and_gradient_exact(case: Divergence) -> None:
    """Gaps of 30 to 300 nats in float64, in both directions, with probabilities that are small but not zero."""
    student = torch.tensor([[0, -300, -30, -90, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[-300, 0, -60, -200, 0.5]], dtype=torch.float64)
    value, slopes = exact_rows(lambda p, q: exact(case, q)(p), student, teacher)
    loss, gradient = value_and_gradient(lambda x: measure(case, x, teacher), student)
    assert loss.item() == pytest.approx(value, rel=1e-14 / (1 - case.skew))
    atol = 1e-14 / (1 - case.skew) * float(slopes.abs().max())
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=atol)
