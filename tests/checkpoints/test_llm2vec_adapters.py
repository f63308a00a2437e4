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


@pytest.fixture(params=CLASSES_OF_LLM2VEC)
def published(tmp_path, request):
    """Adapter files as LLM2Vec's were published, over a tiny `LlamaModel`; and what they should give."""
    pytest.importorskip("peft")
    model = lora(tiny_model(head=False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = dict(zip(("base_model_class", "parent_library"), CLASSES_OF_LLM2VEC[request.param]))
    path.write_text(json.dumps(config))
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(key.startswith("base_model.model.layers.") for key in keys)
    return tmp_path, encode(enable_bidirectional(model))


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
@pytest.mark.parametrize(
    "published, first",
    [("the package", "bidirect_patch"), ("code on the hub", "peft"), ("a script", "bidirect_patch")],
    indirect=["published"],
)
def test_an_adapter_is_known_and_fitted_before_anything_is_enabled(published, tmp_path, first):
    """`import bidirect_patch` alone: loading LLM2Vec's layout onto a *ForCausalLM warns, and the weights arrive."""
    folder = published[0]
    tiny_model().save_pretrained(tmp_path / "base")
    code = """
import sys, warnings
if sys.argv[3] == "peft":
    import peft
import bidirect_patch
from transformers import AutoModelForCausalLM
from peft import PeftModel
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(any("trained with bidirectional attention" in str(w.message) for w in caught))
print(all(float(p.abs().sum()) > 0 for n, p in model.named_parameters() if "lora_B" in n))
"""
    assert in_a_new_process("-c", code, tmp_path / "base", folder, first).split() == ["True", "True"]
