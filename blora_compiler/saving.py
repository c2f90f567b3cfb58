"""Save and load a compressed model: safetensors and JSON only, nothing that could run code.

    folder/model.safetensors    every parameter and buffer of the compressed tree, tied ones once
    folder/blora.json           the plan, the forms installed, and how the model was called
    folder/config.json, ...     for Hugging Face models, as `save_pretrained` writes them; and the tokenizer's files

Pruned shapes differ per layer, which no stock loader understands, so `load` rebuilds the stock model and installs
the same modules the compiler had installed before it reads the weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .errors import BadInput, ParityFailed
from .folders import disk_message, staged_folder
from .graph import Level, Program, call, frozen_copy, install, main_output, output_distance, set_module
from .layers import CacheEntry, DenseLinear, FactoredLinear, RemovedBranch
from .passes.remove_branches import remove_branch
from .plan import Plan
from .source import model_class
from .tracing import is_pretrained, name_inputs, trace
from .values import Removed, Site

if TYPE_CHECKING:
    from .compiling import Compiled

FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "blora.json"
MERGED = "blora-merged.json"  # tells an earlier merged save from any other model's folder


@dataclass(frozen=True)
class Loaded:
    """A compressed model read back from a folder. Calls, and every name not listed here, go to the model itself:
    `loaded(input_ids=...)`, `loaded.generate(...)`.

    Attributes:
        module: computes what was saved; Hugging Face models still have `generate()`.
        plan: as saved.
        inputs: example inputs, by name or (plain modules) by position, as `lower` takes them.
        sites: names of the sites whose modules were installed.
        tokenizer: as saved, or None.
    """

    module: nn.Module
    plan: Plan
    inputs: dict[str, Tensor] | tuple[Tensor, ...]
    sites: tuple[str, ...]
    tokenizer: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these before there is a module
            raise AttributeError(name)
        return getattr(self.module, name)


# ── Saving ───────────────────────────────────────────────────────────────────────────────────────────────────────


def save(compiled: Compiled, folder: Path, *, merged: bool = False) -> Path:
    """Write `compiled` to `folder`; nothing half-written is ever left under that name.

    Raises:
        BadInput: the folder cannot be written to, or holds something else; `merged` for a plain module.
    """
    from safetensors import SafetensorError

    try:
        with staged_folder(folder, marker=MERGED if merged else DESCRIPTION) as staging:
            if merged:
                _save_merged(compiled, staging)
            else:
                _save_compressed(compiled, staging)
            if compiled.source.tokenizer is not None:
                compiled.source.tokenizer.save_pretrained(staging)
    except SafetensorError as error:
        raise BadInput(disk_message(folder, error)) from error
    return folder


def _save_compressed(compiled: Compiled, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors, aliases = unique_tensors(compiled.module)
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "model": compiled.source.name,
        "modules": installed_modules(compiled.program),
        "aliases": aliases,
        "positional": compiled.program.positional,
        "inputs": {name: describe_input(value) for name, value in compiled.program.inputs.items()},
        "plan": json.loads(compiled.plan.to_json()),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if is_pretrained(compiled.module):
        module: Any = compiled.module
        config = copy.deepcopy(module.config)
        config.architectures = [type(module).__name__]  # `load` builds this class; only save_pretrained would say so
        config.save_pretrained(folder)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)


def installed_modules(program: Program) -> dict[str, dict[str, Any]]:
    """Path -> what the compiler put there, in words that `load` can build from."""
    narrowed = {site.name: site for site in program.sites if site.narrowed_from is not None}
    modules: dict[str, dict[str, Any]] = {}
    for path, module in program.tree.named_modules():
        match module:
            case FactoredLinear():
                modules[path] = {"kind": "factored", "rank": module.rank, "bias": module.bias is not None}
                if module.given_from is not None:
                    modules[path]["given_from"] = module.given_from
            case DenseLinear():
                modules[path] = {"kind": "dense", "bias": module.bias is not None}
            case RemovedBranch():
                modules[path] = {
                    "kind": "removed",
                    "outputs": module.outputs,
                    "cache": None if module.cache is None else module.cache._asdict(),
                }
        if path in narrowed and path in modules:
            modules[path]["shape"] = [narrowed[path].out_features, narrowed[path].in_features]
    return modules


def unique_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each stored tensor under its first name, and the other names of tied ones."""
    names: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        # A transposed view of a square weight starts at the same address and is another matrix.
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in names:
            aliases[name] = names[key]
        else:
            names[key] = name
            tensors[name] = tensor.detach().contiguous().clone()
    return tensors, aliases


def describe_input(value: Tensor) -> dict[str, Any]:
    """An example input's shape and dtype as JSON values."""
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _save_merged(compiled: Compiled, folder: Path) -> None:
    """Stock-shaped dense weights: B A for factored sites, zeros for the last site of a removed branch."""
    if not is_pretrained(compiled.module):
        raise BadInput(
            f"merged=True writes a folder for from_pretrained, and {compiled.source.name} is no Hugging Face model"
        )
    merged: Any = frozen_copy(compiled.source.model)
    trained = compiled.module.state_dict()
    state = {name: trained.get(name, tensor) for name, tensor in merged.state_dict().items()}
    untied = False
    for site in compiled.program.sites:
        module = compiled.program.form_module(site.name)
        stays = not isinstance(compiled.plan.forms.get(site.name), Removed)
        if module is None and stays and site.narrowed_from is not None:  # dense, and narrower than the stock one
            module = compiled.module.get_submodule(site.name)
        if not isinstance(module, FactoredLinear | DenseLinear):
            continue
        weight, bias = _filled_up(site.whole, module.weight, module.bias)
        stored_in_by_out = not isinstance(merged.get_submodule(site.name), nn.Linear)
        state[f"{site.name}.weight"] = weight.T if stored_in_by_out else weight
        if bias is not None and site.bias is not None:
            state[site.bias] = bias
        untied |= site.tied
    for branch in [path for path, entry in installed_modules(compiled.program).items() if entry["kind"] == "removed"]:
        last = [site for site in compiled.program.sites if site.branch == branch][-1]
        for path in filter(None, (last.weight, last.bias)):
            state[path] = torch.zeros_like(state[path])
    if untied:
        merged.config.tie_word_embeddings = False
    stock = type(merged)(merged.config).float()
    stock.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()})
    _check_merged(compiled, stock.eval())
    stock.save_pretrained(folder)
    merged_from = {"model": compiled.source.name, "plan": json.loads(compiled.plan.to_json())}
    (folder / MERGED).write_text(json.dumps(merged_from, indent=2) + "\n", encoding="utf-8")


def _filled_up(whole: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The stock shape, with zeros for the channels that an MLP has lost: no column reads what such a row puts out."""
    missing_out, missing_in = whole.out_features - weight.shape[0], whole.in_features - weight.shape[1]
    padded = nn.functional.pad(weight, (0, missing_in, 0, missing_out))
    return padded, None if bias is None else nn.functional.pad(bias, (0, missing_out))


def _check_merged(compiled: Compiled, stock: nn.Module) -> None:
    """Raise ParityFailed unless the stock-shaped model computes what the compressed one does."""
    program = compiled.program
    with torch.no_grad():
        mine = main_output(program.call_tree(program.inputs)).cpu()
        inputs = {name: value.cpu() for name, value in program.inputs.items()}
        distance = output_distance(mine, call(stock, inputs, program.constants, program.positional))
        allowed = 1e-3 * float(mine.abs().max())
    if not distance <= allowed:
        raise ParityFailed(f"the merged model differs from the compressed one by {distance:.3g}, above {allowed:.3g}")


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load(folder: str | Path, model: nn.Module | None = None) -> Loaded:
    """Read back what `Compiled.save` wrote.

    Args:
        model: for plain modules, an instance of the original architecture (its weights are not used): code cannot be
            saved without pickle. Not needed for Hugging Face models.

    Raises:
        BadInput: no saved model there, a damaged file, or a plain module without `model`.
    """
    folder = Path(folder)
    description = _read_description(folder)
    tree = _rebuild(folder, description, model)
    read_weights(folder, tree, description["aliases"])
    tree.eval().requires_grad_(False)
    named = saved_inputs(tree, description)
    return Loaded(
        module=tree,
        plan=Plan.from_json(json.dumps(description["plan"])),
        inputs=tuple(named.values()) if description["positional"] else named,
        sites=tuple(path for path, entry in description["modules"].items() if entry["kind"] != "removed"),
        tokenizer=saved_tokenizer(folder),
    )


def saved_inputs(tree: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Made-up inputs where those are all the saved model was traced with, else inputs of the saved shapes."""
    if is_pretrained(tree):
        with suppress(BadInput):  # models of sound, say: nobody but the caller knows what they take
            made_up, _ = name_inputs(tree, None)
            if made_up.keys() >= description["inputs"].keys():
                return made_up
    return inputs_of_saved_shapes(description)


def inputs_of_saved_shapes(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of the saved shapes: noise, since norms turn constants into zeros; integers that any vocabulary has."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, entry in description["inputs"].items():
        dtype = getattr(torch, entry["dtype"])
        noise = torch.randn(entry["shape"], generator=generator)
        inputs[name] = noise.to(dtype) if dtype.is_floating_point else torch.ones(entry["shape"], dtype=dtype)
    return inputs


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError as error:
        raise BadInput(f"{folder} is a file; name the folder of a saved model") from error
    except FileNotFoundError as error:
        raise BadInput(f"{folder} holds no compressed model: {DESCRIPTION} is missing") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); save the model again") from error
    needed = {"format", "modules", "aliases", "positional", "inputs", "plan"}
    if not isinstance(description, dict) or needed - description.keys():
        raise BadInput(f"{path} lacks {sorted(needed - set(description))}; save the model again")
    if description["format"] != FORMAT:
        raise BadInput(
            f"{path} has format {description['format']}, this version reads {FORMAT}; save the model again"
        )
    return description


def _rebuild(folder: Path, description: Mapping[str, Any], model: nn.Module | None) -> nn.Module:
    if (folder / "config.json").exists():
        return _install_all(stock_model(folder), description["modules"])
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"{folder} holds a plain module ({description['model']}); pass model=an instance of it, "
            f"since its code is not saved"
        )
    inputs = inputs_of_saved_shapes(description)
    # The weights are read into it, in the precision they were trained in; the caller's instance stays as it is.
    model = copy.deepcopy(model).float()
    program = trace(model, tuple(inputs.values()) if description["positional"] else inputs)
    program = Program(**{**vars(program.copy()), "level": Level.FOLDED})
    sites = {site.name: site for site in program.sites}
    for path, entry in description["modules"].items():
        if entry["kind"] == "removed" and program.tree_is_graph:
            remove_branch(program, path, RemovedBranch())
        elif entry["kind"] == "removed":
            set_module(program.tree, path, _empty_module(entry, (0, 0)))
    for path, entry in description["modules"].items():
        if entry["kind"] == "removed":
            continue
        if path not in sites:
            raise BadInput(f"{folder} has a module at {path}, but {type(model).__name__} has sites {list(sites)[:5]}")
        weight = program.tree.get_parameter(sites[path].weight)
        shape = tuple(reversed(weight.shape)) if sites[path].transposed else tuple(weight.shape)
        install(program, sites[path], _empty_module(entry, shape))
    return program.tree


def stock_model(folder: Path) -> nn.Module:
    """The architecture that the folder's config names, float32 and frozen, its weights still to be read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    cls = model_class(str(folder))
    stock: Any = cls(config) if hasattr(cls, "base_model_prefix") else cls.from_config(config)
    if (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        stock.generation_config = GenerationConfig.from_pretrained(folder)
    return frozen_copy(stock).float()


def _install_all(tree: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    for path, entry in modules.items():
        original = tree.get_submodule(path)
        weight = getattr(original, "weight", None)
        shape: tuple[int, ...] = (0, 0)
        if isinstance(weight, Tensor):
            shape = tuple(weight.shape) if isinstance(original, nn.Linear) else tuple(reversed(weight.shape))
        set_module(tree, path, _empty_module(entry, shape))
    return tree


def _empty_module(entry: Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    """The module an entry of `installed_modules` describes, its weights still to be read.

    Args:
        shape: (out, in) of the stock module; an entry of a narrower one says its own.
    """
    out, into = entry.get("shape", shape)
    bias = torch.zeros(out) if entry.get("bias") else None
    match entry["kind"]:
        case "factored":
            rank, given_from = entry["rank"], entry.get("given_from")
            second = out if given_from is None else out - rank
            return FactoredLinear(torch.zeros(rank, into), torch.zeros(second, rank), bias, given_from)
        case "dense":
            return DenseLinear(torch.zeros(out, into), bias)
        case "removed":
            return RemovedBranch(entry["outputs"], _cache_entry(entry))
    raise BadInput(f"unknown module kind {entry['kind']!r} in {DESCRIPTION}; save the model again")


def _cache_entry(entry: Mapping[str, Any]) -> CacheEntry | None:
    """Of a removed branch. Earlier versions wrote heads and one size, beside the layer."""
    if entry.get("cache_shape") is not None:
        heads, size = entry["cache_shape"]
        return CacheEntry(entry["layer_idx"], heads, size, size)
    return None if entry.get("cache") is None else CacheEntry(**entry["cache"])


def read_weights(folder: Path, tree: nn.Module, aliases: Mapping[str, str]) -> None:
    """Read the folder's weights into `tree`, tied ones under all their names.

    Raises:
        BadInput: no such file, a damaged one, or tensors that do not fit the tree.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder / WEIGHTS} cannot be read ({error}); save the model again") from error
    state = tensors | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
    try:
        tree.load_state_dict(state, assign=False)
    except RuntimeError as error:
        raise BadInput(
            f"{folder / WEIGHTS} does not fit {DESCRIPTION}: {str(error).splitlines()[-1].strip()}"
        ) from error
    for alias, name in aliases.items():
        _share_first_factor(tree, alias, name)
    if isinstance(tree, fx.GraphModule):
        tree.recompile()


def _share_first_factor(tree: nn.Module, alias: str, name: str) -> None:
    """Let two sites hold one A again where `alias` and `name` are such; everything else that is tied already is."""
    (path, _, attribute), (first_path, _, first_attribute) = alias.rpartition("."), name.rpartition(".")
    module, first = tree.get_submodule(path), tree.get_submodule(first_path)
    if isinstance(module, FactoredLinear) and isinstance(first, FactoredLinear):
        assert attribute == first_attribute == "A", f"{alias} and {name} are one tensor, and no first factors"
        module.A = first.A


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer in the folder, or None."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
