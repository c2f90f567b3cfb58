"""The modules that a rewrite puts in a projection's or a branch's place. Both views hold the same instance.

BranchedLinear   y = d * (W - B0 A0) x + B diag(g) A x + bias      while training
FactoredLinear   y = B (A x) + bias                                 two GEMMs; A x may be a part of y itself
DenseLinear      y = W x + bias                                     one GEMM, weight stored out x in
NestedLinear     y = W x + bias, or B[:, :r] (A[:r] x) + bias       a family in training; r is any member's rank
RemovedBranch    y = 0                                              no GEMM, in place of an attention or MLP module
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenseLinear(nn.Linear):
    """`nn.Linear` built around existing tensors, without initialising new ones."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Args:
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)  # type: ignore[assignment]


class FactoredLinear(nn.Module):
    """A projection as two GEMMs: `y = B (A x) + bias`.

    In interpolative form A x is a part of y, and B computes what is left: `y = [B1 A x, A x, B2 A x] + bias`.
    """

    def __init__(self, A: Tensor, B: Tensor, bias: Tensor | None, given_from: int | None = None) -> None:
        """Args:
        A: (rank, in_features).
        B: (out_features, rank); (out_features - rank, rank) in interpolative form.
        bias: (out_features,) or None.
        given_from: the output from which on A x itself stands, in interpolative form; else None.
        """
        super().__init__()
        self.A = _parameter(A)
        self.B = _parameter(B)
        self.bias = None if bias is None else _parameter(bias)
        self.given_from = given_from

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0] + (0 if self.given_from is None else self.rank)

    @property
    def whole_b(self) -> Tensor:
        """(out_features, rank): B, with the identity where A x is the output."""
        if self.given_from is None:
            return self.B
        identity = torch.eye(self.rank, dtype=self.B.dtype, device=self.B.device)
        return torch.cat([self.B[: self.given_from], identity, self.B[self.given_from :]])

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): the two factors multiplied, for code that looks at a projection's weight."""
        return self.whole_b @ self.A

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return self.second(F.linear(x, self.A))

    def second(self, hidden: Tensor) -> Tensor:
        """The outputs behind A x. hidden: (..., rank) -> (..., out_features)."""
        if self.given_from is None:
            return F.linear(hidden, self.B, self.bias)
        others = F.linear(hidden, self.B)
        if self.given_from == 0:
            parts = [hidden, others]
        elif self.given_from == len(self.B):
            parts = [others, hidden]
        else:
            before, after = others.split([self.given_from, len(self.B) - self.given_from], dim=-1)
            parts = [before, hidden, after]
        outputs = torch.cat(parts, dim=-1)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        given = "" if self.given_from is None else f", given_from={self.given_from}"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{given}"


def has_given_outputs(tree: nn.Module) -> bool:
    """Whether any pair in `tree` is in interpolative form."""
    return any(isinstance(module, FactoredLinear) and module.given_from is not None for module in tree.modules())


class BranchedLinear(nn.Module):
    """A projection in training: frozen dense part, scaled by retention, beside a trainable low-rank branch.

        y = d * (W - B0 A0) x + B diag(g) A x + bias          A = A0, B = B0, g = 1, d = 1 at the start

    At d = 1 this is the teacher up to rounding, at d = 0 exactly the factored site. `retention` and `gates` are
    one-dimensional because sharding refuses scalars, and are cast to the activation's dtype because a float32
    factor would promote bfloat16 activations.

    Attributes:
        residual: (out_features, in_features) buffer, W - B0 A0. Dropped by `drop_dense` once d is 0 for good.
        A: (rank, in_features), trainable.
        B: (out_features, rank), trainable.
        gates: (rank,), trainable.
        retention: (1,); the schedule or the optimizer moves it.
        bias: (out_features,) or None; a private, trainable copy.
    """

    residual: Tensor | None

    def __init__(self, residual: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("residual", residual.detach())
        self.A = _parameter(A)
        self.B = _parameter(B)
        self.bias = None if bias is None else _parameter(bias)
        self.gates = nn.Parameter(A.new_ones(A.shape[0]))
        self.retention = nn.Parameter(A.new_ones(1), requires_grad=False)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): the one matrix this computes, for code that looks at a projection's weight."""
        low_rank = (self.B * self.gates) @ self.A
        return low_rank if self.residual is None else self.retention * self.residual + low_rank

    def drop_dense(self) -> None:
        """Free the dense part; its retention must already be 0."""
        assert float(self.retention) == 0.0, f"retention is {float(self.retention)}, the dense part still counts"
        self.residual = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        low_rank = F.linear(F.linear(x, self.A) * self.gates.to(x.dtype), self.B, self.bias)
        if self.residual is None:
            return low_rank
        return self.retention.to(x.dtype) * F.linear(x, self.residual) + low_rank

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class NestedLinear(nn.Module):
    """A projection of a family: every member's form at once, ordered factors of which a member uses the first ranks.

        y = W x + bias                          active is None
        y = B[:, :active] (A[:active] x) + bias

    Attributes:
        dense: (out_features, in_features), or None where no member is dense.
        A: (rank, in_features), rows from the most to the least important, or None where every member is dense.
        B: (out_features, rank), or None.
        bias: (out_features,) or None.
        active: the rank that `forward` uses now; None for the dense weight.
    """

    dense: nn.Parameter | None

    def __init__(self, dense: Tensor | None, A: Tensor | None, B: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.dense = None if dense is None else _parameter(dense)
        self.A = None if A is None else _parameter(A)
        self.B = None if B is None else _parameter(B)
        self.bias = None if bias is None else _parameter(bias)
        self.active = None if A is None or dense is not None else A.shape[0]

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): of the active form, for code that looks at a projection's weight."""
        if self.active is None:
            assert self.dense is not None, "no member of this family is dense here"
            return self.dense
        A, B = self.factors(self.active)
        return B @ A

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank) of the member with this rank: views, not copies."""
        assert self.A is not None and self.B is not None and rank <= self.A.shape[0], f"no factors of rank {rank}"
        return self.A[:rank], self.B[:, :rank]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        if self.active is None:
            return F.linear(x, self.weight, self.bias)
        A, B = self.factors(self.active)
        return F.linear(F.linear(x, A), B, self.bias)


class CacheEntry(NamedTuple):
    """What a branch keeps in a key/value cache: an entry of (batch, heads, tokens, size) for keys, one for values."""

    layer: int
    heads: int
    key_size: int
    value_size: int


class RemovedBranch(nn.Module):
    """Stands where a whole attention or MLP module was: returns zeros in the shape of the first tensor it is given.

    A removed attention module that had keys and values in the cache keeps its place there by writing zeros, so that
    the layers around it still find the right sequence length; that is memory, not arithmetic.
    """

    def __init__(self, outputs: int = 1, cache: CacheEntry | None = None) -> None:
        """Args:
        outputs: length of the tuple the module returned; 1 means a bare tensor. The rest are None.
        cache: the cache entry to keep, or None.
        """
        super().__init__()
        self.outputs = outputs
        self.cache = cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the module took; the first tensor is (batch, tokens, features)."""
        hidden_states = first_tensor(args, kwargs)
        assert hidden_states is not None, "only modules that are given a tensor are removed"
        past = cache_in(args, kwargs)
        if past is not None and self.cache is not None:
            batch, tokens = hidden_states.shape[:2]
            keys, values = (
                hidden_states.new_zeros(batch, self.cache.heads, tokens, size)
                for size in (self.cache.key_size, self.cache.value_size)
            )
            past.update(keys, values, self.cache.layer)
        branch = torch.zeros_like(hidden_states)
        return branch if self.outputs == 1 else (branch, *([None] * (self.outputs - 1)))


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is given, by position or by name."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def cache_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The key/value cache that a module is given, whatever its name; None without one.

    Of a decoder that reads an encoder's states as well, the part for its own tokens.
    """
    cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
    return getattr(cache, "self_attention_cache", cache)


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself if it is already a parameter (so that sharing survives), else a new parameter around it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
