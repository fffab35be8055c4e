"""A run that is killed goes on as if it had not been; a checkpoint is of this run, or refused."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import lorax_fn as lora
from tests import checkpointed_run as run


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 2 and 3, and what step 3 saved."""
    params, factors, state = run.start(run.make_mesh(4, 2))
    for i in range(1, 4):
        factors, state, _ = run.step(params, factors, state)
        lora.save_checkpoint(tmp_path / "run", i, factors, state)
    return tmp_path / "run", factors, state


def numbers(tree):
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    return all(map(np.array_equal, numbers(tree), numbers(other)))


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_saved_comes_back_where_it_lay(saved):
    folder, factors, state = saved
    _, ours, like = run.start(run.make_mesh(4, 2))
    found, found_state, step = lora.restore_checkpoint(folder, ours, like)
    assert step == 3
    assert same((found, found_state), (factors, state))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, ours)
    assert not found_state[1].committed  # as the key that was given
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    _, _, earlier = lora.restore_checkpoint(folder, ours, like, step=2)
    assert earlier == 2


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 1)])
def test_restored_onto_another_mesh_it_trains_on(saved, shape):
    folder, factors, state = saved
    params, *given = run.start(run.make_mesh(4, 2))
    _, _, wanted = run.step(params, factors, state)

    params, *given = run.start(run.make_mesh(*shape))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding
                            if isinstance(x.sharding, NamedSharding) else None), given)  # fmt: skip
    for like in (given, abstract):
        found, found_state, _ = lora.restore_checkpoint(folder, *like)
        assert same((found, found_state), (factors, state))
        assert found["w"].a.sharding == given[0]["w"].a.sharding
        _, _, loss = run.step(params, found, found_state)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_a_run_killed_at_any_moment_resumes_with_the_same_losses(tmp_path):
    """SIGKILL after some steps, at moments that drift through computing and writing."""
    steps = 18
    wanted = dict(run.losses(tmp_path / "whole", steps, run.make_mesh(4, 2)))
    command = [sys.executable, "-m", "tests.checkpointed_run", str(tmp_path / "killed"), str(steps)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    got, kills = {}, 0
    for lines in (9, 5, None):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            for n, line in enumerate(process.stdout, 1):
                if not line.endswith("\n"):
                    continue  # the kill cut it
                i, loss = line.split()
                got.setdefault(int(i), float.fromhex(loss))
                assert float.fromhex(loss) == got[int(i)]  # also of a step that is done again
                if n == lines:
                    time.sleep(0.03 * lines)
                    os.kill(process.pid, signal.SIGKILL)  # what it has printed is still read
        kills += process.returncode == -signal.SIGKILL
    assert (kills, process.returncode) == (2, 0)
    assert len(got) >= steps - 2  # a step may be saved and killed before it is printed
    assert got == {i: wanted[i] for i in got}


def test_the_base_is_not_saved(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}
    factors = lora.init(jax.random.key(1), params, [lora.LoRA("w", rank=4, alpha=3)])
    state = lora.freeze(optax.adam(1e-3)).init(factors)
    # Numbers that do not compress, so that what is written is what there is.
    factors, state = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(2), x.shape).astype(x.dtype), (factors, state)
    )
    lora.save_checkpoint(tmp_path, 1, factors, state)
    trained = sum(x.nbytes for x in jax.tree.leaves((factors, state)))
    assert trained == 3 * 4 * 2048 * 4 + 4  # A and B and two moments of each, and a count
    written = sum(map(len, snapshot(tmp_path).values()))
    assert 0.8 * trained < written < trained + 20_000 < params["w"].nbytes / 10


# Reads that run beside the one that failed end as tasks that nobody awaits: orbax 0.12.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_refused_by_name(saved):
    """Whatever file is cut or gone: refused, or, where nothing is missing, the same values."""
    folder, factors, state = saved
    _, *given = run.start(run.make_mesh(4, 2))
    whole, refused = snapshot(folder), 0
    for path, content in whole.items():
        if path.relative_to(folder).parts[0] != "3" or not content:
            continue
        for damage in (content[: len(content) // 2], None):
            path.unlink() if damage is None else path.write_bytes(damage)
            try:
                found, found_state, step = lora.restore_checkpoint(folder, *given)
            except lora.AdapterFileError as e:
                assert f"{folder}/3 is damaged" in str(e)
                refused += 1
            else:
                assert same((found, found_state), (factors, state)) if step == 3 else step == 2
            path.write_bytes(content)
    assert refused > 6
    assert snapshot(folder) == whole
    gc.collect()  # the reads that orbax gave up complain here, and not in a later test


def test_values_that_changed_are_refused(saved, monkeypatch):
    folder, *_ = saved
    _, *given = run.start(run.make_mesh(4, 2))
    monkeypatch.setattr("lorax_fn.checkpoint._as_given", lambda array, like: jnp.zeros_like(like)
                        if like.shape == (64, 2) else jnp.asarray(array))  # fmt: skip
    with pytest.raises(lora.AdapterFileError, match=r"run/3 is damaged.* values of '.*w/a'"):
        lora.restore_checkpoint(folder, *given)


@pytest.mark.parametrize("damaged", [b"", b"{}", b"[1, 2]", b"\xff\xfe"])
def test_a_record_that_is_something_else_is_refused(saved, damaged):
    folder, *_ = saved
    _, *given = run.start(run.make_mesh(4, 2))
    (folder / "3" / "record" / "metadata").write_bytes(damaged)
    before = snapshot(folder)
    with pytest.raises(lora.AdapterFileError, match=r"run/3 is"):
        lora.restore_checkpoint(folder, *given)
    with pytest.raises(lora.AdapterFileError, match=r"run/3 is"):
        lora.save_checkpoint(folder, 4, *given)
    assert snapshot(folder) == before


W = {"w": jnp.ones((64, 32)), "v": jnp.ones((32, 8))}
FOREIGN = {
    "rank": ([lora.LoRA("w", rank=3, alpha=4.5), run.RULES[1]], r"'factors/w/a' .*\[64, 2\]"),
    "scale": ([lora.LoRA("w", rank=2, alpha=4), run.RULES[1]], r"'w' .*1\.5.*2\.0"),
    "kind": ([lora.DoRA("w", rank=2, alpha=3), run.RULES[1]], r"'w' .*'LoRA'.*'DoRA'"),
    "targets": ([run.RULES[0]], r"'v' .*'Full'.*nothing"),
    "more": ([lora.Full(".*")], r"'w' .*'LoRA'.*'Full'"),
}


@pytest.mark.parametrize(("rules", "says"), FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_another_run_is_refused(saved, rules, says):
    folder, *_ = saved
    factors = lora.init(jax.random.key(0), W, rules)
    given = factors, (run.optimiser().init(factors), jax.random.key(2))
    before = snapshot(folder)
    for attempt in (
        lambda: lora.restore_checkpoint(folder, *given),
        lambda: lora.save_checkpoint(folder, 9, *given),
    ):
        with pytest.raises(lora.AdapterFileError, match=rf"run/3 is of another run: as {says}"):
            attempt()
    assert snapshot(folder) == before


def test_another_optimiser_is_refused(saved):
    folder, factors, (_, key) = saved
    state = lora.freeze(optax.sgd(1e-3, momentum=0.9)).init(factors), key
    with pytest.raises(
        lora.AdapterFileError, match=r"run/3 is of another run: as 'state/.*nothing"
    ):
        lora.restore_checkpoint(folder, factors, state)


def test_a_checkpoint_of_something_else_is_refused(saved):
    """One that plain orbax wrote, and a folder that merely has a number for a name."""
    import orbax.checkpoint as ocp

    folder, *given = saved
    with ocp.CheckpointManager(folder.absolute()) as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    before = snapshot(folder)
    with pytest.raises(lora.AdapterFileError, match=r"run/5 is damaged or no checkpoint"):
        lora.restore_checkpoint(folder, *given)
    with pytest.raises(lora.AdapterFileError, match=r"run/5 is damaged or no checkpoint"):
        lora.save_checkpoint(folder, 6, *given)
    assert snapshot(folder) == before
    shutil.rmtree(folder / "5")
    (folder / "7").mkdir()
    with pytest.raises(lora.AdapterFileError, match=r"run/7 is damaged or no checkpoint"):
        lora.restore_checkpoint(folder, *given)


def test_steps_are_written_once_and_in_order(saved, tmp_path):
    folder, *given = saved
    before = snapshot(folder)
    for step in (1, 3):
        with pytest.raises(lora.AdapterFileError, match=f"run/3 is there already, and step {step}"):
            lora.save_checkpoint(folder, step, *given)
    with pytest.raises(lora.AdapterFileError, match=r"run/8 does not exist; .*\[2, 3\]"):
        lora.restore_checkpoint(folder, *given, step=8)
    assert snapshot(folder) == before
    found = lora.restore_checkpoint(tmp_path / "none", *given)
    assert found == (*given, 0)
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_saved_is_said(tmp_path):
    factors = lora.init(jax.random.key(0), W, [run.RULES[0]])
    other = lora.init(jax.random.key(0), W, [lora.Full("w")])
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    for call, says in [
        (lambda: lora.save_checkpoint(tmp_path, -1, factors, ()), r"step=-1; wanted at least 0"),
        (lambda: lora.save_checkpoint(tmp_path, 1.5, factors, ()), r"step=1\.5; wanted a whole"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, (), keep=0), r"keep=0; wanted at le"),
        (lambda: lora.save_checkpoint(tmp_path, 1, W, ()), r"factors hold no adapter node"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, {"lr": 0.1}), r"'state/lr' is 0\.1"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, {"e": jnp.zeros((0, 3))}), r"'state/e' is float32\[0, 3\]; wanted one number"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, {"e": jnp.ones(2, jnp.uint4)}), r"'state/e' is uint4\[2\]"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, {"e": np.array(["a"])}), r"'state/e' is <U1\[1\]"),
        (lambda: lora.save_checkpoint(tmp_path, 1, factors, twice), "2 leaves have the path 'state/a/b'; wanted one"),
        (lambda: lora.save_checkpoint(tmp_path, 1, {"a/b": factors["w"], "a": {"b": other["w"]}}, ()), "2 leaves have the path 'factors/a/b'; wanted one"),
    ]:  # fmt: skip
        with pytest.raises(lora.LoraError, match=says):
            call()
    assert not list(tmp_path.iterdir())


def test_a_quantised_state_is_refused(tmp_path):
    factors = lora.init(jax.random.key(0), W, [run.RULES[0]])
    quantised = lora.quantize({"w": jnp.ones((8, 8))}, "w", block=8)
    with pytest.raises(lora.LoraError, match="'state/w' is quantised"):
        lora.save_checkpoint(tmp_path, 1, factors, quantised)
    assert not list(tmp_path.iterdir())


def test_complex_numbers_and_four_bits_come_back(tmp_path):
    factors = lora.init(jax.random.key(0), W, [run.RULES[0]])
    state = {"z": jnp.array([1 + 2j, -3j]), "few": jnp.array([-8, 7, 0], jnp.int4)}
    lora.save_checkpoint(tmp_path, 1, factors, state)
    _, found, _ = lora.restore_checkpoint(tmp_path, factors, state)
    assert same(found, state)
    assert {name: x.dtype for name, x in found.items()} == {"z": jnp.complex64, "few": jnp.int4}
