"""`save_merged`: folders that need neither the adapters nor PEFT, and say that they are bidirectional."""

import contextlib
import json

import pytest
import torch
from packaging.version import Version

from bidirect_patch import disable_bidirectional, enable_bidirectional, is_bidirectional, save_merged
from bidirect_patch.errors import ArgumentError, UnsupportedModelError

from ..helpers.processes import in_a_new_process
from ..helpers.saved import config_of, encode, lora, same, told_of_causal_loading
from ..helpers.sentences import write_folder
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import TRANSFORMERS, lacks_add_adapter

peft = pytest.importorskip("peft")

TEXTS = ["w1 w2 w3 w4", "w5", "w6 w7 w8"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def by_transformers(model, **settings):
    """Put an adapter on by transformers' own `add_adapter`, in place."""
    if reason := lacks_add_adapter():
        pytest.skip(reason)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings))
    return model.eval()


def enabled(folder):
    """The saved model, loaded and then made bidirectional."""
    with told_of_causal_loading():
        model = type(tiny_model(head=False)).from_pretrained(folder)
    return enable_bidirectional(model)


@pytest.mark.parametrize("put", [by_transformers, lora], ids=["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("both", [True, False], ids=["bidirectional", "causal"])
def test_a_merged_folder_gives_what_the_model_gave(tmp_path, put, both):
    model = tiny_model(head=False)
    bare = encode(enable_bidirectional(model) if both else model)
    model = put(model)
    want = encode(model)
    assert (want - bare).abs().max() > 0.1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_merged(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(encode(model), want) and is_bidirectional(model) == both
    assert not (tmp_path / "adapter_config.json").exists()
    assert config_of(tmp_path).get("is_causal", True) is not both
    with told_of_causal_loading() if both else contextlib.nullcontext():
        opened = type(tiny_model(head=False)).from_pretrained(tmp_path).eval()
    if both and not is_bidirectional(opened):
        enable_bidirectional(opened)
    same(encode(opened), want)


def test_the_active_adapter_of_two_is_merged(tmp_path):
    model = by_transformers(enable_bidirectional(tiny_model(head=False)))
    first = encode(model)
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), adapter_name="other")
    model.set_adapter("default")
    same(encode(model), first)
    save_merged(model, tmp_path)
    same(encode(enabled(tmp_path)), first)


def test_a_layer_that_was_trained_whole_is_saved_as_trained(tmp_path):
    model = by_transformers(enable_bidirectional(tiny_model(head=False)), modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    want = encode(model)
    save_merged(model, tmp_path)
    same(encode(enabled(tmp_path)), want)


def test_bad_input_writes_nothing(tmp_path):
    model = tiny_model()
    folder = tmp_path / "new"
    for wrong in (None, object(), torch.nn.Linear(2, 2), "model"):
        with pytest.raises(ArgumentError, match="save_merged takes"):
            save_merged(wrong, folder)
    (tmp_path / "file").write_text("")
    for wrong in (None, 3, tmp_path / "file"):
        with pytest.raises(ArgumentError, match="writes to a folder"):
            save_merged(model, wrong)
    prompt = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING.*can't be merged"):
        save_merged(prompt, folder)
    assert not folder.exists()


# A SentenceTransformer, opened in a process that has never heard of this package, and after `import bidirect_patch.auto` again.

ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer

def encode():
    encoder = SentenceTransformer(sys.argv[1], device="cpu")
    encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    return encoder.encode(sys.argv[2:]).tolist()

stock = encode()
assert "bidirect_patch" not in sys.modules
import bidirect_patch.auto
print(json.dumps([stock, encode()]))
"""


@pytest.mark.slow
def test_a_sentence_transformer_opens_merged_in_a_new_process(tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
    write_folder(tmp_path)
    encoder = enable_bidirectional(st.SentenceTransformer(str(tmp_path / "model"), device="cpu"))
    encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    if lacks_add_adapter():
        encoder[0].model = lora(encoder[0].model)
    else:
        torch.manual_seed(0)
        encoder.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    want = torch.tensor(encoder.encode(TEXTS))
    save_merged(encoder, tmp_path / "merged")
    same(torch.tensor(encoder.encode(TEXTS)), want)
    causal = torch.tensor(disable_bidirectional(encoder).encode(TEXTS))
    assert (causal - want).abs().max() > 1e-2
    assert not list((tmp_path / "merged").rglob("adapter_*"))
    stock, auto = map(torch.tensor, json.loads(in_a_new_process("-c", ENCODE, tmp_path / "merged", *TEXTS).splitlines()[-1]))
    same(auto, want)
    # before 5.2, stock transformers knows no flag, and the merged weights run causally
    same(stock, want if TRANSFORMERS >= Version("5.2") else causal)
