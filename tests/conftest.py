"""Settings and fixtures for every test: eight CPU devices, strict promotion, replayable keys."""

import dataclasses
import os
from importlib.metadata import version

# XLA spends most of a test run on optimising code that runs once; two flags make compilation half
# as dear and leave every bit of the results as it was (which a lower optimisation level does not).
# The second one belongs to the jaxlibs that still have the older emitters.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_llvm_disable_expensive_passes=true",
]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

# Read once, when JAX starts its CPU backend: this must stand before the first import of jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

# Most programs here run once or twice, those of child processes too. XLA optimises those of tests
# marked `optimized`: where bits are compared, which a quick compilation may round otherwise, or where
# the program is measured.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import jax.numpy as jnp
import pytest

# Folders whose models other people wrote: those may mix dtypes and ranks as they please.
THIRD_PARTY = {"models", "examples", "benchmarks"}


# Compiled functions pile up at about 1 MB a test; thousands of tests in one process need a broom.
TESTS_PER_SWEEP = 300


def pytest_runtest_teardown(item):
    item.session.swept = getattr(item.session, "swept", 0) + 1
    if item.session.swept % TESTS_PER_SWEEP == 0:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict dtype promotion and no implicit rank promotion, except for third-party models."""
    if THIRD_PARTY.intersection(request.path.parts):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def optimization(request):
    """XLA's own settings for tests marked `optimized`."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey(request):
    """`getkey()` yields a fresh key on each call; a test sees the same keys on every run."""
    count = 0

    def next_key():
        nonlocal count
        count += 1
        return jax.random.fold_in(jax.random.key(len(request.node.name)), count)

    return next_key


def randomise(key, factors):
    """Factors of the same structure whose `a` and `b` are both random, so that A·B is not zero."""

    def is_node(leaf):
        return hasattr(leaf, "a") and hasattr(leaf, "b")

    def redraw(leaf):
        nonlocal key
        if not is_node(leaf):
            return leaf
        key, key_a, key_b = jax.random.split(key, 3)
        a = jax.random.normal(key_a, leaf.a.shape, jnp.float32) / 2
        b = jax.random.normal(key_b, leaf.b.shape, jnp.float32) / 2
        return dataclasses.replace(leaf, a=a.astype(leaf.a.dtype), b=b.astype(leaf.b.dtype))

    return jax.tree.map(redraw, factors, is_leaf=is_node)


@pytest.fixture
def nonzero_factors(getkey):
    """`nonzero_factors(factors)` redraws `a` and `b` at random: zero B would hide every error."""
    return lambda factors: randomise(getkey(), factors)
