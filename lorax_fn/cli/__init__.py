"""`lorax-fn`, the command line: adapters inspected, merged, converted, compared and combined."""

from __future__ import annotations

import os
import sys

import jax


def main() -> None:
    """Runs the command line; ends the process with its exit code."""
    # Files are merged on the host, in their own dtypes.
    # JAX is imported by now, and has read the variables of its environment.
    for name, value in (("jax_platforms", "cpu"), ("jax_enable_x64", True)):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    try:
        from lorax_fn.cli.app import run
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("lorax_fn"):
            raise
        sys.stderr.write(
            f"lorax-fn needs the package {e.name!r}, which is not installed: "
            "pip install 'lorax-fn[cli]'\n"
        )
        sys.exit(2)
    sys.exit(run())
