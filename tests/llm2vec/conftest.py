"""Bases that the tests of this folder share."""

import pytest

from ..helpers.llm2vec_folders import make_tokenizer, write_adapter, write_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """`base(family, **how the tokenizer is made)`: the folder of a tiny model, written once."""
    written = {}

    def base(family="llama", name="", **how):
        key = (family, name, *sorted(how.items()))
        if key not in written:
            folder = tmp_path_factory.mktemp("base")
            written[key] = str(write_base(folder, family, name, make_tokenizer(**how)))
        return written[key]

    return base


@pytest.fixture
def adapter(bases, tmp_path):
    """`adapter(**settings)`: a new adapter over the plain Llama, with a llm2vec_config.json if there are settings."""
    pytest.importorskip("peft", reason="the folder holds an adapter")

    def make(name="adapter", **settings):
        return str(write_adapter(tmp_path / name, bases(), **settings))

    return make
