"""The QLoRA example on a corner of its data: what it prints is what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import qlora

import lorax_fn as lora

QUICK = ["--limit=200", "--batch=16", "--length=8", "--steps=4", "--lr=0.01"]


def test_learns_on_a_quarter_of_the_bytes(capsys):
    results = qlora.main(QUICK)
    assert results["bytes"]["nf4"] < 0.2 * results["bytes"]["float32"]
    losses = {name: np.array(values) for name, values in results["losses"].items()}
    assert np.ptp(losses["nf4"]) > 0.1  # the steps move something
    assert abs(losses["nf4"][0] - losses["float32"][0]) < 0.5
    out = capsys.readouterr().out
    assert "384×384 nf4" in out
    assert f"LoRA on nf4: base of {results['bytes']['nf4']:,} bytes" in out


def test_with_loftq_the_factors_start_at_what_quantising_took_away():
    """So the model that is trained starts nearer to the floating one."""
    options = qlora.parse_options([*QUICK, "--loftq"])
    splits = qlora.data.load(qlora.data.collect(), qlora.weights.load_tokenizer(8), 100)
    published = qlora.weights.load_params()
    model = qlora.Classifier(len(qlora.data.PACKAGES))
    example = splits["train"].take(slice(16))
    head = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), example.ids, example.mask),
    )["params"]["classifier"]
    variables = {"params": {"bert": published, "classifier": head}}

    base, factors = qlora.quantised(model, variables, splits["train"], options)
    trees = (lora.merge(base, factors), lora.merge(base, jax.tree.map(lambda _: None, variables)))
    started, plain = (
        jax.tree.map(lambda a, b: float(jnp.square(a - b).sum()), tree, variables) for tree in trees
    )
    layers = [tree["params"]["bert"]["encoder"] for tree in (started, plain)]
    assert sum(jax.tree.leaves(layers[0])) < 0.95 * sum(jax.tree.leaves(layers[1]))
