"""Bad input of `load_llm2vec` and of its encoder: one clear error, and no weights loaded before it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModel, PreTrainedModel

from bidirect_patch import BidirectPatchError, load_llm2vec
from bidirect_patch.errors import ConfigError

from ..helpers.llm2vec_folders import change_json, make_tokenizer, write_settings

pytest.importorskip("sentence_transformers.base.modules", reason="sentence-transformers 5.4 or newer isn't installed")


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModel, "from_pretrained", load)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)


BAD_ARGUMENTS = [
    ({"pooling_mode": "max"}, "pooling_mode must be one of mean, weighted_mean.*got 'max'"),
    ({"pooling_mode": ["mean"]}, "pooling_mode must be one of"),
    ({"max_length": 0}, "max_length must be .*got 0"),
    ({"max_length": True}, "max_length must be .*got True"),
    ({"max_length": 10**30}, "max_length must be"),
    ({"max_length": 12.0}, "max_length must be"),
    ({"doc_max_length": -1}, "doc_max_length must be .*got -1"),
    ({"skip_instruction": "no"}, "skip_instruction must be True or False; got 'no'"),
    ({"merge_peft": True}, "merge_peft=True: .*always merged"),
    ({"enable_bidirectional": False}, "enable_bidirectional=False: .*disable_bidirectional"),
    ({"peft": "/no/such/adapter"}, "peft=/no/such/adapter: no folder or hub name with an adapter_config.json"),
    ({"peft": 5}, "peft must be a folder or hub name; got 5"),
]


@pytest.mark.parametrize("arguments, says", BAD_ARGUMENTS)
def test_arguments(bases, nothing_is_loaded, arguments, says):
    with pytest.raises(ConfigError, match=says):
        load_llm2vec(bases(), **arguments)


@pytest.mark.parametrize("base", ["/no/such/folder", "no-such-name", "nobody/has-this", "", None, 3, b"bytes"])
def test_a_base_that_is_not_there(nothing_is_loaded, base):
    with pytest.raises(ConfigError, match="^base"):
        load_llm2vec(base)


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"pooling_mode": "cls"}', r"pooling_mode in .*llm2vec_config.json must be one of"),
        ('{"max_length": 0}', "max_length in .*llm2vec_config.json must be"),
        ('{"pooling": "mean"}', "'pooling' in .*llm2vec_config.json is no setting of LLM2Vec"),
        ("[1]", "must hold an object"),
        ("{", "can't read .*llm2vec_config.json"),
        ("\xff", "can't read .*llm2vec_config.json"),
    ],
)
def test_a_settings_file(bases, tmp_path, nothing_is_loaded, text, says):
    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    (folder / "llm2vec_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says):
        load_llm2vec(folder)


@pytest.fixture
def written_adapter(adapter):
    return adapter()


@pytest.mark.parametrize("named", [None, "", "/no/such/base"])
def test_an_adapter_whose_base_is_not_there(written_adapter, nothing_is_loaded, named):
    change_json(Path(written_adapter) / "adapter_config.json", base_model_name_or_path=named)
    with pytest.raises(ConfigError, match="is an adapter, and its base model .* can't be read: give the base model as base"):
        load_llm2vec(written_adapter)


def test_a_model_where_an_adapter_is_asked_for(bases, nothing_is_loaded):
    with pytest.raises(ConfigError, match="^peft=.*adapter_config.json"):
        load_llm2vec(bases(), bases(bos=False))


def test_no_beginning_token_to_pool(bases, nothing_is_loaded):
    with pytest.raises(ConfigError, match="pooling_mode='bos_token' needs a tokenizer that puts its beginning token"):
        load_llm2vec(bases(bos=False), pooling_mode="bos_token")


def test_nothing_to_pad_with(bases, tmp_path, nothing_is_loaded):
    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="neither an end token nor a padding token"):
        load_llm2vec(folder)


def test_a_folder_without_a_tokenizer(bases, tmp_path, nothing_is_loaded):
    shutil.copy(Path(bases()) / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="can't load"):
        load_llm2vec(tmp_path)


def test_a_folder_without_weights(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match="can't load"):
        load_llm2vec(folder)


def test_a_model_that_cannot_be_bidirectional(bases, tmp_path):
    from transformers import BertConfig, BertModel

    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=200, **sizes)).save_pretrained(folder)
    with pytest.raises(BidirectPatchError):
        load_llm2vec(folder)


@pytest.mark.parametrize(
    "inputs, prompt, says",
    [
        ([["one", "two", "three"]], None, "a text, or a pair of an instruction and a text"),
        ([["instruction", "text"]], "another", "prompt='another' is given, and an input with an instruction"),
    ],
)
def test_inputs(bases, inputs, prompt, says):
    encoder = load_llm2vec(bases())
    with pytest.raises(ConfigError, match=says):
        encoder[0].preprocess(inputs, prompt=prompt)


def test_a_limit_that_has_no_meaning_changes_nothing(bases):
    encoder = load_llm2vec(bases())
    with pytest.raises(ConfigError, match="max_length must be"):
        encoder.max_seq_length = 0
    assert encoder.max_seq_length == 512


def test_a_saved_pooling_mode_that_is_unknown(bases, tmp_path):
    from sentence_transformers import SentenceTransformer

    load_llm2vec(bases()).save_pretrained(str(tmp_path))
    write_settings(tmp_path, pooling_mode="cls")
    with pytest.raises(ConfigError, match="pooling_mode must be one of"):
        SentenceTransformer(str(tmp_path), device="cpu")
    assert json.loads((tmp_path / "llm2vec_config.json").read_text()) == {"pooling_mode": "cls"}
