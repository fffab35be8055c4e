"""The sweep: every adapter in one step, and the best one as it is alone."""

import json

import pytest
import sweep_many_adapters
from safetensors.numpy import load_file

QUICK = ["--limit=60", "--batch=8", "--length=8", "--steps=3"]


def test_a_small_sweep_trains_writes_and_agrees(tmp_path, capsys):
    results = sweep_many_adapters.main([
        *QUICK, "--ranks", "1", "3", "--alphas", "4", "--rates", "1e-3", "1e-2", "--check",
        f"--out={tmp_path}",
    ])  # fmt: skip
    assert results["difference"] < 1e-4
    trials = results["trials"]
    assert [(t["rank"], t["rate"]) for t in trials] == [(1, 1e-3), (1, 1e-2), (3, 1e-3), (3, 1e-2)]
    head, adapted = 384 * 26 + 26, 6 * (4 * (384 + 384) + 2 * (384 + 1536))
    assert [t["parameters"] for t in trials] == [head + r * adapted for r in (1, 1, 3, 3)]
    assert len({t["losses"][-1] for t in trials}) == 4  # each goes its own way
    assert {t["losses"][0] for t in trials} == {trials[0]["losses"][0]}  # from one start
    best = max(t["validation"] for t in trials)
    assert trials[results["best"]]["validation"] == best
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "sweep.png").stat().st_size > 20_000
    saved = load_file(tmp_path / "best.safetensors")
    assert sum(x.size for x in saved.values()) == trials[results["best"]]["parameters"]
    assert "  best\n" in capsys.readouterr().out


def test_help_tells_what_is_swept(capsys):
    with pytest.raises(SystemExit, match="0"):
        sweep_many_adapters.main(["--help"])
    assert "--rates" in capsys.readouterr().out
