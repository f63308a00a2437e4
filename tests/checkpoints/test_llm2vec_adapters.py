"""Adapters as LLM2Vec published them: their layout, and how they are known."""

import json
import warnings

import pytest
from safetensors.torch import load_file, save_file

from bidirect_patch import enable_bidirectional

from ..helpers.processes import in_a_new_process
from ..helpers.saved import WAYS_TO_LOAD, encode, load_adapter, lora, same
from ..helpers.tiny_models import tiny_model

CLASSES_OF_LLM2VEC = {
    "the package": ("LlamaBiModel", "llm2vec.models.bidirectional_llama"),
    "code on the hub": ("LlamaEncoderModel", "transformers_modules.mntp.modeling_llama_encoder"),
    "a script": ("LlamaEncoderModel", "__main__"),
}


def publish(folder, kind):
    """Write adapter files as LLM2Vec's were published, over a tiny `LlamaModel`; return what they should give."""
    pytest.importorskip("peft")
    model = lora(tiny_model(head=False))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = dict(zip(("base_model_class", "parent_library"), CLASSES_OF_LLM2VEC[kind]))
    path.write_text(json.dumps(config))
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert all(key.startswith("base_model.model.layers.") for key in keys)
    return encode(enable_bidirectional(model))


@pytest.fixture(params=CLASSES_OF_LLM2VEC)
def published(tmp_path, request):
    """A folder with such files, and what they should give."""
    return tmp_path, publish(tmp_path, request.param)


@pytest.mark.parametrize("through", WAYS_TO_LOAD)
def test_published_adapters_load_and_are_known_to_be_bidirectional(published, auto, through):
    folder, want = published
    same(encode(load_adapter(tiny_model(head=False), folder, through)), want)


def test_published_adapters_onto_a_causal_model_warn_without_auto(published, only_warns):
    import peft

    with pytest.warns(UserWarning, match="trained with bidirectional attention"):
        peft.PeftModel.from_pretrained(tiny_model(head=False), str(published[0]))


def test_published_adapters_load_onto_a_model_with_a_head(published, auto):
    """Its keys lack the `model.` of a *ForCausalLM; left at that, PEFT would load none of them."""
    import peft

    folder, want = published
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = peft.PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
    same(encode(model.get_base_model().model), want)


def test_keys_of_a_model_with_a_head_load_onto_a_bare_one(published, auto):
    import peft

    folder, want = published
    path = folder / "adapter_model.safetensors"
    weights = {key.replace("model.layers", "model.model.layers"): value for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    same(encode(peft.PeftModel.from_pretrained(tiny_model(head=False), str(folder)).eval()), want)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["bidirect_patch", "peft"])
def test_an_adapter_is_known_and_fitted_before_anything_is_enabled(tmp_path, first):
    """`import bidirect_patch` alone: loading LLM2Vec's layout onto a *ForCausalLM warns, and the weights arrive."""
    tiny_model().save_pretrained(tmp_path / "base")
    for kind in CLASSES_OF_LLM2VEC:
        publish(tmp_path / kind, kind)
    code = """
import sys, warnings
first, base, *folders = sys.argv[1:]
if first == "peft":
    import peft
import bidirect_patch
from transformers import AutoModelForCausalLM
from peft import PeftModel
for folder in folders:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    print(any("trained with bidirectional attention" in str(w.message) for w in caught))
    print(all(float(p.abs().sum()) > 0 for n, p in model.named_parameters() if "lora_B" in n))
"""
    folders = [tmp_path / kind for kind in CLASSES_OF_LLM2VEC]
    assert in_a_new_process("-c", code, first, tmp_path / "base", *folders).split() == ["True"] * 2 * len(folders)
