"""Comparing PEFT folders."""

import re

import numpy as np
import safetensors.numpy

from lorax_fn.io.peft_config import read_config


def assert_same_folder(ours, theirs):
    """The same tensors, and for each module the same rank, scale and kind.

    PEFT also stores the frozen weights of embeddings that it adapts, which nobody reads.
    """
    wanted = safetensors.numpy.load_file(theirs / "adapter_model.safetensors")
    got = safetensors.numpy.load_file(ours / "adapter_model.safetensors")
    frozen = {name for name in wanted if name.endswith("embed_tokens.base_layer.weight")}
    frozen |= {"base_model.model.lm_head.base_layer.weight"} & set(wanted)
    assert set(got) == set(wanted) - frozen
    for name, tensor in got.items():
        assert tensor.shape == wanted[name].shape, name
        np.testing.assert_allclose(tensor, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    a, b = read_config(ours), read_config(theirs)
    for name in got:
        module = re.sub(r"base_model\.model\.|(\.base_layer)*\.(lora_|weight|bias).*", "", name)
        assert a.saves(module) == b.saves(module)
        if "lora" in name and not b.target_parameters:
            assert a.rank(module) == b.rank(module)
            np.testing.assert_allclose(a.scale(module), b.scale(module), rtol=1e-6)
            assert a.targets(module)
    assert (a.use_dora, a.fan_in_fan_out, a.bias) == (b.use_dora, b.fan_in_fan_out, b.bias)
