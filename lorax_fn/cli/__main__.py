"""`python -m lorax_fn.cli`."""

from lorax_fn.cli import main

main()
