"""What a test has to know of the JAX that it runs on."""

from importlib.metadata import version

JAX = tuple(map(int, version("jax").split(".")[:2]))
BEFORE_0_10 = JAX < (0, 10)
