"""Files that are damaged, cut off or made to harm: an `AdapterFileError`, and nothing else."""

import json
import random
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax_fn as lora
from lorax_fn.io.native import checksum
from tests.io.trees import RULES, assert_same, factors_of

N_DAMAGED, N_FORGED = 1200, 1000


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of a file of each kind, and the factors in it."""
    path = tmp_path_factory.mktemp("originals") / "f"
    files = []
    for i, name in enumerate(RULES):
        factors = factors_of(jax.random.key(i), name)
        lora.save(path, factors)
        files.append((path.read_bytes(), factors))
    return files


def split(data):
    """Header and tensors of a file's bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def insert(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]


def remove(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 20) :]


def repeat(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + data[at - min(at, 40) :]


def length(rng, data):
    return struct.pack("<Q", rng.choice([0, 1, 2**20, 2**31, 2**63, 2**64 - 1])) + data[8:]


def offsets(rng, data):
    header, body = split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    rng.choice([
        lambda: entry.update(data_offsets=[start, end + rng.choice([-4, 4, 2**40])]),
        lambda: entry.update(data_offsets=[end, start]),
        lambda: entry.update(data_offsets=[-4, end]),
        lambda: entry.update(data_offsets=[0, len(body)]),
        lambda: entry.update(shape=[*entry["shape"], rng.choice([0, 2, 2**62, -1])]),
        lambda: entry.update(dtype=rng.choice(["F64", "BOOL", "I8", "F8_E4M3", "?", None])),
        lambda: header.pop(name),
        lambda: header.update({rng.choice(["../../etc/x", "/", "", "w:", "w:a"]): header.pop(name)}),
    ])()  # fmt: skip
    return join(header, body)


def same_file(data, other):
    """Whether two files say the same in other words (spaces, order)."""
    try:
        return split(data) == split(other)
    except (ValueError, struct.error):
        return False


def test_damaged_files_are_refused(originals, tmp_path):
    """No byte of a file can change unseen."""
    rng = random.Random(0)
    damages = [flip, flip, cut, insert, remove, repeat, length, offsets]
    path = tmp_path / "damaged"
    for i in range(N_DAMAGED):
        data, factors = rng.choice(originals)
        damaged = damages[i % len(damages)](rng, data)
        path.write_bytes(damaged)
        if same_file(damaged, data):
            assert_same(lora.load(path), factors)
            continue
        with pytest.raises(lora.AdapterFileError):
            lora.load(path)


HOSTILE = [
    None, True, False, 0, 1, -1, 2, 7, 1e308, -1e308, 2**40, 10**400, "", "x", "LoRA", "DoRA", "LoKr", "IA3",
    "Full", "in", [], [0], [0, 0], [-1], [10**9], {}, {"node": "w"}, {"dict": []}, "../../etc/passwd",
    {"batch": [], "contract": [0], "out": [1]}, {"batch": [0], "contract": [1], "out": [2]},
    {"batch": [], "contract": [1], "out": [0]}, "__class__", "__reduce__",
]  # fmt: skip


def mutate(rng, value):
    """One place of a JSON value, replaced by something hostile, dropped or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return value | {rng.choice(["w", "a", "scale", "x", "../x"]): value[key]}
        return value | {key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutate(rng, value[at]), *value[at + 1 :]]
    return rng.choice(HOSTILE)


def test_forged_files_are_refused_or_whole(originals, tmp_path):
    """With a checksum that fits: what is loaded at all is made of known nodes that fit themselves."""
    rng = random.Random(1)
    path, loaded = tmp_path / "forged", 0
    for _ in range(N_FORGED):
        data, _ = rng.choice(originals)
        content = json.loads(split(data)[0]["__metadata__"]["content"])
        arrays = safetensors.numpy.load(data) if b"BF16" not in data else {}
        if rng.random() < 0.3 and arrays:
            name = rng.choice(list(arrays))
            shape = rng.choice([(), (0,), (1,), (2, 2), arrays[name].shape[::-1]])
            arrays[name] = np.ones(
                shape, rng.choice([np.float32, np.float64, np.float16, np.int32])
            )
        else:
            content = mutate(rng, content)
        text = json.dumps(content)
        metadata = {"format": "lorax_fn", "version": "1", "content": text}
        metadata["checksum"] = checksum(text, arrays)
        safetensors.numpy.save_file(arrays, path, metadata)
        try:
            factors = lora.load(path)
        except lora.AdapterFileError:
            continue
        loaded += 1
        lora.save(tmp_path / "again", factors)  # checks every node
        assert_same(lora.load(tmp_path / "again"), factors)
    assert 0 < loaded < N_FORGED / 3


def rewritten(tmp_path, factors, **changes):
    """The bytes of a file, its metadata changed and signed again."""
    lora.save(tmp_path / "f", factors)
    header, body = split((tmp_path / "f").read_bytes())
    metadata = header["__metadata__"] | changes
    arrays = {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    if "checksum" not in changes:
        metadata["checksum"] = checksum(metadata["content"], arrays)
    (tmp_path / "f").write_bytes(join(header | {"__metadata__": metadata}, body))
    return tmp_path / "f"


def test_messages(getkey, tmp_path):
    factors = factors_of(getkey(), "LoRA")
    path = rewritten(tmp_path, factors, version="2")
    with pytest.raises(lora.AdapterFileError, match=r"version '2'.*newer"):
        lora.load(path)
    path = rewritten(tmp_path, factors, checksum="crc32:00000000")
    with pytest.raises(lora.AdapterFileError, match="checksum does not fit"):
        lora.load(path)
    path = rewritten(tmp_path, factors, content="[" * 100_000)
    with pytest.raises(lora.AdapterFileError, match="damaged"):
        lora.load(path)
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(lora.AdapterFileError, match="fewer than its header asks for"):
        lora.load(path)
    path.write_bytes(b"")
    with pytest.raises(lora.AdapterFileError, match="0 bytes"):
        lora.load(path)
    with path.open("wb") as file:  # sparse: as large as it claims, and never read
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)
    with pytest.raises(lora.AdapterFileError, match="refused unread"):
        lora.load(path)


def test_nan_is_refused(getkey, tmp_path):
    factors = factors_of(getkey(), "LoRA")
    lora.save(tmp_path / "f", factors)
    header, _ = split((tmp_path / "f").read_bytes())
    arrays = safetensors.numpy.load_file(tmp_path / "f")
    arrays["w:a"][0, 0] = np.nan
    metadata = header["__metadata__"]
    metadata["checksum"] = checksum(metadata["content"], arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "f", metadata)
    with pytest.raises(lora.AdapterFileError, match="'w:a' holds a NaN"):
        lora.load(tmp_path / "f")


def test_names_of_a_file_touch_no_file(getkey, tmp_path):
    """A path in a tree is a key, whatever it looks like."""
    node = factors_of(getkey(), "LoRA")["w"]
    tree = {"../../outside": {"/etc/passwd": node}}
    lora.save(tmp_path / "f", tree)
    before = sorted(tmp_path.parent.rglob("*"))
    assert_same(lora.load(tmp_path / "f"), tree)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_deep_trees_are_refused(getkey, tmp_path):
    tree = factors_of(getkey(), "LoRA")["w"]
    for _ in range(70):
        tree = {"x": tree}
    with pytest.raises(lora.StructureError, match="deeper than 64"):
        lora.save(tmp_path / "f", tree)
    content = {"tree": json.loads('{"list":[' * 100 + "null" + "]}" * 100), "nodes": {}}
    text = json.dumps(content)
    metadata = {"format": "lorax_fn", "version": "1", "content": text}
    safetensors.numpy.save_file({}, tmp_path / "f", metadata | {"checksum": checksum(text, {})})
    with pytest.raises(lora.AdapterFileError, match="outline of the tree is damaged"):
        lora.load(tmp_path / "f")


def test_no_pickle(tmp_path):
    """A pickle is no safetensors file, and nothing of it runs."""
    (tmp_path / "f").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    )
    with pytest.raises(lora.AdapterFileError):
        lora.load(tmp_path / "f")
    assert not (tmp_path / "ran").exists()
