"""The examples for several devices, on eight: their losses are those of one."""

import fsdp_mesh
import fsdp_scan
import jax
import numpy as np
import pmap_data_parallel
import pytest
import shard_map_data_parallel
from jax.sharding import NamedSharding, PartitionSpec as P

from benchmarks.collectives import collectives

EXAMPLES = [pmap_data_parallel, shard_map_data_parallel, fsdp_mesh, fsdp_scan]
QUICK = ["--limit=400", "--batch=16", "--length=8", "--lr=0.01"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda module: module.__name__)
def test_eight_devices_learn_as_one_does(example, capsys):
    assert jax.device_count() == 8
    results = example.main([*QUICK, "--steps=4", "--check"])
    assert len(results["losses"]) == 4
    assert np.ptp(results["losses"]) > 0.1  # the steps move something
    assert results["difference"] < 1e-4
    assert "8 devices; 90,301,544 bytes are frozen, 1,367,144 trained" in capsys.readouterr().out


def test_a_batch_that_does_not_divide_is_refused(capsys):
    with pytest.raises(SystemExit):
        pmap_data_parallel.main([*QUICK, "--batch=12"])
    assert "--batch 12 does not divide among 8 devices" in capsys.readouterr().err


def test_under_fsdp_kernels_are_gathered_layer_by_layer_and_only_factors_gradients_reduced(capsys):
    job, mesh = fsdp_scan.make_job([*QUICK, "--steps=2"])
    batch = jax.device_put(next(job.batches()), NamedSharding(mesh, P("fsdp")))
    state = jax.jit(job.tx.init)(job.factors)
    step = fsdp_scan.make_step(job)
    moved = collectives(step.lower(job.variables, job.factors, state, batch).compile().as_text())

    layer = job.variables["params"]["bert"]["encoder"]["layer"]
    kernels = [leaf for leaf in jax.tree.leaves(layer) if leaf.ndim == 3]
    layers, sizes = kernels[0].shape[0], [kernel[0].size for kernel in kernels]
    gathered = [c for c in moved if c.kind == "all-gather" and c.size in sizes]
    assert sorted(c.size for c in gathered) == sorted(2 * sizes)  # forward, and again backward
    assert {c.times for c in gathered} == {layers}
    assert max(c.size for c in moved) == max(sizes)  # never the stack

    reduced = sum(c.times * c.size for c in moved if "reduce" in c.kind)
    trained = sum(leaf.size for leaf in jax.tree.leaves(job.factors))
    assert trained <= reduced < 1.01 * trained  # beside them a loss and what a batch is counted by
