"""The decoder that recipes of sentence-transformers start from."""

import pytest

from ..helpers.sentences import write_folder


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """The folder of a decoder, whose tokenizer puts a beginning token before each text."""
    from transformers import AutoTokenizer

    from bidirect_patch.cli.sink_token import prepend_sink_token

    folder = tmp_path_factory.mktemp("place")
    write_folder(folder)
    prepend_sink_token(AutoTokenizer.from_pretrained(folder / "model"), "<s>").save_pretrained(folder / "model")
    return str(folder / "model")
