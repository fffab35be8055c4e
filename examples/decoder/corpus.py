"""Two kinds of text from the standard library: code without a comment, and the prose about it.

Code is what `ast.unparse` writes after the docstrings have been taken out, so that the pretrained
model has never seen a sentence; prose is the docstrings alone. A module belongs, with both of its
texts, to one split for ever, by a hash of its name: what is tested on was seen by no training.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

KINDS = ("code", "prose")
SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
TESTED = 10  # per cent of the modules
SEPARATOR = "<|end|>"  # between the texts of a split
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read(limit: int | None = None) -> dict[str, dict[str, list[str]]]:
    """{"code" and "prose": {"train" and "test": texts}}; `limit` caps the modules that are read."""
    texts: dict[str, dict[str, list[str]]] = {kind: {"train": [], "test": []} for kind in KINDS}
    for name, source in _modules(limit):
        split = "test" if _digest(name) % 100 < TESTED else "train"
        try:
            tree = ast.parse(source)
        except SyntaxError:  # files that are wrong on purpose, or of another version
            continue
        texts["prose"][split] += _take_docstrings(tree)
        texts["code"][split].append(ast.unparse(tree))
    return texts


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: every text can be written, and read back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts one after another, the separator after each: (tokens,), int32."""
    end = tokenizer.token_to_id(SEPARATOR)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*e.ids, end], np.int32) for e in encoded])


def windows(tokens: np.ndarray, length: int, limit: int) -> np.ndarray:
    """At most `limit` stretches from all over the tokens: (windows, length)."""
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)
    return whole[:: max(1, -(-len(whole) // limit))]


def batches(
    tokens: np.ndarray, steps: int, batch: int, length: int, seed: int
) -> Iterator[np.ndarray]:
    """`steps` batches (batch, length) of stretches that begin anywhere."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(tokens) - length, batch)
        yield tokens[starts[:, None] + np.arange(length)]


def _modules(limit: int | None) -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    if not files:
        raise SystemExit(f"No sources of the standard library in {root}.")
    names = {file.relative_to(root).as_posix(): file for file in files}
    for name in sorted(names, key=_digest)[:limit]:
        yield name, names[name].read_bytes()


def _take_docstrings(tree: ast.Module) -> list[str]:
    """Removes every docstring from the tree, and returns those of a sentence or more."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (text := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            if len(text.split()) >= 5:
                found.append(text)
    return found


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())
