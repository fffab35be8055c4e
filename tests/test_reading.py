"""How things read: the repr of rules, factors and reports, treescope, and help()."""

import dataclasses
import inspect
import pydoc

import jax
import jax.numpy as jnp
import pytest
import treescope

import lorax_fn as lora
from lorax_fn.adapters.base import Adapter, Rule

PARAMS = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
RULES = [lora.LoRA("w", rank=2, alpha=4), lora.Full("b")]


def made(*rules):
    return lora.init(jax.random.key(0), PARAMS, rules)


def test_factors_show_shapes_and_no_numbers():
    text = repr(made(*RULES))
    assert text == (
        "{'b': FullDelta(delta=float32[4]), 'w': LoRAFactors(a=float32[8,2], b=float32[2,4], "
        "scale=2.0, axes=Axes(batch=(), contract=(0,), out=(1,)), dropout=0.0)}"
    )


def test_what_is_not_at_its_default_is_shown():
    node = made(lora.LoRA("w", rank=1, alpha=3, init="olora", freeze_a=True))["w"]
    assert "freeze_a=True" in repr(node)
    assert "start=(float32[8,1], float32[1,4])" in repr(node)


def test_factors_without_arrays_can_be_shown():
    node = made(*RULES)["w"]
    assert "a=float32[8,2]" in repr(jax.eval_shape(lambda: node))
    assert "a=True, b=True" in repr(node.trainable())
    assert "a=None" in repr(jax.tree.map(lambda _: None, node))
    assert "a=float32[3,8,2]" in repr(lora.stack([made(*RULES)] * 3)["w"])


def test_a_traced_node_can_be_shown():
    shown = []
    jax.jit(lambda node: shown.append(repr(node)))(made(*RULES)["w"])
    assert "a=float32[8,2]" in shown[0]


@pytest.mark.parametrize(
    ("rule", "shown"),
    [
        (lora.LoRA(["query"]), "LoRA(['query'])"),
        (lora.LoRA(r".*/w", rank=2, alpha=4), "LoRA('.*/w', rank=2, alpha=4)"),
        (lora.LoRA("w", dtype=jnp.bfloat16), "LoRA('w', dtype=bfloat16)"),
        (lora.DoRA("w", rank=3, exclude=["x"]), "DoRA('w', rank=3, exclude=['x'])"),
        (lora.Full(r".*"), "Full('.*')"),
        (lora.Frozen(["w"]), "Frozen(['w'])"),
    ],
)
def test_a_rule_shows_the_call_that_makes_it(rule, shown):
    assert repr(rule) == shown


def test_every_kind_has_this_repr():
    for base in (Rule, Adapter):
        kinds = [kind for kind in base.__subclasses__() if kind.__module__.startswith("lorax_fn")]
        assert len(kinds) >= 3
        assert all(kind.__repr__ is base.__repr__ for kind in kinds)


def test_a_report_is_a_table_wherever_it_is_shown():
    report = lora.inspect(lambda p, x: x @ p["w"], PARAMS, made(*RULES), jnp.ones((2, 8)))
    assert repr(report) == str(report)
    assert repr(report).startswith("path  shape")
    assert "28 trainable parameters" in repr(report)


def test_treescope_renders_factors():
    text = treescope.render_to_text(made(*RULES))
    assert "LoRAFactors(" in text
    assert "float32(8, 2)" in text
    assert "<script" in treescope.render_to_html(made(*RULES))


@pytest.mark.parametrize("name", lora.__all__)
def test_help_reads_well(name):
    public = getattr(lora, name)
    text = pydoc.render_doc(public, renderer=pydoc.plaintext)
    assert " at 0x" not in text
    summary = inspect.getdoc(public).split("\n")[0]
    assert summary in text
    assert summary.endswith((".", ":")) or ":" in summary
    if dataclasses.is_dataclass(public):
        assert not summary.startswith(f"{name}("), "dataclass wrote the docstring"
