"""The examples for several devices, on eight: their losses are those of one."""

import fsdp_mesh
import jax
import numpy as np
import pmap_data_parallel
import pytest
import shard_map_data_parallel

EXAMPLES = [pmap_data_parallel, shard_map_data_parallel, fsdp_mesh]
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
