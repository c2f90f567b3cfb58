"""The losses agree with their plain definitions, in value and gradient, and never hold all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blora_compiler import losses
from blora_compiler.errors import BadInput
from blora_compiler.objective import mean_error

TOKENS, STUDENT, TEACHER, VOCABULARY = 7, 5, 6, 23


def _sides(bias: bool, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)

    def make(*shape: int, grad: bool) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    return {
        "student_hidden": make(TOKENS, STUDENT, grad=True),
        "student_head": make(VOCABULARY, STUDENT, grad=True),
        "teacher_hidden": make(TOKENS, TEACHER, grad=False),
        "teacher_head": make(VOCABULARY, TEACHER, grad=False),
        "student_bias": make(VOCABULARY, grad=True) if bias else None,
        "teacher_bias": make(VOCABULARY, grad=False) if bias else None,
    }


def _plain_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (
        F.kl_div(
            torch.log_softmax(student / temperature, -1),
            torch.log_softmax(teacher / temperature, -1),
            log_target=True,
            reduction="sum",
        )
        / student.shape[:-1].numel()
    )


def _plain_head_kl(sides: dict[str, torch.Tensor | None], temperature: float) -> torch.Tensor:
    student = F.linear(sides["student_hidden"], sides["student_head"], sides["student_bias"])
    teacher = F.linear(sides["teacher_hidden"], sides["teacher_head"], sides["teacher_bias"])
    return _plain_kl(student, teacher, temperature)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 8, 23, 1000])
@pytest.mark.parametrize("tile", [1, 50, 10**6])
def test_head_kl_equals_the_plain_one(bias, temperature, chunk, tile, monkeypatch):
    monkeypatch.setattr(losses, "_CPU_TILE_ELEMENTS", tile)
    sides = _sides(bias)
    students = [t for name, t in sides.items() if name.startswith("student") and t is not None]
    wanted = _plain_head_kl(sides, temperature)
    found = losses.head_kl(**sides, temperature=temperature, vocabulary_chunk=chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(loss, students) for loss in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 1000])
def test_head_kl_passes_gradcheck(chunk):
    sides = _sides(bias=True)
    order = ["student_hidden", "student_head", "student_bias"]

    def loss(*students: torch.Tensor) -> torch.Tensor:
        changed = {**sides, **dict(zip(order, students, strict=True))}
        return losses.head_kl(**changed, temperature=1.7, reduction="sum", vocabulary_chunk=chunk)

    assert torch.autograd.gradcheck(loss, tuple(sides[name] for name in order))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize("tile", [1, 10**6])
def test_labels_add_the_cross_entropy_of_the_tokens_that_have_one(bias, chunk, tile, monkeypatch):
    monkeypatch.setattr(losses, "_CPU_TILE_ELEMENTS", tile)
    sides = _sides(bias)
    students = [t for name, t in sides.items() if name.startswith("student") and t is not None]
    labels = torch.tensor([3, -1, 0, VOCABULARY - 1, 7, -1, 8])
    logits = F.linear(sides["student_hidden"], sides["student_head"], sides["student_bias"])
    likelihood = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / TOKENS
    kl = _plain_head_kl(sides, 1.0)
    total, alone = losses.head_losses(**sides, labels=labels, label_weight=0.3, vocabulary_chunk=chunk)
    torch.testing.assert_close(total, kl + 0.3 * likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, kl.detach(), rtol=1e-12, atol=1e-12)
    assert not alone.requires_grad
    gradients = (torch.autograd.grad(loss, students) for loss in (total, kl + 0.3 * likelihood))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_labels_want_temperature_one():
    with pytest.raises(BadInput, match=r"temperature 1, not 2"):
        losses.head_losses(**_sides(False), labels=torch.zeros(TOKENS, dtype=int), label_weight=1.0, temperature=2.0)


def test_sum_is_tokens_times_mean():
    sides = _sides(bias=False)
    total, mean = (losses.head_kl(**sides, reduction=how) for how in ("sum", "mean"))
    torch.testing.assert_close(total, mean * TOKENS)


def test_equal_sides_have_no_distance():
    sides = _sides(bias=False)
    same = losses.head_kl(
        sides["student_hidden"], sides["student_head"], sides["student_hidden"], sides["student_head"]
    )
    assert abs(same.item()) < 1e-14
    assert max(g.abs().max() for g in torch.autograd.grad(same, [sides["student_hidden"]])) < 1e-14


def test_a_frozen_head_gets_no_gradient():
    sides = _sides(bias=False)
    sides["student_head"] = sides["student_head"].detach()
    losses.head_kl(**sides).backward()
    assert sides["student_head"].grad is None
    assert sides["student_hidden"].grad.abs().sum() > 0


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert losses.head_kl(**_sides(bias=False)).grad_fn is None


def test_logits_never_exist_as_a_whole(monkeypatch):
    largest = 0
    real = losses._Head.logits

    def watched(self, rows, columns, dtype):
        nonlocal largest
        tile = real(self, rows, columns, dtype)
        largest = max(largest, tile.numel())
        return tile

    monkeypatch.setattr(losses._Head, "logits", watched)
    monkeypatch.setattr(losses, "_CPU_TILE_ELEMENTS", 16)
    losses.head_kl(**_sides(bias=False), vocabulary_chunk=8).backward()
    assert 0 < largest <= 16 < TOKENS * VOCABULARY


def test_autocast_runs_gemms_in_bfloat16_and_statistics_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 32), torch.randn(100, 32) * 0.3
    near = (hidden + 0.3 * torch.randn(64, 32)).requires_grad_()
    exact = losses.head_kl(near, head, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses.head_kl(near, head, hidden, head)
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.0)
    (gradient,) = torch.autograd.grad(rounded, [near])
    assert gradient.dtype == torch.float32


def test_head_kl_refuses_sides_that_do_not_fit():
    sides = _sides(bias=False)
    with pytest.raises(BadInput, match="student has 7 tokens and the teacher 3"):
        losses.head_kl(**{**sides, "teacher_hidden": sides["teacher_hidden"][:3]})
    with pytest.raises(BadInput, match="student's vocabulary is 23 and the teacher's 9"):
        losses.head_kl(**{**sides, "teacher_head": sides["teacher_head"][:9]})
    empty = {name: sides[name][:0] for name in ("student_hidden", "teacher_hidden")}
    with pytest.raises(BadInput, match="0 tokens to compare"):
        losses.head_kl(**{**sides, **empty})


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tile", [1, 60, 10**6])
def test_kl_from_logits_equals_the_plain_one(temperature, tile, monkeypatch):
    monkeypatch.setattr(losses, "_CPU_TILE_ELEMENTS", tile)
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 9).double()
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
    found = losses.kl_from_logits(student, teacher, mask, temperature)
    wanted = _plain_kl(student[mask.bool()], teacher[mask.bool()], temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    gradients = [torch.autograd.grad(loss, [student])[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert gradients[0][0, 2].abs().sum() == 0


def test_kl_from_logits_refuses_bad_pairs():
    with pytest.raises(BadInput, match=r"student logits are \(2, 9\) and teacher logits \(2, 8\)"):
        losses.kl_from_logits(torch.zeros(2, 9), torch.zeros(2, 8))
    with pytest.raises(BadInput, match="0 tokens to compare"):
        losses.kl_from_logits(torch.zeros(2, 9), torch.zeros(2, 9), torch.zeros(2))


def test_topk_kl_of_the_whole_vocabulary_is_the_kl():
    torch.manual_seed(2)
    student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    found = losses.topk_kl(student / 2.0, *losses.reduce_to_topk(teacher, 11, temperature=2.0))
    wanted = _plain_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, [student])[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_topk_kl_lumps_the_rest_into_one_event():
    torch.manual_seed(3)
    student, teacher = torch.randn(4, 11, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64)
    kept = teacher.topk(3).indices

    def merged(logits: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(logits, -1)
        top = p.gather(-1, kept)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    p, q = merged(teacher), merged(student)
    wanted = (p * (p / q).log()).sum(-1).mean()
    found = losses.topk_kl(student, *losses.reduce_to_topk(teacher, 3))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert float(found) < float(_plain_kl(student, teacher))


def test_relative_error_and_mask():
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    student = torch.tensor([[[3.0, 3.0], [0.0, 0.0]]])
    assert float(losses.relative_error(student, teacher)) == pytest.approx((1 / 25 + 1) / 2)
    assert float(losses.relative_error(student, teacher, torch.tensor([[1, 0]]))) == pytest.approx(1 / 25)
    assert float(mean_error([student, teacher], [teacher, teacher], None)) == pytest.approx((1 / 25 + 1) / 4)
    with pytest.raises(BadInput, match=r"\(1, 2, 2\) and the teacher's \(1, 1, 2\)"):
        losses.relative_error(student, teacher[:, :1])


def test_pooled_distance_is_that_of_unit_means_over_counted_tokens():
    student, teacher = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]])
    gaps = []
    for s, t, m in zip(student, teacher, mask.bool(), strict=True):
        ours, theirs = s[m].mean(0), t[m].mean(0)
        gaps.append((ours / ours.norm() - theirs / theirs.norm()).square().sum())
    expected = torch.stack(gaps).mean()
    torch.testing.assert_close(
        losses.pooled_distance(student, teacher, mask).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert losses.pooled_distance(2 * student, student, mask) < 1e-6
    assert losses.pooled_distance(student, teacher) != losses.pooled_distance(student, teacher, mask)


def test_a_row_of_zeros_at_the_teacher_keeps_the_distance_finite():
    teacher = torch.randn(5, 8)
    teacher[2] = 0
    student = (teacher + 3.0).requires_grad_()
    distance = losses.relative_error(student, teacher)
    distance.backward()
    assert torch.isfinite(distance) and torch.isfinite(student.grad).all()
