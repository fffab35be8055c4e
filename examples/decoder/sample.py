"""Text from a model, token by token."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tokenizers import Tokenizer

from decoder.corpus import SEPARATOR

TEMPERATURE = 0.7


def sample(
    apply: Callable[..., jax.Array],
    params: Any,
    prompts: list[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int,
) -> list[str]:
    """What the model writes after the separator and each prompt, up to `length` tokens in all.

    The whole text is read anew for each token: short, and the same for every model.
    """
    end = tokenizer.token_to_id(SEPARATOR)
    encoded = [[end, *tokenizer.encode(prompt).ids] for prompt in prompts]
    given = jnp.array([len(ids) for ids in encoded])
    start = jnp.array([ids + [0] * (length - len(ids)) for ids in encoded])

    written = _write(apply, params, start, given, jax.random.key(seed)).tolist()
    return [tokenizer.decode(_until(ids[1:], end)) for ids in written]


@functools.partial(jax.jit, static_argnums=0)
def _write(
    apply: Callable[..., jax.Array],
    params: Any,
    start: jax.Array,
    given: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Tokens (prompts, length); the first `given` (prompts,) of them stay as they are."""

    def next_token(i: jax.Array, carry: tuple) -> tuple:
        tokens, key = carry
        key, drawn = jax.random.split(key)
        logits = apply(params, tokens)[:, i - 1] / TEMPERATURE  # (prompts, vocabulary)
        token = jnp.where(i < given, tokens[:, i], jax.random.categorical(drawn, logits))
        return tokens.at[:, i].set(token), key

    return lax.fori_loop(1, start.shape[1], next_token, (start, key))[0]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
