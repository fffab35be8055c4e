"""The benchmark counts FLOPs as XLA does, compares like with like, and its claims hold in small."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import cost, flops
from benchmarks.measure import check_agreement
from benchmarks.model import STRUCTURES, Config
from benchmarks.variants import NAMES, build


def compiled(function, *shapes):
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*operands).compile()


def counted(function, *shapes):
    return flops.count(compiled(function, *shapes).as_text())


def conv(x, w, **options):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", **options)


MATMUL = 2 * 16 * 32 * 64
CONTRACTIONS = {
    "matmul": (jnp.dot, ((16, 32), (32, 64)), MATMUL),
    "transposed": (lambda x, w: (w.T @ x.T).T, ((16, 32), (32, 64)), MATMUL),
    "batched": (jnp.matmul, ((5, 16, 32), (5, 32, 64)), 5 * MATMUL),
    "two_contracted": (
        lambda x, w: jnp.tensordot(x, w, 2), ((16, 4, 8), (4, 8, 64)), MATMUL
    ),
    "convolution": (conv, ((2, 3, 9, 9), (4, 3, 2, 2)), 2 * (2 * 4 * 8 * 8) * (3 * 2 * 2)),
    "grouped_convolution": (
        lambda x, w: conv(x, w, feature_group_count=2),
        ((2, 6, 9, 9), (4, 3, 2, 2)),
        2 * (2 * 4 * 8 * 8) * (3 * 2 * 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "shapes", "wanted"), CONTRACTIONS.values(), ids=CONTRACTIONS)
def test_contractions_cost_two_operations_for_each_multiply_add(function, shapes, wanted):
    assert counted(function, *shapes) == wanted


def squarings(length):
    return lambda x: lax.scan(lambda x, _: (x @ x, None), x, None, length)[0]


SQUARE = 2 * 16**3
LOOPS = {
    "scan": (squarings(7), 7),
    "nested_scan": (lambda x: lax.scan(lambda x, _: (squarings(3)(x), None), x, None, 5)[0], 15),
    "fori_loop": (lambda x: lax.fori_loop(2, 11, lambda _, x: x @ x, x), 9),
    "gradient_of_scan": (jax.grad(lambda x: squarings(4)(x).sum()), 4 + 2 * 4),
    "cond": (lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
}


@pytest.mark.parametrize(("function", "squares"), LOOPS.values(), ids=LOOPS)
def test_loop_bodies_count_as_often_as_they_run(function, squares):
    total = counted(function, (16, 16))
    assert squares * SQUARE <= total <= 1.1 * squares * SQUARE  # the rest: counters, additions


def test_a_loop_without_a_known_trip_count_is_refused():
    halve = lambda x: lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)
    with pytest.raises(ValueError, match="no trip count"):
        counted(halve, (4,))


@pytest.mark.optimized
def test_without_loops_the_count_is_that_of_xla():
    config = Config(layers=1, width=16, head_dim=8)
    variants = build(config, "every kernel", rank=2, batch=2, length=8, abstract=True)
    step = variants["handwritten"]
    program = jax.jit(step.step).lower(*step.operands).compile()
    assert flops.count(program.as_text()) == pytest.approx(
        program.cost_analysis()["flops"], rel=1e-3
    )


def test_cublas_calls_are_counted_by_their_dimension_numbers():
    hlo = """\
HloModule jit_f

ENTRY %main.4 (a.1: f32[16,32], b.1: f32[32,64]) -> f32[16,64] {
  %a.1 = f32[16,32]{1,0} parameter(0), metadata={op_name="a"}
  %b.1 = f32[32,64]{1,0} parameter(1), metadata={op_name="b"}
  %cublas-gemm.1.0 = (f32[16,64]{1,0}, s8[4194304]{0}) custom-call(%a.1, %b.1), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot_general"}, \
backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  ROOT %get-tuple-element.1 = f32[16,64]{1,0} get-tuple-element(%cublas-gemm.1.0), index=0
}
"""
    assert flops.count(hlo) == MATMUL


@pytest.mark.optimized
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_wrapped_step_needs_no_more_flops_and_memory_than_the_hand_written_one(structure):
    config = Config(structure=structure, layers=2, width=64, head_dim=32)
    variants = build(config, "every kernel", rank=4, batch=4, length=32, abstract=True)

    def needs(name):
        program = jax.jit(variants[name].step).lower(*variants[name].operands).compile()
        return flops.count(program.as_text()), program.memory_analysis().temp_size_in_bytes

    (lorax_flops, lorax_bytes), (hand_flops, hand_bytes) = needs("lorax_fn"), needs("handwritten")
    assert lorax_flops <= 1.01 * hand_flops
    assert lorax_bytes <= 1.01 * hand_bytes


@pytest.mark.optimized
@pytest.mark.parametrize("structure", ["plain", "remat"])
def test_a_dora_step_needs_hardly_more_flops_than_a_lora_step(structure):
    config = Config(structure=structure, layers=2)
    variants = build(config, "every kernel", rank=8, batch=8, length=128, abstract=True)

    def needs(name):
        program = jax.jit(variants[name].step).lower(*variants[name].operands).compile()
        return flops.count(program.as_text())

    # The magnitude's gradient needs each output, so remat has to compute the last ones again.
    bound = 1.15 if structure == "remat" else 1.05
    assert needs("dora") <= bound * needs("lorax_fn")


def test_smoke_run_reports_every_variant_from_the_same_loss(tmp_path, capsys):
    path = tmp_path / "cost.json"
    cost.main(["--smoke", "--json", str(path)])
    table = capsys.readouterr().out
    report = json.loads(path.read_text())
    ((_, costs),) = report["costs"].items()
    assert tuple(costs) == NAMES
    for name, figures in costs.items():
        assert f"\n{name} " in table
        assert figures["loss"] == pytest.approx(costs["handwritten"]["loss"], abs=1e-4)
        assert figures["step"] > 0
        assert figures["flops"] > costs["floor"]["flops"] or name == "floor"
    assert costs["handwritten"]["step_ratio"] == 1
    assert report["tracing"]["2"]["lorax_fn"] > 0


def test_variants_that_compute_different_things_are_not_compared():
    losses = {"handwritten": (1.0, 0.9), "lorax_fn": (1.0, 0.9), "added_up": (1.0, 0.95)}
    with pytest.raises(ValueError, match=r"added_up has loss 0\.95.* after 1 step"):
        check_agreement(losses, tolerance=1e-4)
