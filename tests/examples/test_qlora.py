"""The QLoRA example on a corner of its data: what it prints is what it holds."""

import numpy as np
import pytest
import qlora

QUICK = ["--limit=200", "--batch=16", "--length=8", "--steps=4", "--lr=0.01"]


@pytest.mark.parametrize("start", [[], ["--loftq"]], ids=["plain", "loftq"])
def test_learns_on_a_quarter_of_the_bytes(start, capsys):
    results = qlora.main([*QUICK, *start])
    assert results["bytes"]["nf4"] < 0.2 * results["bytes"]["float32"]
    losses = {name: np.array(values) for name, values in results["losses"].items()}
    assert np.ptp(losses["nf4"]) > 0.1  # the steps move something
    assert abs(losses["nf4"][0] - losses["float32"][0]) < 0.5
    out = capsys.readouterr().out
    assert "384×384 nf4" in out
    assert f"LoRA on nf4: base of {results['bytes']['nf4']:,} bytes" in out
