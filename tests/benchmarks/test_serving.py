"""The serving benchmark, on its smallest model."""

import json

from benchmarks import serving


def test_every_way_answers_alike_and_is_measured(tmp_path):
    """`main` itself refuses to time ways that differ in what they answer."""
    figures = serving.main(["--smoke", f"--json={tmp_path / 'serving.json'}"])
    ways = ("batched", "by hand", "a pass each")
    assert list(figures) == ["merged", *(f"{way}, {n}" for n in (1, 8) for way in ways)]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in figures.values())
    assert figures["batched, 8"]["stacked"] == 8 * figures["batched, 1"]["stacked"]
    # Not one array more for more adapters: each example's factors are all that is gathered.
    assert figures["batched, 8"]["temp"] <= 1.05 * figures["batched, 1"]["temp"] + 1024
    assert json.loads((tmp_path / "serving.json").read_text())["rows"] == figures
