"""The comparison with other libraries: those that need nothing more are run, the rest is checked."""

import json

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.rivals import problem, structures

SIZES = problem.Sizes(layers=1, width=32, batch=2, length=8, rank=2, alpha=6)


def test_a_problem_is_read_as_it_was_written(tmp_path):
    made = peers.make(SIZES)
    problem.write(tmp_path, made)
    read = problem.read(tmp_path)
    assert read.sizes == SIZES
    for kind in ("weights", "a", "b"):
        written, found = getattr(made, kind), getattr(read, kind)
        assert set(written) == set(found)
        assert all(np.array_equal(written[path], found[path]) for path in written)
    assert set(read.a) == {path for path in read.weights if path.endswith("kernel")}
    assert all(np.abs(b).max() > 0 for b in read.b.values())


def test_ours_and_the_hand_written_one_agree_and_are_timed(tmp_path, capsys):
    file, picture = tmp_path / "peers.json", tmp_path / "peers.png"
    peers.main([*["--smoke", "--rounds", "1", "--peers", "lorax_fn", "handwritten", "--json"],
                str(file), "--picture", str(picture)])  # fmt: skip
    report = json.loads(file.read_text())
    ours, by_hand = report["costs"]["smoke"].values()
    assert ours["losses"] == pytest.approx(by_hand["losses"], abs=1e-4)
    assert ours["losses"][2] < ours["losses"][0] - 0.01  # the steps move something
    assert ours["trained"] == by_hand["trained"]
    assert ours["flops"] <= by_hand["flops"]
    assert ours["processor_ratio"] == ours["clock_ratio"] == 1
    assert set(report["structures"]["lorax_fn"].values()) == {"yes"}
    assert "by hand, in Linen" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_library_that_computes_something_else_is_not_compared():
    rows = {name: {"losses": [2.0, 1.5, 1.0]} for name in ("lorax_fn", "qwix", "nnx")}
    rows["nnx"]["losses"] = [2.0, 1.6, 1.2]  # it has no alpha: the first loss alone is compared
    peers.check(rows)
    rows["qwix"]["losses"] = [2.0, 1.5, 1.001]
    with pytest.raises(ValueError, match=r"qwix has loss 1\.001.* after 2 steps"):
        peers.check(rows)


def test_what_cannot_be_adapted_is_said_with_its_reason():
    def refuse():
        raise TypeError("no rule for scan\nand more lines")

    assert structures.attempt(refuse) == "TypeError: no rule for scan"
    assert structures.judge(None, {}, None) == "no factors were made"
    x = np.ones(3, np.float32)
    assert structures.judge(lambda f, x: x * f["a"].sum(), {"a": x}, x) == "yes"
    assert structures.judge(lambda f, x: x, {"a": x}, x) == "the factors change nothing"
    two = {"a": x, "b": x}
    assert structures.judge(lambda f, x: x * f["a"], two, x) == "a factor has no gradient"
    answers = {name: dict.fromkeys(structures.MODELS, "yes") for name in ("lorax_fn", "qwix")}
    answers["qwix"]["embedding"] = "no factors were made"
    table = peers.coverage(answers)
    assert "no (1)" in table
    assert table.endswith("(1) no factors were made")
