"""PEFT's adapters on published models: we compute what PyTorch computes, and write what PEFT wrote.

The folders in `peft_fixtures` and the outputs beside them are PEFT's own (`make_peft_fixtures.py`).
"""

from pathlib import Path

import numpy as np
import pytest

import lorax_fn as lora
from tests.io import jax_models
from tests.io.folders import assert_same_folder
from tests.io.peft_cases import CASES

FIXTURES = Path(__file__).with_name("peft_fixtures")
OUTPUTS = np.load(FIXTURES / "outputs.npz")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's models

PORTS = [
    *((case, "flax") for case, (model, _) in CASES.items() if model in jax_models.FLAX),
    *((case, "tunix") for case, (model, _) in CASES.items() if model in jax_models.TUNIX_MODELS),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Each model is built once."""
    built = {}

    def build(model, port):
        if (model, port) not in built:
            pytest.importorskip({"flax": "transformers", "tunix": "tunix"}[port])
            with jax_models.third_party():
                built[model, port] = (
                    jax_models.flax(model)
                    if port == "flax"
                    else jax_models.tunix(model, tmp_path_factory.mktemp(model))
                )
        return built[model, port]

    return build


@pytest.mark.parametrize(("case", "port"), PORTS, ids=map("-".join, PORTS))
def test_answers_as_pytorch_does(build, tmp_path, case, port):
    model = build(CASES[case][0], port)
    factors = lora.load_peft(FIXTURES / case, model.params, names=model.names)
    np.testing.assert_allclose(
        jax_models.answer(model, factors), OUTPUTS[case], rtol=1e-4, atol=1e-4
    )
    lora.save_peft(tmp_path, model.params, factors, names=model.names)
    assert_same_folder(tmp_path, FIXTURES / case)
