"""Objectives join heads to losses; their gradients are proved in tests/parity."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from understudy import head_kernels
from understudy.divergences import KINDS, Divergence, DivergenceKind
from understudy.errors import RunError, ZeroProbabilityError
from understudy.lm_head import LMHead
from understudy.losses import (
    Tail,
    cispo_loss,
    distribution_divergence,
    importance_sampling_loss,
    ppo_loss,
    topk_divergence,
)
from understudy.objectives import CrossEntropy, FullDivergence, Mixture, Objective, PolicyGradient, TopkDivergence
from understudy.types import Batch, LossOutput

# One hidden number, two tokens: logits (h, 0), so p(token 0) = sigmoid(h).
HEAD = LMHead(torch.tensor([[1.0], [0.0]], dtype=torch.float64))
HIDDEN = torch.tensor([[math.log(3)], [0.0], [5.0]], dtype=torch.float64)  # p(token 0): 3/4, 1/2, masked
TEACHER_HIDDEN = torch.tensor([[0.0], [math.log(3)], [-5.0]], dtype=torch.float64)  # 1/2, 3/4, masked
KL = (0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def batch(**changes: Tensor | None) -> Batch:
    one = Batch(
        input_ids=torch.tensor([[0, 1, 0, 1]]),
        position_ids=None,
        token_index=torch.tensor([0, 1, 2]),
        target_ids=torch.tensor([0, 1, 0]),
        loss_mask=torch.tensor([True, True, False]),
        sampler_logprobs=torch.tensor([0.75, 0.25, 1.0], dtype=torch.float64).log(),
        advantages=torch.tensor([2.0, -1.0, 100.0], dtype=torch.float64),
        teacher_hidden=TEACHER_HIDDEN,
        teacher="default",
        sequence_tokens=4,
        num_sequences=1,
    )
    return replace(one, **changes)  # pyright: ignore[reportArgumentType]


def test_cross_entropy() -> None:
    assert float(CrossEntropy()(batch(), HIDDEN, HEAD).loss) == pytest.approx(math.log(4 / 3) + math.log(2))


def test_policy_gradient() -> None:
    output = PolicyGradient()(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(-(1 * 2.0 + 2 * -1.0))  # ratios 3/4 : 3/4 and 1/2 : 1/4
    assert output.metrics["ratio"] == pytest.approx(3.0)
    warm = PolicyGradient(temperature=2.0)(batch(), HIDDEN, HEAD)  # p(token 0) = sqrt 3 / (1 + sqrt 3), then 1/2
    assert float(warm.loss) == pytest.approx(-(2 * math.sqrt(3) / (1 + math.sqrt(3)) / 0.75 - 2))


def test_full_reverse_kl() -> None:
    output = FullDivergence({"default": HEAD}, coef=0.5)(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(0.5 * sum(KL))
    assert output.metrics["reverse_kl_full"] == pytest.approx(sum(KL))  # the coefficient is the loss's, not the KL's
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert output.metrics["student_entropy"] == pytest.approx(entropy + math.log(2))
    assert output.metrics["teacher_entropy"] == pytest.approx(entropy + math.log(2))


def test_full_reverse_kl_uses_the_named_teachers_head_and_dtype() -> None:
    heads = {"default": HEAD, "other": LMHead(torch.tensor([[2.0], [0.0]], dtype=torch.float32))}
    changed = replace(batch(), teacher="other", teacher_hidden=TEACHER_HIDDEN.float() / 2)
    assert float(FullDivergence(heads)(changed, HIDDEN, HEAD).loss) == pytest.approx(sum(KL), rel=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 40])
def test_full_reverse_kl_in_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[float, Tensor, dict[str, float]]:
        hidden = HIDDEN.clone().requires_grad_()
        output = FullDivergence({"default": HEAD}, 0.5, 0.7)(batch(), hidden, HEAD)
        output.loss.backward()
        assert hidden.grad is not None
        return float(output.loss.detach()), hidden.grad, dict(output.metrics)

    loss, gradient, metrics = run()
    monkeypatch.setattr(head_kernels, "BLOCK_BYTES", block_bytes)  # one position at a time; two
    monkeypatch.setattr(head_kernels, "TILE_WIDTH", 1)
    blocked_loss, blocked_gradient, blocked_metrics = run()
    assert blocked_loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(blocked_gradient, gradient)
    assert gradient[2].item() == 0.0  # masked
    assert blocked_metrics == pytest.approx(metrics, rel=1e-6)


def test_a_mixture_is_a_sum() -> None:
    first, second = FullDivergence({"default": HEAD}), PolicyGradient()
    output = Mixture([first, second])(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(sum(KL) + 0.0)
    assert set(output.metrics) == {
        *("reverse_kl_full", "student_entropy", "teacher_entropy"),
        *("ratio", "ratio_max", "abs_log_ratio", "abs_log_ratio_max", "ratio_outside", "ratio_tail"),
    }


def test_a_missing_signal_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs sampler_logprobs and advantages"):
        PolicyGradient()(batch(advantages=None), HIDDEN, HEAD)
    for objective, message in (
        (FullDivergence({"default": HEAD}), "the reverse_kl needs hidden states of an in-process model"),
        (FullDivergence({"reference": HEAD}, against="reference"), "needs hidden states"),
        (PolicyGradient(baseline_heads={"default": HEAD}), "the baseline needs hidden states"),
        (TopkDivergence(1, "student", heads={"default": HEAD}), "the top-k divergence needs hidden states"),
        (TopkDivergence(1), "needs the teacher's top-k scores"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(batch(teacher_hidden=None), HIDDEN, HEAD)


def test_a_baseline_adds_the_exact_kl_of_each_position() -> None:
    """Ratios 1 and 2, advantages 2 and -1; the baseline adds coef * KL(p || q) of the state to each."""
    output = PolicyGradient(baseline_heads={"default": HEAD}, baseline_coef=0.5)(batch(), HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(-(1 * (2.0 + 0.5 * KL[0]) + 2 * (-1.0 + 0.5 * KL[1])))
    assert output.metrics["reverse_kl_full"] == pytest.approx(sum(KL))
    plain = PolicyGradient()(batch(), HIDDEN, HEAD)
    assert {name: output.metrics[name] for name in plain.metrics} == plain.metrics


def test_a_baseline_sends_no_gradient_through_the_kl() -> None:
    """The gradient is that of the same policy loss with the baseline written into the advantages."""
    kl = torch.tensor([*KL, 0.0], dtype=torch.float64)
    advantages = batch().advantages
    assert advantages is not None
    expected = gradient(PolicyGradient(), batch(advantages=advantages + kl))
    torch.testing.assert_close(gradient(PolicyGradient(baseline_heads={"default": HEAD}), batch()), expected)


def test_a_masked_row_may_hold_anything_under_a_baseline() -> None:
    broken = batch(teacher_hidden=torch.cat([TEACHER_HIDDEN[:2], torch.tensor([[math.nan]], dtype=torch.float64)]))
    objective = PolicyGradient(baseline_heads={"default": HEAD})
    assert objective(broken, HIDDEN, HEAD).metrics == objective(batch(), HIDDEN, HEAD).metrics
    torch.testing.assert_close(gradient(objective, broken), gradient(objective, batch()))


def gradient(objective: Objective, given: Batch, hidden: Tensor = HIDDEN, head: LMHead = HEAD) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    [slope] = torch.autograd.grad(objective(given, leaf, head).loss, leaf)
    return slope


# Ratios 1 and 2. PPO holds the second token only where its advantage pulls it further up.
@pytest.mark.parametrize(
    ("loss", "advantages", "value", "clipped"),
    [
        (partial(ppo_loss, clip_low=0.2, clip_high=0.5), (2.0, -1.0), -2.0 + 2.0, 0),
        (partial(ppo_loss, clip_low=0.2, clip_high=0.5), (2.0, 1.0), -2.0 - 1.5, 1),
        (partial(cispo_loss, clip_low=0.2, clip_high=0.5), (2.0, -1.0), -2 * math.log(0.75) + 1.5 * math.log(0.5), 1),
        (partial(importance_sampling_loss, max_importance_ratio=1.5), (2.0, -1.0), -2.0 + 1.5, 1),
        (partial(importance_sampling_loss, importance_band=(0.5, 1.5)), (2.0, -1.0), -2.0, 1),
    ],
)
def test_policy_losses_by_hand(loss, advantages: tuple[float, float], value: float, clipped: int) -> None:
    given = batch(advantages=torch.tensor([*advantages, 100.0], dtype=torch.float64))
    output = PolicyGradient(policy_loss=loss)(given, HIDDEN, HEAD)
    assert float(output.loss) == pytest.approx(value)
    assert output.metrics["ratio_clipped"] == clipped


def test_weights_multiply_tokens() -> None:
    weights = torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64)
    given = batch(weights=weights)
    assert float(CrossEntropy()(given, HIDDEN, HEAD).loss) == pytest.approx(0.5 * math.log(4 / 3) + 3 * math.log(2))
    assert float(PolicyGradient()(given, HIDDEN, HEAD).loss) == pytest.approx(-(0.5 * 2.0 + 3 * 2 * -1.0))
    full = FullDivergence({"default": HEAD}, 2.0)(given, HIDDEN, HEAD)
    assert float(full.loss) == pytest.approx(2 * (0.5 * KL[0] + 3 * KL[1]))
    assert full.metrics["reverse_kl_full"] == pytest.approx(sum(KL))  # metrics count tokens alike
    topk = TopkDivergence(2, "student", coef=2.0, heads={"default": HEAD})(given, HIDDEN, HEAD)
    assert float(topk.loss) == pytest.approx(float(full.loss))
    assert topk.metrics["topk"] == pytest.approx(sum(KL))


def test_the_reference_has_its_own_states_head_and_metric() -> None:
    states = torch.tensor([[math.log(3)], [math.log(3)], [math.nan]], dtype=torch.float64)
    heads = {"reference": HEAD, "default": LMHead(torch.full((2, 1), math.nan, dtype=torch.float64))}
    given = batch(reference_hidden=states, teacher_hidden=None)
    output = FullDivergence(heads, -0.25, against="reference")(given, HIDDEN, HEAD)
    own = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # r is (3/4, 1/4) twice; p is that and (1/2, 1/2)
    assert float(output.loss) == pytest.approx(-0.25 * own)
    assert output.metrics == {"reference_kl_full": pytest.approx(own)}


VOCAB, STATES = 7, 5
MASK = torch.tensor([True, True, False, True, True])


def wide(seed: int, **fields: Tensor | None) -> tuple[Batch, Tensor, LMHead, dict[str, LMHead]]:
    """Random heads over seven tokens, the student's hidden states, and a batch with the teacher's."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = {"default": LMHead(2 * random(VOCAB, 3)), "reference": LMHead(random(VOCAB, 3))}
    ids = torch.arange(STATES)
    given = Batch(
        input_ids=ids[None],
        position_ids=None,
        token_index=ids,
        target_ids=ids,
        loss_mask=MASK,
        sampler_logprobs=None,
        advantages=None,
        teacher_hidden=random(STATES, 3),
        teacher="default",
        sequence_tokens=STATES,
        num_sequences=1,
        reference_hidden=random(STATES, 3),
    )
    return replace(given, **fields), random(STATES, 4), LMHead(random(VOCAB, 4)), heads  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("against", ["teacher", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_full_divergence_is_that_of_the_distributions(kind: DivergenceKind, against: str) -> None:
    given, hidden, head, heads = wide(3, weights=torch.tensor([1.0, 0.5, 9.0, 2.0, 0.25], dtype=torch.float64))
    options = {"beta": 0.3, "skew": 0.2, "entropy_threshold": 1.5}
    own = {"teacher": ("default", given.teacher_hidden), "reference": ("reference", given.reference_hidden)}
    name, states = own[against]
    assert states is not None
    objective = FullDivergence(heads, 0.7, 1.3, Divergence(kind, **options), against)  # type: ignore[arg-type]
    leaf = hidden.clone().requires_grad_()
    expected = distribution_divergence(
        head.logits(leaf) / 1.3, heads[name].logits(states) / 1.3, MASK, kind=kind, weights=given.weights, **options
    )
    [slope] = torch.autograd.grad(0.7 * expected.loss, leaf)
    output = objective(given, hidden, head)
    assert float(output.loss) == pytest.approx(0.7 * float(expected.loss.detach()), rel=1e-10)
    torch.testing.assert_close(gradient(objective, given, hidden, head), slope)
    if against == "teacher":
        assert output.metrics == pytest.approx(expected.metrics, rel=1e-10)
        assert kind != "entropy_gated" or 0 < output.metrics["gate"] < 4  # some of the positions
    else:
        assert output.metrics == {"reference_kl_full": pytest.approx(expected.metrics[f"{kind}_full"])}


def topk_scores(given: Batch, head: LMHead, k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """As a teacher sends them."""
    assert given.teacher_hidden is not None
    best = head.logprobs(given.teacher_hidden, temperature=temperature).topk(k, dim=-1)
    return {"topk_ids": best.indices, "topk_logprobs": best.values}


@pytest.mark.parametrize("tail", Tail.__args__)
@pytest.mark.parametrize("chosen_by", ["teacher", "student", "union"])
def test_topk_divergence_on_the_set_it_names(chosen_by: str, tail: Tail) -> None:
    """Written out: each position's set, looked up in both full distributions."""
    temperature = 0.8
    given, hidden, head, heads = wide(4)
    assert given.teacher_hidden is not None
    log_p = head.logprobs(hidden, temperature=temperature)
    log_q = heads["default"].logprobs(given.teacher_hidden, temperature=temperature)
    loss, shared, sizes = 0.0, 0, []
    for n in range(STATES):
        sets = {"student": set(log_p[n].topk(3).indices.tolist()), "teacher": set(log_q[n].topk(3).indices.tolist())}
        chosen = sorted(sets.get(chosen_by, sets["student"] | sets["teacher"]))
        if MASK[n]:
            loss += float(topk_divergence(log_p[n : n + 1, chosen], log_q[n : n + 1, chosen], MASK[:1], tail=tail).loss)
            shared += len(sets["student"] & sets["teacher"])
            sizes.append(len(chosen))
    given = replace(given, **topk_scores(given, heads["default"], 3, temperature))  # type: ignore[arg-type]
    objective = TopkDivergence(3, chosen_by, tail, 0.5, temperature, heads)  # type: ignore[arg-type]
    output = objective(given, hidden, head)
    assert float(output.loss) == pytest.approx(0.5 * loss, rel=1e-9)
    assert output.metrics["topk"] == pytest.approx(loss, rel=1e-9)
    if chosen_by == "union":
        assert {3, 6} != set(sizes) != {3}  # sets that overlap in part
        assert output.metrics["topk_overlap"] == pytest.approx(shared / 3)
    else:
        assert "topk_overlap" not in output.metrics


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("chosen_by", ["teacher", "student", "union"])
def test_topk_of_the_whole_vocabulary_is_the_full_kl(chosen_by: str, tail: Tail) -> None:
    given, hidden, head, heads = wide(5)
    given = replace(given, **topk_scores(given, heads["default"], VOCAB))  # type: ignore[arg-type]
    objective = TopkDivergence(VOCAB, chosen_by, tail, 0.5, 1.0, heads)  # type: ignore[arg-type]
    full = FullDivergence(heads, 0.5)
    output = objective(given, hidden, head)
    assert float(output.loss) == pytest.approx(float(full(given, hidden, head).loss), rel=1e-9)
    torch.testing.assert_close(gradient(objective, given, hidden, head), gradient(full, given, hidden, head))
    # A union's second mention of a token counts nowhere: the masses are 1, not 2.
    assert output.metrics["topk_student_mass"] == pytest.approx(4.0)
    assert output.metrics["topk_teacher_mass"] == pytest.approx(4.0)
    if chosen_by == "union":
        assert output.metrics["topk_overlap"] == pytest.approx(4.0)


@pytest.mark.parametrize("chosen_by", ["teacher", "student", "union"])
def test_masked_rows_of_a_topk_divergence_may_hold_anything(chosen_by: str) -> None:
    given, hidden, head, heads = wide(6)
    given = replace(given, **topk_scores(given, heads["default"], 3))  # type: ignore[arg-type]
    objective = TopkDivergence(3, chosen_by, heads=heads)  # type: ignore[arg-type]
    expected = objective(given, hidden, head)
    slope = gradient(objective, given, hidden, head)
    gap = (~MASK)[:, None]
    assert given.teacher_hidden is not None
    assert given.topk_logprobs is not None
    broken = replace(
        given,
        teacher_hidden=given.teacher_hidden.masked_fill(gap, math.nan),
        topk_logprobs=given.topk_logprobs.masked_fill(gap, math.nan),
    )
    output = objective(broken, hidden, head)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=1e-12)
    assert output.metrics == pytest.approx(expected.metrics, rel=1e-12)
    torch.testing.assert_close(gradient(objective, broken, hidden, head), slope)


@pytest.mark.parametrize("chosen_by", ["student", "union"])
def test_a_teachers_zero_under_a_students_pick_is_an_error(chosen_by: str) -> None:
    given, hidden, head, heads = wide(7)
    pick = int(head.logits(hidden)[3].argmax())
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[pick] = -math.inf
    blind = {"default": replace(heads["default"], bias=bias)}
    objective = TopkDivergence(2, chosen_by, heads=blind)  # type: ignore[arg-type]
    with pytest.raises(ZeroProbabilityError, match="the teacher gives entry 0 of the top-k set probability zero"):
        objective(given, hidden, head)


def test_a_mixture_keeps_both_kls_apart() -> None:
    given, hidden, head, heads = wide(8)
    to_teacher, to_reference = FullDivergence(heads, 1.25), FullDivergence(heads, -0.25, against="reference")
    both = Mixture([to_teacher, to_reference])
    parts: list[LossOutput] = [one(given, hidden, head) for one in (to_teacher, to_reference)]
    output = both(given, hidden, head)
    assert float(output.loss) == pytest.approx(sum(float(part.loss) for part in parts))
    assert output.metrics == {**parts[0].metrics, **parts[1].metrics}
    assert output.metrics["reverse_kl_full"] != output.metrics["reference_kl_full"]


def test_errors_name_the_position_in_the_batch_not_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_kernels, "BLOCK_BYTES", 2 * 8)  # a position at a time
    logprobs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64).log()
    given = batch(topk_ids=torch.tensor([[0, 1]] * 3), topk_logprobs=logprobs)
    with pytest.raises(ZeroProbabilityError, match="position 1: the teacher gives entry 1"):
        TopkDivergence(2)(given, HIDDEN, HEAD)


def test_a_baseline_names_the_position_of_a_teachers_zero() -> None:
    banned = LMHead(HEAD.weight, bias=torch.tensor([0.0, -math.inf], dtype=torch.float64))
    objective = PolicyGradient(baseline_heads={"default": banned})
    with pytest.raises(ZeroProbabilityError, match="position 0: the teacher gives token 1 probability zero"):
        objective(batch(), HIDDEN, HEAD)


def test_alternatives_beyond_the_vocabulary() -> None:
    given = batch(topk_ids=torch.tensor([[0, 2]] * 3), topk_logprobs=torch.full((3, 2), -1.0, dtype=torch.float64))
    with pytest.raises(RunError, match="token id 2; expected ids below 2"):
        TopkDivergence(2)(given, HIDDEN, HEAD)
