"""`adapter_config.json`: what PEFT says of an adapter beside its tensors.

PEFT's rules: a module's rank and alpha are those of the first pattern that matches the end of its
name, whole components of it, or else `r` and `lora_alpha`; its scale is alpha/r, or alpha/√r with
`use_rslora`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorax_fn.errors import AdapterFileError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST = 2**20  # bytes
LONGEST_NAME = 256  # letters of a module's name, which patterns are matched against

# Fields that change nothing in what the tensors mean, whatever their value.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "loftq_config",
    "layers_to_transform", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# Fields that are read.
_READ = {
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "use_dora",
    "use_rslora",
}  # fmt: skip
# Starts that leave another base behind, which the adapter alone does not hold.
_MOVES_THE_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The part of a config that says what the tensors mean."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    chooses_layers: bool = False

    def rank(self, module: str) -> int:
        """r of a module, or of a parameter by its whole name."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        """What its product is multiplied by."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the config says for certain that a module has a LoRA."""
        _check_length(module)
        if self.chooses_layers or self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            return bool(_compiled(self.target_modules).fullmatch(module))
        return _ends_in(module, self.target_modules)

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter, by its whole name, has a LoRA of its own."""
        _check_length(name)
        return _ends_in(name, self.target_parameters)

    def saves(self, module: str) -> bool:
        """Whether a module is trained whole."""
        return is_saved(module, self.modules_to_save)


def is_saved(module: str, names: Iterable[str]) -> bool:
    """Whether the name of a module, or of one around it, ends in one of these, as PEFT asks."""
    return any(f"{name}." in f"{module}." for name in names)


def read_config(folder: Path) -> PeftConfig:
    """The config of a folder.

    Raises:
        AdapterFileError: if there is none, or it asks for what is not known here.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > LARGEST:
            raise AdapterFileError(f"{path} is above {LARGEST} bytes; it is refused unread.")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise AdapterFileError(f"{path} cannot be read: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise AdapterFileError(f"{path} is no JSON: {e}.") from e
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; wanted an object.")
    try:
        return _checked(fields)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from e


def _checked(fields: dict[str, Any]) -> PeftConfig:
    if fields.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"peft_type is {fields.get('peft_type')!r}; wanted LORA, which may be rsLoRA or DoRA."
        )
    for name, value in fields.items():
        if name not in _INERT | _READ and value not in (None, False, [], {}, ""):
            raise AdapterFileError(
                f"{name} is {str(value)[:80]}, which changes what the adapter computes in a way "
                "that is not known here."
            )
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and _MOVES_THE_BASE.fullmatch(start):
        raise AdapterFileError(
            f"init_lora_weights is {start!r}: the adapter belongs to a base whose weights were "
            "changed at the start. Save it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA."
        )
    targets = _names(fields, "target_modules", may_be_regex=True)
    return PeftConfig(
        r=_rank("r", fields.get("r", 8)),
        lora_alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        target_modules=targets,
        target_parameters=tuple(_names(fields, "target_parameters")),
        modules_to_save=tuple(_names(fields, "modules_to_save")),
        rank_pattern=_pattern(fields, "rank_pattern", _rank),
        alpha_pattern=_pattern(fields, "alpha_pattern", _number),
        lora_dropout=_dropout(fields.get("lora_dropout", 0.0)),
        bias=_bias(fields.get("bias", "none")),
        use_rslora=_flag(fields, "use_rslora"),
        use_dora=_flag(fields, "use_dora"),
        fan_in_fan_out=_flag(fields, "fan_in_fan_out"),
        chooses_layers=bool(
            fields.get("layers_to_transform")
            or fields.get("exclude_modules")
            # A regex for diffusers may be long: then the tensors alone say what is adapted.
            or (isinstance(targets, str) and not _is_safe(targets))
        ),
    )


def write_config(path: Path, config: PeftConfig, base_model: str | None) -> None:
    """Writes a config that PEFT, and what reads its folders, takes."""
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        **{
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name != "chooses_layers"
        },
        "target_parameters": config.target_parameters or None,
        "modules_to_save": config.modules_to_save or None,
    }
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def most_common(values: Iterable[Any]) -> Any:
    """The most frequent value, the first of equals."""
    return collections.Counter(values).most_common(1)[0][0]


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The patterns that give each module its value: the longest names first, for they win."""
    others = {name: value for name, value in values.items() if value != default}
    shadowed = {
        name: value
        for name, value in values.items()
        if value == default and any(name.endswith(f".{other}") for other in others)
    }
    return dict(sorted((others | shadowed).items(), key=lambda item: -len(item[0])))


def _matching(patterns: Mapping[str, Any], name: str) -> str:
    _check_length(name)
    for pattern in patterns:
        if _ending(pattern).match(name):
            return pattern
    return name


def _check_length(name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise AdapterFileError(f"the name {name[:80]!r}… has {len(name)} letters; it is refused.")


def _ending(pattern: str) -> re.Pattern[str]:
    """A regex out of a file, for the last components of a name."""
    return _compiled(pattern, r"(.*\.)?(", ")$")


@functools.lru_cache(4096)
def _compiled(pattern: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """A regex out of a file, between two of our own; one that could run for hours is refused.

    Raises:
        AdapterFileError: for such a one, and for what is no regex.
    """
    if not _is_safe(pattern):
        raise AdapterFileError(
            f"the pattern {pattern[:80]!r} is too intricate to be run safely; wanted names."
        )
    try:
        return re.compile(before + pattern + after)
    except (re.error, OverflowError, RecursionError) as e:
        raise AdapterFileError(f"the pattern {pattern[:80]!r} is no regex: {e}.") from e


def _is_safe(pattern: str) -> bool:
    """Whether matching a name takes few steps: little is repeated, and nothing within a repeat."""
    groups = pattern.replace("(?", "(")
    repeats = re.findall(r"[*+{?]", groups)
    long = re.findall(r"[*+{]", pattern)  # each multiplies the steps by the letters of a name
    ways = math.prod(1 + part.count("|") for part in groups.split("("))
    few = len(repeats) <= 5 and len(long) <= 2 and ways * 128 ** len(long) <= 2**20
    return len(pattern) <= 10_000 and few and not re.search(r"\)[*+{]", pattern)


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _names(fields: dict[str, Any], key: str, *, may_be_regex: bool = False) -> Any:
    value = fields.get(key)
    if isinstance(value, str) and may_be_regex:
        if _is_safe(value):
            _compiled(value)
        return value
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise AdapterFileError(f"{key} is {str(value)[:80]}; wanted a list of names.")
    return tuple(value)


def _pattern(fields: dict[str, Any], key: str, check: Any) -> dict[str, Any]:
    value = fields.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise AdapterFileError(f"{key} is {str(value)[:80]}; wanted an object of patterns.")
    for pattern in value:
        _ending(pattern)
    return {name: check(f"{key}[{name!r}]", entry) for name, entry in value.items()}


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise AdapterFileError(f"{key} is {str(value)[:80]}; wanted a rank of at least 1.")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise AdapterFileError(f"{key} is {str(value)[:80]}; wanted a finite number.")
    return value


def _dropout(value: Any) -> float:
    if not 0 <= _number("lora_dropout", value) < 1:
        raise AdapterFileError(f"lora_dropout is {value}; wanted a probability below 1.")
    return float(value)


def _bias(value: Any) -> str:
    if value not in ("none", "all", "lora_only"):
        raise AdapterFileError(f"bias is {str(value)[:80]}; wanted none, all or lora_only.")
    return value


def _flag(fields: dict[str, Any], key: str) -> bool:
    value = fields.get(key) or False
    if not isinstance(value, bool):
        raise AdapterFileError(f"{key} is {str(value)[:80]}; wanted true or false.")
    return value
