"""The errors and the warning that `lorax_fn` raises.

Each message says what it got, what it wanted and the next step, in that order.
"""


class LoraError(ValueError):
    """Root of every error of this package; catch it to catch them all."""


class TargetError(LoraError):
    """A rule selects no leaf, or a leaf that it cannot adapt."""


class AxesError(LoraError):
    """Which dims of a weight are contracted and which are output is unknown, or does not fit."""


class StructureError(LoraError):
    """Factors, params and function do not fit together, in structure, shape, dtype or order."""


class AdapterFileError(LoraError):
    """A file does not hold the adapter it should: damaged, foreign, or of another shape."""


class DenseWarning(UserWarning):
    """A weight met an operation with no factored form and was materialised as W + s·A·B."""
