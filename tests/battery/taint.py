"""Which inputs of a jaxpr each value depends on, and from that: is anything dense formed?

The claim "nothing dense" is this. Everything that the plain function computes from a weight alone
(its transpose, a slice, a cast, …) is an *image* of the weight. The wrapped function, its gradient
included, must not compute a floating array of the size of the weight or of an image of it out of
the factors (that would be A·B) or out of the cotangent (that would be dW).
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Labels = frozenset[str]
NONE: Labels = frozenset()


def sub_jaxprs(params) -> Iterator[Jaxpr]:
    """Every jaxpr among the parameters of an equation, closed ones opened."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def visit(jaxpr: Jaxpr, labels: list[Labels], see: Callable) -> list[Labels]:
    """Labels of the outputs of `jaxpr`, given those of its inputs; `see(eqn, labels)` on the way."""
    known = dict(zip(jaxpr.invars, labels, strict=True))

    def read(atom):
        return NONE if isinstance(atom, Literal) else known.get(atom, NONE)

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _outputs(eqn, inputs, see)
        for var, found in zip(eqn.outvars, outputs, strict=True):
            see(eqn, var.aval, found)
            known[var] = found
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn, inputs, see):
    inner = list(sub_jaxprs(eqn.params))
    everything = NONE.union(*inputs)
    if eqn.primitive.name == "optimization_barrier":
        return inputs  # orders operands, mixes none
    if not inner:
        return [everything] * len(eqn.outvars)
    if eqn.primitive.name == "cond":
        branches = [visit(branch, inputs[1:], see) for branch in inner]
        return [inputs[0].union(*found) for found in zip(*branches, strict=True)]
    if eqn.primitive.name == "while":
        return _while(eqn, inputs, see)
    body = inner[0]
    if len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars):
        if eqn.primitive.name == "scan":
            inputs = _widened(body, inputs)
        return visit(body, inputs, see)
    for body in inner:  # a calling convention unknown here: assume the worst
        visit(body, [everything] * len(body.invars), see)
    return [everything] * len(eqn.outvars)


def _while(eqn, inputs, see):
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body = eqn.params["body_jaxpr"].jaxpr
    inner = _widened(body, inputs[skipped:])
    visit(eqn.params["cond_jaxpr"].jaxpr, [*inputs[:skipped], *inner[consts:]], see)
    visit(body, inner, see)
    return inner[consts:]


def _widened(body, inputs):
    """Labels of the inputs of a loop body once what comes out has come in again.

    An output is taken to come in wherever its type does, so that no parameter of `scan` need be
    known: this can label too much, never too little.
    """

    def returns_as(var, labels, outputs):
        return labels.union(
            *(
                found
                for out, found in zip(body.outvars, outputs, strict=True)
                if (out.aval.shape, out.aval.dtype) == (var.aval.shape, var.aval.dtype)
            )
        )

    while True:
        outputs = visit(body, inputs, lambda *_: None)
        pairs = zip(body.invars, inputs, strict=True)
        wider = [returns_as(var, labels, outputs) for var, labels in pairs]
        if wider == inputs:
            return inputs
        inputs = wider


def _labelled(fn, **arguments):
    """(jaxpr, labels) of `fn(*arguments)`; every leaf is labelled with its argument's name."""
    jaxpr = jax.make_jaxpr(fn)(*arguments.values())
    labels = [frozenset({name}) for name, tree in arguments.items() for _ in jax.tree.leaves(tree)]
    return jaxpr.jaxpr, labels


def _is_float(aval):
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def image_sizes(fn, weights, others, x) -> set[int]:
    """Sizes of all that `fn(weights, others, x)` computes from the weights without looking at x."""
    jaxpr, labels = _labelled(fn, weight=weights, other=others, x=x)
    sizes = {leaf.size for leaf in jax.tree.leaves(weights)}

    def see(_, aval, found):
        if "weight" in found and "x" not in found and _is_float(aval):
            sizes.add(math.prod(aval.shape))

    visit(jaxpr, labels, see)
    return sizes - {0, 1}


def dependencies(step, params, factors, x, ct):
    """The output of `step` with, for each leaf, the labels that it depends on."""
    jaxpr, labels = _labelled(step, params=params, factors=factors, x=x, ct=ct)
    structure = jax.tree.structure(jax.eval_shape(step, params, factors, x, ct))
    return jax.tree.unflatten(structure, visit(jaxpr, labels, lambda *_: None))


def dense_values(step, params, factors, x, ct, sizes) -> list[str]:
    """The equations of `step` that compute an array of one of `sizes` from factors or cotangent."""
    jaxpr, labels = _labelled(step, params=params, factors=factors, x=x, ct=ct)
    found = []

    def see(eqn, aval, labels):
        if labels & {"factors", "ct"} and _is_float(aval) and math.prod(aval.shape) in sizes:
            found.append(f"{eqn.primitive} -> {aval} from {sorted(labels)}")

    visit(jaxpr, labels, see)
    return found
