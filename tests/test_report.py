"""`inspect` and its `Report`."""

import re

import jax
import jax.numpy as jnp
import pytest

import lorax_fn as lora


def apply_fn(params, x):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
    return x @ jnp.sin(params["odd"]) + params["b"][None]


@pytest.fixture
def report():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    params = {"stack": shape(3, 64, 64), "odd": shape(64, 8), "b": shape(8)}
    x = shape(5, 64)
    rules = [lora.LoRA(["stack", "odd"], rank=4, alpha=6), lora.Full("b")]
    axes = lora.infer_axes(apply_fn, params, x)
    factors = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rules, axes=axes))
    return lora.inspect(apply_fn, params, factors, x)


def test_rows_say_how_each_leaf_is_used(report):
    rows = {row.path: row for row in report.rows}
    assert set(rows) == {"stack", "odd", "b"}
    assert rows["stack"].ops == ("dot_general",)
    assert rows["stack"].axes == lora.Axes(batch=(0,), contract=(1,), out=(2,))
    assert (rows["stack"].rank, rows["stack"].params) == (4, 3 * (64 * 4 + 4 * 64))
    assert (rows["b"].kind, rows["b"].params) == ("Full", 8)


def test_dense_lists_what_was_added_up_with_primitive_and_line(report):
    assert report.dense == ["odd"]
    (row,) = [row for row in report.rows if row.dense]
    assert "sin at" in row.dense[0]
    assert "test_report.py" in row.dense[0]


def test_totals_count_parameters_and_flops(report):
    trainable, frozen = 3 * 2 * 64 * 4 + 4 * (64 + 8) + 8, 3 * 64 * 64 + 64 * 8 + 8
    assert (report.totals.trainable, report.totals.frozen) == (trainable, frozen)
    assert report.totals.ratio == trainable / frozen
    base = 2 * 5 * 64 * (3 * 64 + 8)
    low_rank = 2 * 5 * 4 * 3 * (64 + 64)
    added_up = 2 * 64 * 4 * 8
    assert report.totals.base_flops == base
    assert report.totals.adapted_flops == base + low_rank + added_up


def test_prints_an_aligned_table_and_markdown(report):
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["path", "shape", "kind"]
    assert all(line.index("LoRA") == lines[2].index("Full") for line in lines[3:5])
    assert "1 of 3 leaves added up" in lines[-1]


def test_every_line_of_the_markdown_table_has_as_many_cells(report):
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line) for line in table]
    assert len(table) == 5
    assert {len(line) for line in cells} == {len(cells[1])}


def test_keywords_are_the_functions_own():
    """Also those that are called as parameters of `inspect` and `infer_axes` are."""
    params = {"w": jnp.ones((4, 3))}
    apply = lambda p, x, params, factors: x @ p["w"] * params * factors
    given = {"params": jnp.ones(()), "factors": jnp.ones(())}
    axes = lora.infer_axes(apply, params, jnp.ones((2, 4)), **given)
    factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1)], axes=axes)
    x, key = jnp.ones((2, 4)), jax.random.key(0)
    report = lora.inspect(apply, params, factors, x, lora_key=key, **given)
    assert report.rows[0].ops == ("dot_general",)
