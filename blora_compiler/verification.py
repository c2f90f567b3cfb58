"""verify: the exported files, loaded in ONNX Runtime, against the PyTorch tree they came from.

Every graph is compared at several batches and lengths, left-padded too. Generative exports are also compared step by
step behind the cache, and token by token over greedy generations. Nothing is random between two calls.

The reference runs in float32 on the tree's weights rounded to the export's type, so that the error is the export's
arithmetic and not the rounding of weights, which it shares. So it is where weights are quantised: the graphs must
agree with the rounded weights when they compute in floats, and may be a little further off as they are shipped, where
they round the inputs of GEMMs too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from .artifact import Artifact, InputSpec, Parity, positions_of
from .errors import BadInput, ParityFailed
from .generation import FixedCache
from .graph import DECODER_INPUT, binds_by_position
from .layers import has_given_outputs
from .quantization import in_float_arithmetic, round_weights, rounds_inputs
from .source import position_limit

# Largest absolute difference of logits. Half types: a few units in the last place of logits around ten, grown by the
# layers before; doubling a logit fails by far.
TOLERANCES = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 4e-1}
# By how much more rounding may differ where outputs are computed from other outputs: on the bundled model at 0.75 to
# 0.25, float32 is six to eight times as far from float64 in interpolative form as in plain pairs.
INTERPOLATIVE_GROWTH = 5.0
# Largest distance of an output to PyTorch's, as a share of the latter's length, where GEMMs round their inputs to
# int8: half a percent for most, several for a handful of logits near zero. A doubled output is at 100 %.
ROUNDING_TOLERANCE = 0.2
SMALLEST_UNIT = 1e-3  # outputs below this are all but zero: what is left of them is rounding
NEW_TOKENS = 64
_DECODE_STEPS = 4
_PROMPT_LENGTHS = (3, 5, 8, 11, 14, 17, 20, 24)


@dataclass(frozen=True)
class Setting:
    """A shape that is compared: `batch` sequences of `tokens`; where padded, row i misses its first i + 1 tokens."""

    batch: int
    tokens: int
    padded: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}{' left-padded' if self.padded else ''}"


TRUE_SHARE = 0.25  # of boolean inputs: what stands behind either value is compared
SETTINGS = (Setting(1, 1), Setting(1, 7), Setting(2, 16), Setting(3, 33), Setting(3, 16, padded=True))
# A prompt that the prefill graph attends to in parts (see `AttendInParts`), of unequal lengths.
LONG = Setting(1, 203, padded=True)


def verify(
    artifact: Artifact | str | Path,
    tree: nn.Module,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    tolerance: float | None = None,
    new_tokens: int = NEW_TOKENS,
) -> Parity:
    """Compare an export with the tree it came from. The tree is not changed.

    Args:
        artifact: an open export, or its folder.
        tree: the module that was lowered, in any floating type.
        prompts: token ids to continue greedily, alone and as one left-padded batch; by default those the export was
            verified with, else eight random ones.
        tolerance: largest difference of outputs, as a share of the largest one where that is below 1; None takes the
            export type's own, five times as much where pairs are in interpolative form.
        new_tokens: tokens to generate for each prompt, fewer where the model has fewer positions.

    Raises:
        ParityFailed: where an output is not finite or too far off, or a float32 generation differs.
        BadInput: where the export or the prompts cannot be used.
        ProviderMissing: where the export's execution provider is absent.
    """
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    reference = cast_copy(tree, artifact.dtype, compute_dtype="float32")
    check = _Check(artifact.dtype, _own_tolerance(artifact.dtype, tree) if tolerance is None else tolerance)
    exact, rounding = artifact, None
    if artifact.quantize is not None:
        round_weights(reference, artifact)
        exact = in_float_arithmetic(artifact)
        if any(rounds_inputs(artifact.folder, graph) for graph in artifact.graphs):
            rounding = _DistanceCheck(artifact.dtype, ROUNDING_TOLERANCE)
    with torch.no_grad(), without_fused_encoder_layers():
        _check_settings(check, exact, reference)
        if rounding is not None:
            _check_settings(rounding, artifact, reference)
        parity = check.parity()
        if artifact.generation:
            prompts = prompts or artifact.manifest.get("prompts") or default_prompts(reference)
            new_tokens = _allowed_new_tokens(new_tokens, prompts, reference)
            identical = _check_greedy(check, artifact, reference, prompts, new_tokens, exact=rounding is None)
            parity = replace(parity, sequences=2 * len(prompts), identical=identical, new_tokens=new_tokens)
    if rounding is not None:
        parity = replace(parity, rounding_tolerance=rounding.tolerance, rounding_errors=rounding.errors)
    return parity


def quantization_loss(artifact: Artifact, tree: nn.Module) -> float:
    """How far the outputs of a quantised export are from the tree's, weights not rounded: distance over length.

    The largest over the settings of `verify`. Inputs are random, so this is no measure of quality on a text; see
    `export_quality`.
    """
    reference = cast_copy(tree, artifact.dtype, compute_dtype="float32")
    check = _DistanceCheck(artifact.dtype, math.inf)
    with torch.no_grad(), without_fused_encoder_layers():
        _check_settings(check, artifact, reference)
    return max(check.errors.values())


def _own_tolerance(dtype: str, tree: nn.Module) -> float:
    return TOLERANCES[dtype] * (INTERPOLATIVE_GROWTH if has_given_outputs(tree) else 1.0)


def _check_settings(check: _Check, artifact: Artifact, reference: nn.Module) -> None:
    """Compare every graph at every setting that fits the model."""
    if not artifact.generation:
        _check_model(check, artifact, reference)
        return
    positions = position_limit(reference)
    for setting in (*SETTINGS, LONG):
        if setting.tokens + _DECODE_STEPS <= positions:
            _check_cache(check, artifact, reference, setting)


@dataclass
class _Check:
    """Collects the error of every setting; raises at the first that is too large.

    An error is the largest difference; where outputs are small, as a share of the largest one expected.
    """

    dtype: str
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, where: str, actual: Tensor, expected: Tensor, attended: Tensor | None = None) -> None:
        """Record the largest difference of two outputs of one shape, on attended positions (batch, tokens) only."""
        if actual.shape != expected.shape:
            raise ParityFailed(
                f"{where}: ONNX Runtime returns shape {tuple(actual.shape)}, PyTorch {tuple(expected.shape)}; the "
                f"export fixed an axis that varies, or dropped an output: lower again with a larger example batch"
            )
        actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
        if attended is not None:
            actual, expected = actual[attended], expected[attended]
        if not bool(torch.isfinite(actual).all()):
            raise ParityFailed(
                f"{where}: {int((~torch.isfinite(actual)).sum())} of {actual.numel()} values from ONNX Runtime are "
                f"not finite; an activation overflows {self.dtype}: lower in float32, or in bfloat16 on CUDA"
            )
        error = self._error(actual, expected) if actual.numel() else 0.0
        self.errors[where] = max(error, self.errors.get(where, 0.0))
        if not error <= self.tolerance:
            raise ParityFailed(self._message(where, actual, expected, error))

    def _error(self, actual: Tensor, expected: Tensor) -> float:
        return float((actual - expected).abs().max()) / self._unit(expected)

    @staticmethod
    def _unit(expected: Tensor) -> float:
        """What differences are counted in: 1, or the largest value expected where that is smaller."""
        return min(1.0, max(float(expected.abs().max()), SMALLEST_UNIT))

    def _message(self, where: str, actual: Tensor, expected: Tensor, error: float) -> str:
        difference = (actual - expected).abs()
        worst = np.unravel_index(int(difference.nan_to_num(math.inf).argmax()), tuple(difference.shape))
        unit = self._unit(expected)
        counted = "" if unit == 1.0 else f" of the largest output ({unit:.3g})"
        return (
            f"{where}: ONNX Runtime gives {float(actual[worst]):.6g}, PyTorch {float(expected[worst]):.6g} at "
            f"{tuple(int(index) for index in worst)}; they differ by {error:.3g}{counted}, the tolerance for "
            f"{self.dtype} is {self.tolerance:.3g}: lower in a wider type, or pass a larger tolerance if this is "
            f"acceptable"
        )

    def parity(self) -> Parity:
        return Parity(self.dtype, self.tolerance, dict(self.errors))


class _DistanceCheck(_Check):
    """The same by the outputs' distance, as a share of the expected output's length."""

    def _error(self, actual: Tensor, expected: Tensor) -> float:
        return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))

    def _message(self, where: str, actual: Tensor, expected: Tensor, error: float) -> str:
        return (
            f"{where}: with the inputs of quantised GEMMs rounded to int8, ONNX Runtime's output is {error:.1%} of "
            f"its length from PyTorch's, the tolerance is {self.tolerance:.0%}: the model does not stand that "
            f"rounding; export it without quantize"
        )


# ── Generative exports ───────────────────────────────────────────────────────────────────────────────────────────


def _check_cache(check: _Check, artifact: Artifact, reference: nn.Module, setting: Setting) -> None:
    """Prefill, then some steps behind the cache, both sides fed PyTorch's own tokens."""
    input_ids = random_tokens(reference, setting.batch, setting.tokens)
    mask = attention_mask(setting)
    # torch's argmax feeds both sides, so that one near-tie does not make all later steps incomparable.
    expected = _torch_step(reference, input_ids, mask, None)
    actual = artifact.prefill(input_ids, mask)
    check.compare(f"prefill {setting}", actual.logits, expected.logits[:, -1:])
    fixed = None
    if artifact.fixed_cache_refusal is None:
        fixed = FixedCache(artifact, actual.past_key_values, setting.tokens + _DECODE_STEPS)
    for _ in range(_DECODE_STEPS):
        following = expected.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        expected = _torch_step(reference, following, mask, expected.past_key_values)
        actual = artifact.decode(following, mask, actual.past_key_values)
        check.compare(f"decode {setting}", actual.logits, expected.logits)
        if fixed is not None:
            check.compare(f"decode {setting}, cache of fixed size", fixed.decode(following, mask), expected.logits)


def _torch_step(reference: nn.Module, input_ids: Tensor, mask: Tensor, past_key_values: Any) -> Any:
    return reference(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -input_ids.shape[1] :],
        past_key_values=past_key_values,
        use_cache=True,
    )


def _check_greedy(
    check: _Check,
    artifact: Artifact,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    exact: bool,
) -> int:
    """Continue every prompt alone, then all in one left-padded batch. Returns how many came out identical.

    Half types, and exports that are not `exact`, may break a near-tie differently than the float32 reference: they
    are counted, not refused.
    """
    alone = [(f"prompt {index}", [prompt]) for index, prompt in enumerate(prompts)]
    identical = 0
    for where, batch in (*alone, ("left-padded batch, prompt", prompts)):
        input_ids, mask = left_padded(batch)
        expected = _torch_greedy(reference, input_ids, mask, new_tokens)
        actual = artifact.generate(input_ids, mask, max_new_tokens=new_tokens)[:, input_ids.shape[1] :]
        for row in range(len(batch)):
            same = torch.equal(actual[row], expected[row])
            identical += same
            if not same and exact and check.dtype == "float32":
                name = where if len(batch) == 1 else f"{where} {row}"
                raise ParityFailed(_greedy_difference(name, actual[row], expected[row], check))
    return identical


def _greedy_difference(where: str, actual: Tensor, expected: Tensor, check: _Check) -> str:
    step = int((actual != expected).nonzero()[0])
    return (
        f"greedy generation, {where}: token {step} is {int(actual[step])} in ONNX Runtime and {int(expected[step])} "
        f"in PyTorch, though logits agree within {max(check.errors.values()):.3g}; if the two tokens are nearly tied "
        f"pass other prompts, else the decode graph or its cache is wrong"
    )


def _torch_greedy(reference: nn.Module, input_ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    """The model's own `generate`, greedy, never ending early. Returns (batch, new_tokens)."""
    from transformers import GenerationConfig

    # On the model, not only in the call: `generate` fills what a passed config leaves None, the end token among it,
    # from the model's own.
    reference.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    generated = reference.generate(input_ids=input_ids, attention_mask=mask)  # type: ignore[operator]
    return generated[:, input_ids.shape[1] :]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length as (input_ids, attention_mask), each (batch, longest), padded on the left with 0."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, mask


def default_prompts(model: nn.Module) -> list[list[int]]:
    """Eight prompts of unequal length, always the same tokens for one vocabulary size."""
    longest = max(2, position_limit(model) // 2)
    return [random_tokens(model, 1, min(length, longest), seed=length)[0].tolist() for length in _PROMPT_LENGTHS]


def random_tokens(model: nn.Module, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """(batch, tokens) token ids, drawn evenly from the vocabulary."""
    size = int(_text_config(model).vocab_size)
    return torch.randint(0, size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def attention_mask(setting: Setting) -> Tensor:
    """(batch, tokens) of ones; where padded, row i misses its first i + 1 tokens, a quarter of them at most."""
    mask = torch.ones(setting.batch, setting.tokens, dtype=torch.int64)
    if setting.padded:
        for row in range(setting.batch):
            mask[row, : min(row + 1, setting.tokens // 4)] = 0
    return mask


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def _allowed_new_tokens(new_tokens: int, prompts: Sequence[Sequence[int]], reference: nn.Module) -> int:
    positions, vocabulary = position_limit(reference), int(_text_config(reference).vocab_size)
    if not prompts or any(len(prompt) < 1 for prompt in prompts):
        raise BadInput(f"verification needs prompts of at least one token, got lengths {[len(p) for p in prompts]}")
    longest = max(len(prompt) for prompt in prompts)
    if longest >= positions:
        raise BadInput(f"the longest prompt has {longest} tokens, the model {positions} positions; shorten it")
    largest = max(max(prompt) for prompt in prompts)
    if largest >= vocabulary:
        raise BadInput(f"a prompt holds token {largest}, the vocabulary has {vocabulary}; use its own tokenizer")
    return min(new_tokens, positions - longest)


# ── Exports of one graph ─────────────────────────────────────────────────────────────────────────────────────────


def _check_model(check: _Check, artifact: Artifact, reference: nn.Module) -> None:
    specs = artifact.inputs
    is_hugging_face = artifact.manifest["graphs"]["model"]["metadata"] is not None
    if is_hugging_face:
        reference.config.use_cache = False  # type: ignore[union-attr]  # The one graph has no cache outputs.
    for setting in _distinct_settings(specs, reference):
        inputs = {spec.name: example_like(spec, specs, setting) for spec in specs}
        cast = {name: _cast_floats(value, artifact.dtype) for name, value in inputs.items()}
        expected = _named_outputs(_call(reference, inputs, is_hugging_face), is_hugging_face)
        if is_hugging_face:
            actual = _named_outputs(artifact.runner("model")(**cast), is_hugging_face)
        else:
            actual = run_session(artifact.session("model"), cast)
        if len(actual) != len(expected):
            raise ParityFailed(
                f"model {setting}: ONNX Runtime returns {len(actual)} outputs ({', '.join(actual)}), PyTorch "
                f"{len(expected)} ({', '.join(expected)}); the export dropped or added one"
            )
        for (name, value), wanted in zip(actual.items(), expected.values(), strict=True):
            attended = _attended_positions(inputs, wanted)
            check.compare(f"model {setting}, {name}", value, wanted, attended)


def run_session(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a graph on the inputs it kept (an exporter drops those it does not read). Output name -> tensor."""
    feed = {spec.name: inputs[spec.name].numpy() for spec in session.get_inputs()}
    names = [spec.name for spec in session.get_outputs()]
    values = session.run(names, feed)
    return {name: torch.from_numpy(np.array(value)) for name, value in zip(names, values, strict=True)}


def example_like(spec: InputSpec, specs: Sequence[InputSpec], setting: Setting) -> Tensor:
    """An input of the spec's kind at another batch and length.

    Axis 0 varies as the batch and axis 1 as the tokens, where they are dynamic; an axis 1 that differs in size from
    the first input's is another quantity and stays.
    """
    shape = list(spec.shape)
    if 0 in spec.dynamic:
        shape[0] = setting.batch
    if spec.varies_with_tokens(specs[0]):
        shape[1] = setting.tokens
    if spec.name == "attention_mask" and len(shape) == 2:
        return attention_mask(Setting(shape[0], shape[1], setting.padded)).to(getattr(torch, spec.dtype))
    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator().manual_seed(len(spec.name))
    if dtype == torch.bool:
        if spec.low == spec.high:
            return torch.full(shape, bool(spec.low))
        drawn = torch.rand(shape, generator=generator) < TRUE_SHARE
        if drawn.dim() > 1 and drawn.shape[1] > 1:
            drawn[:, 0] = False  # a mask that hides all of a sequence leaves nothing to compare
        return drawn
    if dtype.is_floating_point:
        return (spec.low + (spec.high - spec.low) * torch.rand(shape, generator=generator)).to(dtype)
    return torch.randint(int(spec.low), int(spec.high) + 1, shape, generator=generator, dtype=dtype)


def _distinct_settings(specs: Sequence[InputSpec], reference: nn.Module) -> list[Setting]:
    """The settings that differ for these inputs and fit the model: without a token axis, only the batches do."""
    positions = position_limit(reference)
    if not any(spec.varies_with_tokens(specs[0]) for spec in specs):
        tokens = specs[0].shape[1] if len(specs[0].shape) > 1 else 1
        return [Setting(batch, tokens) for batch in sorted({setting.batch for setting in SETTINGS})]
    padded = any(spec.name == "attention_mask" for spec in specs)
    first = specs[0]
    if len(first.shape) == 2 and getattr(torch, first.dtype).is_floating_point:
        samples = first.shape[1]  # of a signal, which models take in windows: a few of them are none
        return [Setting(1, samples), Setting(2, samples + samples // 3), Setting(3, 2 * samples)]
    return [setting for setting in SETTINGS if setting.tokens <= positions and (padded or not setting.padded)]


def _call(reference: nn.Module, inputs: Mapping[str, Tensor], by_keyword: bool) -> Any:
    inputs = {name: _cast_floats(value, "float32") for name, value in inputs.items()}
    by_keyword = by_keyword or not binds_by_position(reference, list(inputs))
    return reference(**inputs) if by_keyword else reference(*inputs.values())


def _named_outputs(output: Any, is_hugging_face: bool) -> dict[str, Tensor]:
    if is_hugging_face:
        from transformers.exporters.utils import get_leaf_tensors

        return get_leaf_tensors(output)
    leaves = torch.utils._pytree.tree_leaves(output)
    return {f"output {index}": leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _attended_positions(inputs: Mapping[str, Tensor], output: Tensor) -> Tensor | None:
    """(batch, tokens) booleans where the output has those axes in front and a mask says which count, else None."""
    mask = None if DECODER_INPUT in inputs else inputs.get("attention_mask")  # outputs of two sides: none hides any
    if mask is None or output.ndim < 2 or output.shape[:2] != mask.shape:
        return None
    return mask.bool()


def _cast_floats(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


# ── Shared with lower ────────────────────────────────────────────────────────────────────────────────────────────


def cast_copy(tree: nn.Module, dtype: str, compute_dtype: str | None = None) -> nn.Module:
    """A structural copy on the CPU in evaluation mode, its parameters rounded to `dtype`, held in `compute_dtype`.

    Memory is shared where no cast is needed; tied parameters stay tied. Saved floating buffers are cast with the
    parameters; unsaved ones (rotary frequencies) are constants that the model computes in a type of its own choice.
    """
    rounded, held = getattr(torch, dtype), getattr(torch, compute_dtype or dtype)
    saved = set(tree.state_dict(keep_vars=True))
    memo: dict[int, Any] = {}
    for parameter in tree.parameters():
        value = parameter.detach().cpu()
        if value.is_floating_point():
            value = value.to(rounded).to(held)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for name, buffer in tree.named_buffers():
        is_cast = buffer.is_floating_point() and name in saved
        memo[id(buffer)] = buffer.cpu().to(rounded).to(held) if is_cast else buffer.cpu()
    copied = copy.deepcopy(tree, memo)
    for module in copied.modules():
        module.training = False  # Not eval(): traced graph modules refuse it.
    return copied


@contextmanager
def without_fused_encoder_layers() -> Iterator[None]:
    """`nn.TransformerEncoderLayer` runs one fused kernel in evaluation mode, which no exporter knows and which reads
    the weights past any module that replaced a projection."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
