"""The task: which standard-library package does this docstring document?

The sources are read with `ast`, never imported, so reading them has no side effects. Names give the
answer away, so the name of every package of the task is cut out of every text, even inside a longer
word, and so is every submodule's name where it stands as a word: neither presence nor absence tells
anything. Objects go to splits by a hash of their qualified name, so a new Python version leaves the
objects it shares with the old one where they were.
"""

import ast
import dataclasses
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

# Those with 50 docstrings or more in each of Python 3.11, 3.12 and 3.13, and on every platform.
PACKAGES = (
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "doctest",
    "email",
    "http",
    "imaplib",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "pydoc",
    "statistics",
    "tarfile",
    "threading",
    "typing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zipfile",
)
SPLITS = {"train": 60, "validation": 15, "test": 25}  # per cent of the objects
MIN_WORDS = 4  # with less than that left, nobody could tell
SKIPPED_FOLDERS = {"test", "tests"}

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Example:
    """A documented object: its qualified name, its package and its docstring without names."""

    name: str
    package: str
    text: str

    @property
    def split(self) -> str:
        """The split this object belongs to, for ever."""
        percentile = _digest(self.name) % 100
        for split, share in SPLITS.items():
            if percentile < share:
                return split
            percentile -= share
        raise AssertionError("the shares of SPLITS do not add up to 100")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """Tokenised examples: ids and mask (examples, time), labels (examples,), all int32."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | slice) -> "Split":
        """The examples of these indices."""
        return Split(self.ids[rows], self.mask[rows], self.labels[rows])


def load(
    examples: Iterable[Example], tokenizer: Tokenizer, limit: int | None = None
) -> dict[str, Split]:
    """The splits as the model sees them, of distinct inputs; `limit` caps the size of each."""
    unique = distinct(examples, tokenizer)
    return {
        name: _tokenised([e for e in unique if e.split == name][:limit], tokenizer)
        for name in SPLITS
    }


def collect(stdlib: Path | None = None) -> list[Example]:
    """All usable examples, in a pseudo-random order that only depends on their names.

    Raises:
        SystemExit: this Python comes without the sources of some of the packages.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    modules = _sources(stdlib)
    if missing := set(PACKAGES) - {module[0] for module in modules.values()}:
        raise SystemExit(f"No sources of {', '.join(sorted(missing))} in {stdlib}.")
    mask = NameMask(part for module in modules.values() for part in module[1:])
    examples = [
        Example(name, module[0], mask(text))
        for file, module in modules.items()
        for name, text in _docstrings(ast.parse(file.read_bytes()), ".".join(module))
    ]
    usable = [e for e in examples if len(re.findall(r"[^\W\d_]{2,}", e.text)) >= MIN_WORDS]
    return sorted(usable, key=lambda example: _digest(example.name))


def distinct(examples: Iterable[Example], tokenizer: Tokenizer) -> list[Example]:
    """Keep one of those that are equal to the model; none, where their packages differ."""
    examples = list(examples)
    seen: dict[tuple[int, ...], list[Example]] = {}
    for example, encoding in zip(examples, _encode(examples, tokenizer), strict=True):
        seen.setdefault(tuple(encoding.ids), []).append(example)
    return [same[0] for same in seen.values() if len({e.package for e in same}) == 1]


class NameMask:
    """Cuts the names of all packages, and of the given submodules, out of a text."""

    def __init__(self, submodules: Iterable[str]) -> None:
        words = {word.strip("_") for word in submodules} - {"main"}
        self._packages = re.compile("|".join(_longest_first(PACKAGES)), re.IGNORECASE)
        self._submodules = re.compile(
            rf"(?<![a-z])({'|'.join(_longest_first(words))})(?![a-z])", re.IGNORECASE
        )

    def __call__(self, text: str) -> str:
        text = self._packages.sub(" ", text)
        text = self._submodules.sub(" ", text)
        text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", text)  # aPart, a_part: words of their own
        text = self._submodules.sub(" ", text)
        return " ".join(text.split())


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def _longest_first(names: Iterable[str]) -> list[str]:
    return [re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))]


def _sources(stdlib: Path) -> dict[Path, tuple[str, ...]]:
    """The packages' source files and their modules; `_pydecimal.py` is a source of `decimal`."""
    sources = {}
    for package in PACKAGES:
        for root in (package, f"_py{package}"):
            for file in [stdlib / f"{root}.py", *sorted((stdlib / root).rglob("*.py"))]:
                parts = file.relative_to(stdlib).with_suffix("").parts
                if file.is_file() and not SKIPPED_FOLDERS & set(parts):
                    sources[file] = (package, *(p for p in parts[1:] if p != "__init__"))
    return sources


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of everything documented at or below `node`."""
    if isinstance(node, _Documented) and (text := ast.get_docstring(node)):
        yield name, text
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        yield from _docstrings(child, f"{name}.{inner}" if isinstance(child, _Documented) else name)


def _encode(examples: list[Example], tokenizer: Tokenizer) -> list:
    return tokenizer.encode_batch([example.text for example in examples])


def _tokenised(examples: list[Example], tokenizer: Tokenizer) -> Split:
    encoded = _encode(examples, tokenizer)
    return Split(
        ids=np.array([e.ids for e in encoded], np.int32),
        mask=np.array([e.attention_mask for e in encoded], np.int32),
        labels=np.array([PACKAGES.index(e.package) for e in examples], np.int32),
    )
