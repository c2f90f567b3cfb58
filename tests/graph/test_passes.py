"""Each pass: applies; leaves others alone and says why; is unmodified the second time; keeps outputs, metadata and
its input. And the driver catches a pass that breaks its word."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from blora_compiler.passes import (
    FinishFolding,
    FoldToDense,
    FoldToFactors,
    InsertBranches,
    PassResult,
    RemoveBranches,
)

from blora_compiler.errors import BadInput, GraphInvalid, ParityFailed
from blora_compiler.graph import Level, Program, bind, install, main_output, view_distance
from blora_compiler.layers import BranchedLinear, DenseLinear, FactoredLinear, RemovedBranch
from blora_compiler.profiling import profile
from blora_compiler.rewriting import check_fresh_trace, fold, insert, rewrite, settle, starting_factors
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.models import MODELS, build, example_inputs


def planned(name: str) -> tuple[Program, dict, object]:
    """A traced model, and forms of every kind that it allows."""
    program = trace(build(name), example_inputs(name))
    forms = {s.name: Factored(max(1, s.break_even_rank // 2)) for s in program.sites if s.kind != "head"}
    branches = list(dict.fromkeys(s.branch for s in program.sites if s.branch))
    for site in program.sites:
        if branches and site.branch in (branches[0], branches[-1]):
            forms[site.name] = Removed()
    factored = [site for site, form in forms.items() if isinstance(form, Factored)]
    if len(factored) > 1:
        forms[factored[0]] = Dense()
    return program, forms, profile(program, [], kind="plain")


def outputs(program: Program) -> torch.Tensor:
    with torch.no_grad():
        return main_output(program.call_graph(program.inputs))


def printed(program: Program) -> str:
    return str(program.graph.graph)


@pytest.mark.parametrize("name", MODELS)
def test_insert_keeps_outputs_and_its_input(name):
    program, forms, profiled = planned(name)
    before, code = outputs(program), printed(program)
    result = InsertBranches(forms, starting_factors(program.sites, forms, profiled)).run(program)
    assert result.modified
    assert printed(program) == code
    expected = {s for s, form in forms.items() if isinstance(form, Factored)}
    assert set(result.changed) == expected
    assert {r.site for r in result.refusals} == {s.name for s in program.sites} - expected
    torch.testing.assert_close(outputs(result.program), before, atol=1e-4 * float(before.abs().max()), rtol=0)
    assert view_distance(result.program) == 0
    for site in expected:
        module = result.program.tree.get_submodule(site)
        assert isinstance(module, BranchedLinear)
        assert result.program.graph.get_submodule(site) is module


def test_insert_says_why_it_skips():
    program, forms, profiled = planned("llama")
    del forms["model.layers.0.mlp.up_proj"]
    starts = starting_factors(program.sites, forms, profiled)
    starts["model.layers.1.self_attn.k_proj"] = starts["model.layers.1.self_attn.v_proj"] = (
        torch.zeros(3, 64),
        torch.zeros(32, 3),
    )
    reasons = {r.site: r.reason for r in InsertBranches(forms, starts).run(program).refusals}
    assert reasons["lm_head"] == reasons["model.layers.0.mlp.up_proj"] == "is excluded from the plan"
    assert reasons["model.layers.0.self_attn.q_proj"] == "its branch model.layers.0.self_attn is removed as a whole"
    assert "starting factors have rank 3, but the plan says rank" in reasons["model.layers.1.self_attn.v_proj"]
    assert reasons["model.layers.0.mlp.gate_proj"] == "is planned dense"
    assert (
        "has no starting factors for rank"
        in {r.site: r.reason for r in InsertBranches(forms, {}).run(program).refusals}[
            "model.layers.1.self_attn.o_proj"
        ]
    )


def test_only_branches_norms_and_biases_train_and_the_teacher_keeps_its_own():
    model = build("gpt2")
    program = trace(model)
    forms = {s.name: Factored(8) for s in program.sites if s.kind != "head"}
    branched, _ = insert(program, forms, profile(program, [], kind="plain"))
    trainable = {n for n, p in branched.tree.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trainable} == {"A", "B", "gates", "bias", "weight"}
    assert all(".ln_" in n or n.startswith("transformer.ln_f") for n in trainable if n.endswith(".weight"))
    shared = {p.data_ptr() for p in model.parameters()}
    for name, parameter in branched.tree.named_parameters():
        assert (parameter.data_ptr() in shared) == (name not in trainable and not name.endswith("retention"))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_branch_from_both_views(name):
    program, forms, profiled = planned(name)
    branched, _ = insert(program, forms, profiled)
    site = next(s for s, form in forms.items() if isinstance(form, Factored))
    branch = branched.tree.get_submodule(site)
    for call in (branched.call_graph, branched.call_tree):
        branch.B.grad = None
        main_output(call(branched.inputs)).square().sum().backward()
        assert branch.B.grad.abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way_from_traced_to_folded(name):
    program, forms, profiled = planned(name)
    branched, _ = insert(program, forms, profiled, dense_branch_rank=4)
    settled = settle(branched, forms)
    folded, results = fold(settled, forms)
    assert folded.level == Level.FOLDED
    scale = float(outputs(settled).abs().max())
    torch.testing.assert_close(outputs(folded), outputs(settled), atol=1e-5 * scale, rtol=0)
    assert view_distance(folded) == 0
    kinds = {"dense": DenseLinear, "rank": FactoredLinear}
    for site, form in forms.items():
        if not isinstance(form, Removed):
            assert isinstance(folded.form_module(site), kinds[str(form).split()[0]])
    assert not any(isinstance(m, BranchedLinear) for m in folded.tree.modules())
    reasons = {Factored: "has no trainable branch to fold", Dense: "is dense already"}
    for step, kind in ((FoldToFactors(forms), Factored), (FoldToDense(forms), Dense)):
        once = step.run(settled)
        again = step.run(once.program)
        sites = [s.name for s in program.sites if isinstance(forms.get(s.name), kind)]
        assert (once.modified, again.modified) == (bool(sites), False)
        assert {(r.site, r.reason) for r in again.refusals} == {(site, reasons[kind]) for site in sites}
    with pytest.raises(GraphInvalid, match="FinishFolding takes level BRANCHED, and got FOLDED"):
        rewrite(folded, [FinishFolding()])
    assert [name for name, _ in results] == ["FoldToFactors", "FoldToDense", "FinishFolding"]


def test_folding_a_trained_branch_multiplies_gates_and_retention_in():
    program, forms, profiled = planned("llama")
    branched, _ = insert(program, forms, profiled, dense_branch_rank=4)
    for module in branched.tree.modules():
        if isinstance(module, BranchedLinear):
            with torch.no_grad():
                module.gates.uniform_(0.5, 1.5)
                module.A.mul_(1.1)
    dense = next(s for s, form in forms.items() if form == Dense())
    with torch.no_grad():
        branched.tree.get_submodule(dense).retention.fill_(0.75)
    settled = settle(branched, forms)
    folded, _ = fold(settled, forms)
    torch.testing.assert_close(outputs(folded), outputs(settled), atol=1e-5, rtol=1e-4)
    assert branched.tree.get_submodule(dense).A.requires_grad, "folding must not freeze the branch it read"


def test_a_site_with_retention_left_does_not_fold_to_factors():
    program, forms, profiled = planned("llama")
    branched, _ = insert(program, forms, profiled)
    result = FoldToFactors(forms).run(branched)
    assert not result.modified
    assert (
        "its dense part still has retention 1, and only 0 folds to factors; train to the end"
        in result.refusals[0].reason
    )
    with pytest.raises(BadInput, match=r"not every site folds: .*retention 1"):
        fold(branched, forms)
    assert not FinishFolding().run(branched).modified


def test_removal_drops_the_branch_and_its_work_but_keeps_the_cache_length():
    model = build("llama")
    program = trace(model)
    forms = {
        s.name: Removed() if s.branch == "model.layers.0.self_attn" else Dense() for s in program.sites if s.branch
    }
    before, code = outputs(program), printed(program)
    RemoveBranches(forms).run(program)
    assert printed(program) == code
    assert torch.equal(main_output(program.call_tree(program.inputs)), before)
    branched, results = insert(program, forms, profile(program, [], kind="plain"))
    assert dict(results)["RemoveBranches"].changed == ("model.layers.0.self_attn",)
    assert isinstance(branched.tree.get_submodule("model.layers.0.self_attn"), RemovedBranch)
    attention = [n for n in branched.graph.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(attention) == 1
    again = RemoveBranches(forms).run(branched)
    assert not again.modified
    assert again.refusals[0].reason == "is removed already"
    tree, ids = branched.tree, torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        step = tree.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        whole = ids
        for _ in range(8):
            whole = torch.cat([whole, tree(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(step, whole)


def test_removal_of_half_a_branch_is_refused():
    program = trace(build("llama"))
    forms = {s.name: Dense() for s in program.sites if s.branch} | {"model.layers.0.mlp.up_proj": Removed()}
    with pytest.raises(
        BadInput, match=r"layers.0.mlp.gate_proj is not planned removed, and a branch goes as a whole"
    ):
        insert(program, forms, profile(program, [], kind="plain"))


def test_removal_where_no_single_module_is_the_branch_is_refused():
    program = trace(build("bert"))
    with pytest.raises(BadInput, match="belongs to no branch that can be removed as one module"):
        insert(program, {program.sites[0].name: Removed()}, profile(program, [], kind="plain"))


# ── The driver catches passes that break their word ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Broken:
    """A pass that does `damage` to a copy of the program."""

    damage: object
    takes: Level = Level.TRACED
    gives: Level = Level.TRACED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        copy = program.copy()
        return PassResult(self.damage(copy) or copy, True)


def two_instances(program: Program) -> Program:
    program = replace(program, level=Level.BRANCHED)
    site = program.sites[0]
    module = DenseLinear(program.graph.get_parameter(site.weight).detach().clone(), None)
    install(program, site, module)
    program.tree.set_submodule(site.name, DenseLinear(module.weight.detach().clone(), None))
    return program


def wrong_level(program: Program) -> None:
    site = program.sites[0]
    install(program, site, DenseLinear(program.graph.get_parameter(site.weight).detach().clone(), None))


def no_metadata(program: Program) -> None:
    node = next(n for n in program.graph.graph.nodes if n.op == "call_function")
    del node.meta["val"]


def changed_weight(program: Program) -> Program:
    program = replace(program, level=Level.BRANCHED)
    site = program.sites[0]
    install(program, site, DenseLinear(2 * program.graph.get_parameter(site.weight).detach(), None))
    return program


def changed_tree(program: Program) -> None:
    program.tree.model.norm.weight = torch.nn.Parameter(2 * program.tree.model.norm.weight.detach())


def raised_level(program: Program) -> Program:
    return replace(program, level=Level.FOLDED)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (two_instances, GraphInvalid, r"level BRANCHED after Broken: node .*another instance in the module tree"),
        (wrong_level, GraphInvalid, r"level TRACED after Broken: node .*calls a DenseLinear, .*allows no modules"),
        (no_metadata, GraphInvalid, r"after Broken: node .*has no recorded shape and dtype"),
        (changed_weight, ParityFailed, r"Broken must preserve outputs, and changed them by"),
        (changed_tree, ParityFailed, r"after Broken the graph and the module tree differ by \S+, above"),
        (raised_level, GraphInvalid, r"Broken gives level TRACED, and left FOLDED"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_caught(damage, error, message):
    with pytest.raises(error, match=message):
        rewrite(trace(build("llama")), [Broken(damage)])


def test_a_folded_tree_that_is_not_its_graph_is_caught():
    program, forms, profiled = planned("llama")
    branched, _ = insert(program, forms, profiled)
    folded, _ = fold(settle(branched, forms), forms)
    name, form = next((name, form) for name, form in forms.items() if isinstance(form, Factored))
    another = {**forms, name: Factored(form.rank + 1)}
    with pytest.raises(ParityFailed, match=rf"{name}: a fresh trace finds GEMMs .*\.A.*, the plan says .*\.A"):
        check_fresh_trace(folded, another)
    changed_tree(folded)
    with pytest.raises(ParityFailed, match=r"a fresh trace of the folded tree differs by \S+, above"):
        check_fresh_trace(folded, forms)


def test_a_pass_on_the_wrong_level_is_caught():
    with pytest.raises(GraphInvalid, match="FoldToDense takes level BRANCHED, and got TRACED"):
        rewrite(trace(build("llama")), [FoldToDense({})])


def test_binding_again_brings_a_moved_tree_back_into_the_graph():
    program, forms, profiled = planned("llama")
    branched, _ = insert(program, forms, profiled)
    branched.tree.double()
    bind(branched)
    assert view_distance(branched) < 1e-6  # the tree asks for its own dtype where the graph has float32 baked in
    assert {p.dtype for p in branched.graph.parameters()} == {torch.float64}
