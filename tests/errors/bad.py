"""One bad call, the error it must get, and what the message must say."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lorax_fn as lora


@dataclass(frozen=True)
class Bad:
    """`call()` must raise `error` with a message in which every regex of `says` is found.

    The regexes name, as far as they apply: the path, what was got, what was wanted, the next step.
    """

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: Sequence[str]

    def __repr__(self) -> str:
        return self.name

    def check(self) -> None:
        with pytest.raises(self.error) as caught:
            self.call()
        message = str(caught.value)
        for regex in self.says:
            assert re.search(regex, message), f"/{regex}/ is missing from: {message}"
        assert len(message.split()) >= 6, f"too short to help: {message}"


def params():
    """A small model: two kernels, a bias, a conv kernel, a gain without dims."""
    return {
        "encoder": {"query": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)}},
        "conv": {"kernel": jnp.ones((3, 4, 5))},
        "head": {"kernel": jnp.ones((5, 2))},
        "gain": jnp.ones(()),
    }


def apply_fn(params, x):
    query = params["encoder"]["query"]
    hidden = x @ query["kernel"] + query["bias"][None]
    return hidden @ params["head"]["kernel"] * params["gain"]


X = (3, 7)


def inputs():
    return jnp.ones(X)


def rule(targets="encoder/query/kernel", **kwargs):
    return lora.LoRA(targets, **{"rank": 2, "alpha": 3, **kwargs})


def init(*rules, tree=None, **kwargs):
    return lora.init(jax.random.key(0), params() if tree is None else tree, rules, **kwargs)


def factors():
    return init(rule())
