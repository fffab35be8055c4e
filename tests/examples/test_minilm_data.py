"""The task: nothing leaks, nothing stands in two splits, and reading runs no code."""

import collections
import itertools
import re
import sys

import numpy as np
import pytest
from minilm import data, weights

LENGTH = 32


@pytest.fixture(scope="module")
def examples():
    return data.collect()


@pytest.fixture(scope="module")
def tokenizer():
    return weights.load_tokenizer(LENGTH)


@pytest.fixture(scope="module")
def splits(examples, tokenizer):
    return data.load(examples, tokenizer)


def test_no_text_holds_a_packages_name(examples):
    named = [e for e in examples if any(name in e.text.lower() for name in data.PACKAGES)]
    assert named == []


def test_no_text_holds_a_submodules_name_as_a_word(examples):
    # "email.message", "xml.etree": the second part of qualified names that go on with a class.
    submodules = {"message", "etree", "charset", "cookies", "handlers", "mock", "transports"}
    named = [e for e in examples if submodules & set(re.findall(r"[a-z]+", e.text.lower()))]
    assert named == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Open an HTTPConnection.", "Open an Connection."),
        ("See email.message and EMAIL_MESSAGE.", "See . and ."),
        ("messages of the server_close method", "messages of the close method"),
        ("Wrap a TarFile, not a tarfile.TarFile object", "Wrap a , not a . object"),
        ("DatetimeMessageError", "Error"),
    ],
)
def test_names_are_cut_out_whatever_their_case_and_company(text, left):
    mask = data.NameMask(["message", "server", "__main__", "_tarfile"])
    assert mask(text) == left


def test_no_object_is_in_two_splits(examples):
    by_split = collections.defaultdict(set)
    for example in examples:
        by_split[example.split].add(example.name)
    assert by_split.keys() == data.SPLITS.keys()
    for one, other in itertools.combinations(by_split.values(), 2):
        assert not one & other


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("logging.Logger.debug", "train"),
        ("asyncio.locks.Event.wait", "validation"),
        ("email.message.Message.get_payload", "test"),
    ],
)
def test_an_object_stays_in_its_split(name, split):
    assert data.Example(name, name.split(".")[0], "").split == split


def test_no_input_occurs_twice(splits):
    rows = [tuple(ids) for split in splits.values() for ids in split.ids.tolist()]
    assert len(rows) == len(set(rows))


def test_every_split_has_every_package_and_its_share_of_objects(splits):
    total = sum(map(len, splits.values()))
    assert total > 3000
    for name, share in data.SPLITS.items():
        assert len(splits[name]) / total == pytest.approx(share / 100, abs=0.03)
        assert set(splits[name].labels) == set(range(len(data.PACKAGES)))


def test_splits_are_arrays_of_one_length(splits):
    for split in splits.values():
        assert split.ids.shape == split.mask.shape == (len(split), LENGTH)
        assert split.ids.dtype == split.mask.dtype == split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.mask, split.ids != 0)


def test_a_limit_takes_the_first_of_each_split(examples, splits, tokenizer):
    for name, split in data.load(examples, tokenizer, limit=7).items():
        np.testing.assert_array_equal(split.ids, splits[name].ids[:7])


def test_equal_inputs_are_kept_once_and_not_at_all_if_ambiguous(tokenizer):
    examples = [
        data.Example("xml.a", "xml", "Return the answer."),
        data.Example("xml.b", "xml", "return the ANSWER."),  # the tokenizer lower-cases
        data.Example("xml.c", "xml", "Close it."),
        data.Example("http.c", "http", "Close it."),
    ]
    assert data.distinct(examples, tokenizer) == examples[:1]


@pytest.fixture
def stdlib(tmp_path):
    """A folder with a source for each package; importing any of them would fail."""
    for package in data.PACKAGES:
        source = '"""One two three four five."""\nraise SystemError\n'
        (tmp_path / f"{package}.py").write_text(source)
    return tmp_path


def test_sources_are_read_not_run(stdlib):
    modules = set(sys.modules)
    (stdlib / "xml.py").unlink()
    (stdlib / "xml" / "tests").mkdir(parents=True)
    (stdlib / "xml" / "tests" / "a.py").write_text('"""Tests are not taken for documentation."""')
    source = 'if True:\n    class B:\n        def f(self):\n            "Six seven eight nine XML."'
    (stdlib / "xml" / "a.py").write_text(source)
    (stdlib / "_pydecimal.py").write_text('def g():\n    "Implements what the package is."')
    examples = {example.name: example for example in data.collect(stdlib)}
    assert examples.keys() == set(data.PACKAGES) - {"xml"} | {"xml.a.B.f", "decimal.g"}
    assert examples["xml.a.B.f"] == data.Example("xml.a.B.f", "xml", "Six seven eight nine .")
    assert set(sys.modules) == modules


def test_missing_sources_are_told(stdlib):
    (stdlib / "xml.py").unlink()
    with pytest.raises(SystemExit, match="No sources of xml in "):
        data.collect(stdlib)
