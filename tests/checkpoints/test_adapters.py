"""What a bidirectional model leaves on disk and how it opens again: checkpoints, shards, the Hub, GGUF, adapters."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.checkpoints.load import says_bidirectional

from ..conftest import TRANSFORMERS, lacks_add_adapter, tiny_config, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
HONOURS_THE_FLAG = pytest.mark.skipif(
    Version("5.2") > TRANSFORMERS, reason=f"transformers {TRANSFORMERS} doesn't know is_causal in a config"
)


@torch.no_grad()
def encode(model):
    """What the model gives for the real tokens of IDS: (10, width)."""
    return model(input_ids=IDS, attention_mask=MASK)[0][MASK.bool()]


@torch.no_grad()
def reaches_back(model):
    """Whether the first position's output depends on the last token."""
    other = IDS.clone()
    other[0, -1] = 20
    return not torch.equal(model(input_ids=IDS)[0][0, 0], model(input_ids=other)[0][0, 0])


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Checkpoints


def test_what_is_saved_says_so_and_saving_changes_nothing(tmp_path):
    model = enable_bidirectional(tiny_model())
    before, config, attributes = encode(model), copy.deepcopy(model.config.to_dict()), set(vars(model))
    config_object = model.config
    model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["is_causal"] is False
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert model.config is config_object and model.config.to_dict() == config and set(vars(model)) == attributes
    assert torch.equal(encode(model), before)


def test_a_failing_save_leaves_the_model_as_it_was(tmp_path):
    model = enable_bidirectional(tiny_model())
    config_object, attributes = model.config, set(vars(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception):  # noqa: B017  (which one is transformers' affair)
        model.save_pretrained(tmp_path / "file" / "folder")
    assert model.config is config_object and set(vars(model)) == attributes


def test_a_causal_model_saves_no_flag(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "stock")
    enable_bidirectional(model)
    with bidirectional(model, enabled=False):
        model.save_pretrained(tmp_path / "island")
    disable_bidirectional(model).save_pretrained(tmp_path / "disabled")
    for folder in ("stock", "island", "disabled"):
        assert "is_causal" not in config_of(tmp_path / folder)


@HONOURS_THE_FLAG
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_stock_transformers_opens_it_equal_to_ours(tmp_path, only_warns, family):
    model = enable_bidirectional(tiny_model(family, sliding_window=32) if family == "mistral" else tiny_model(family))
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is getattr(transformers, type(model).__name__)
    assert type(opened.model) in (transformers.LlamaModel, transformers.MistralModel)  # not ours
    same(encode(opened), encode(model))


def test_without_the_flag_the_same_weights_give_something_else(tmp_path):
    model = enable_bidirectional(tiny_model())
    ours = encode(model)
    disable_bidirectional(model).save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(encode(opened), ours, atol=1e-2)


@pytest.mark.parametrize("opener", ["AutoModelForCausalLM", "AutoModel", "LlamaModel"])
def test_with_auto_each_version_opens_it_bidirectional(tmp_path, auto, opener):
    model = enable_bidirectional(tiny_model())
    model.save_pretrained(tmp_path)
    opened, info = getattr(transformers, opener).from_pretrained(tmp_path, output_loading_info=True)
    assert is_bidirectional(opened) and reaches_back(opened) and not info["missing_keys"]
    same(encode(opened), encode(model if opener == "AutoModelForCausalLM" else model.model))
    opened.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["is_causal"] is False


def test_with_auto_a_causal_checkpoint_stays_causal(tmp_path, auto):
    tiny_model().save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_bidirectional(opened) and not reaches_back(opened)


def test_importing_auto_is_all_it_takes(tmp_path):
    enable_bidirectional(tiny_model()).save_pretrained(tmp_path)
    script = """
import sys, bidirect_patch.auto, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
a, b = (model(input_ids=torch.tensor([[5, 6, last]]))[0][0, 0] for last in (7, 8))
print("two ways" if type(model) is not transformers.LlamaModel and not torch.equal(a, b) else "one way")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split("\n")[0] == "two ways", done.stderr


def test_sharded_safetensors(tmp_path, auto):
    model = enable_bidirectional(tiny_model())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(encode(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), encode(model))


@pytest.fixture
def pushed(monkeypatch):
    """What `push_to_hub` uploads: bytes by file name."""
    import huggingface_hub
    from transformers import modeling_utils
    from transformers.utils import hub

    files = {}

    def create_repo(*args, repo_id=None, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id or next(a for a in args if '/' in str(a))}")

    def create_commit(*args, operations, **kwargs):
        for operation in operations:
            source = operation.path_or_fileobj
            files[operation.path_in_repo] = Path(source).read_bytes() if isinstance(source, (str, Path)) else source

    for name, stand_in in {"create_repo": create_repo, "create_commit": create_commit}.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, stand_in)
        for module in (hub, modeling_utils):  # transformers 4 and 5.0 to 5.2 import them by name
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *a, **k: huggingface_hub.ModelCard(""))
    return files


def test_push_to_hub_pushes_the_flag(pushed):
    enable_bidirectional(tiny_model()).push_to_hub("somebody/encoder")
    assert json.loads(pushed["config.json"])["is_causal"] is False
    assert "model.safetensors" in pushed


def test_a_composite_config_is_flagged_for_its_text_part(tmp_path, auto):
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **vision),
        text_config=tiny_config("llama"),
        image_token_index=3,
        image_seq_length=0,  # with no image in the text, 4.47 fails if it expects one
    )
    model = enable_bidirectional(transformers.LlavaForConditionalGeneration(config).eval())
    model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["text_config"]["is_causal"] is False
    assert "is_causal" not in saved["vision_config"] and "is_causal" not in saved
    assert getattr(model.config.text_config, "is_causal", None) is None
    opened = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert reaches_back(opened)
    same(encode(opened), encode(model))


@pytest.mark.slow
def test_a_gguf_source_saves(tmp_path, load_real, auto):
    model, tokenizer = load_real()
    ids = tokenizer("A model that was quantized", return_tensors="pt").input_ids
    with torch.no_grad(), bidirectional(model):
        before = model(input_ids=ids)[0]
        model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["is_causal"] is False and "quantization_config" not in saved
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        same(opened(input_ids=ids)[0], before)


# Adapters


def lora(model, seed=0, name="default", **settings):
    """`model` under a LoRA adapter that changes what it gives."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name).eval()


def test_an_adapter_may_be_put_on_before_or_after():
    pytest.importorskip("peft")
    before = enable_bidirectional(lora(tiny_model()))
    after = lora(enable_bidirectional(tiny_model()))
    assert torch.equal(encode(before), encode(after)) and reaches_back(before)
    assert not torch.allclose(encode(before), encode(enable_bidirectional(tiny_model())), atol=1e-2)
    assert not is_bidirectional(disable_bidirectional(after)) and not reaches_back(after)


def test_a_saved_adapter_is_marked_and_a_causal_one_is_not(tmp_path):
    pytest.importorskip("peft")
    model = lora(tiny_model())
    model.save_pretrained(tmp_path / "causal")
    assert not says_bidirectional(tmp_path / "causal")
    enable_bidirectional(model).save_pretrained(tmp_path / "both")
    assert says_bidirectional(tmp_path / "both")
    assert sorted(p.name for p in (tmp_path / "causal").iterdir()) == sorted(
        p.name for p in (tmp_path / "both").iterdir()
    )


WAYS_TO_LOAD = ("peft", "mixed", "transformers")


def load_adapter(base, folder, through):
    """`base` under the adapter in `folder`, in one of WAYS_TO_LOAD."""
    import peft

    if through == "transformers":
        base.load_adapter(str(folder))
        return base.eval()
    cls = {"peft": peft.PeftModel, "mixed": peft.PeftMixedModel}[through]
    return cls.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("through", WAYS_TO_LOAD)
@pytest.mark.parametrize("patched", [True, False])
def test_reload_onto_a_patched_or_an_unpatched_base(tmp_path, auto, patched, through):
    pytest.importorskip("peft")
    model = enable_bidirectional(lora(tiny_model()))
    model.save_pretrained(tmp_path)
    base = enable_bidirectional(tiny_model()) if patched else tiny_model()
    same(encode(load_adapter(base, tmp_path, through)), encode(model))


@pytest.mark.parametrize("through", WAYS_TO_LOAD)
def test_without_auto_loading_onto_a_causal_base_warns(tmp_path, only_warns, through):
    pytest.importorskip("peft")
    enable_bidirectional(lora(tiny_model())).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"call enable_bidirectional\(model\)"):
        assert not reaches_back(load_adapter(tiny_model(), tmp_path, through))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter")
        load_adapter(enable_bidirectional(tiny_model()), tmp_path, through)  # where it belongs


def test_a_folder_with_an_adapter_opens_through_transformers_too(tmp_path, auto):
    pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = enable_bidirectional(lora(base))
    model.save_pretrained(tmp_path / "adapter")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert reaches_back(opened)
    same(encode(opened), encode(model))


@pytest.fixture
def with_transformers_adapter():
    """A bidirectional model under an adapter that transformers put on."""
    peft = pytest.importorskip("peft")
    if reason := lacks_add_adapter():
        pytest.skip(reason)
    model = enable_bidirectional(tiny_model())
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.eval()


def test_an_adapter_saved_through_transformers_is_marked(tmp_path, auto, with_transformers_adapter):
    model = with_transformers_adapter
    model.save_pretrained(tmp_path)
    opened = tiny_model()
    opened.load_adapter(str(tmp_path))
    assert reaches_back(opened.eval())
    same(encode(opened), encode(model))
    disable_bidirectional(model).save_pretrained(tmp_path / "causal")
    assert not says_bidirectional(tmp_path / "causal")


def test_an_adapter_pushed_through_transformers_is_marked(tmp_path, pushed, with_transformers_adapter):
    """`push_to_hub=True` uploads before `save_pretrained` returns: the mark must be there by then."""
    with_transformers_adapter.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="somebody/adapter")
    assert json.loads(pushed["adapter_config.json"])["auto_mapping"] == {"is_causal": False}


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_mark_is_kept_beside_what_peft_writes_there(tmp_path, auto, task_type):
    """Through a causal model too, whose adapter it is no more than of any other: an adapter knows how it was trained."""
    peft = pytest.importorskip("peft")
    enable_bidirectional(lora(tiny_model(), task_type=task_type)).save_pretrained(tmp_path / "first")
    model = disable_bidirectional(peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "first")))
    model.save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        known = json.loads((tmp_path / folder / "adapter_config.json").read_text())["auto_mapping"]
        assert known.pop("is_causal") is False
        assert known.keys() == ({"base_model_class", "parent_library"} if task_type is None else set())


def test_merged(tmp_path, auto):
    pytest.importorskip("peft")
    model = enable_bidirectional(lora(tiny_model()))
    before = encode(model)
    merged = model.merge_and_unload()
    assert is_bidirectional(merged)
    same(encode(merged), before)
    merged.save_pretrained(tmp_path)
    assert config_of(tmp_path)["is_causal"] is False
    same(encode(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_several_adapters_are_each_marked_and_switch(tmp_path, auto):
    peft = pytest.importorskip("peft")
    model = enable_bidirectional(lora(lora(tiny_model(), name="first"), seed=1, name="second")).eval()
    want = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        want[name] = encode(model)
    assert not torch.allclose(want["first"], want["second"], atol=1e-2)
    model.save_pretrained(tmp_path)
    for name in ("first", "second"):
        assert says_bidirectional(tmp_path / name)
    opened = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "first"), adapter_name="first")
    opened.load_adapter(str(tmp_path / "second"), adapter_name="second")
    for name in ("first", "second"):
        opened.set_adapter(name)
        same(encode(opened.eval()), want[name])


def test_mntp_then_simcse_merge_first_then_the_second_adapter(tmp_path, auto):
    """The second adapter was trained over the merged first: the base alone isn't what it belongs to."""
    peft = pytest.importorskip("peft")
    mntp = enable_bidirectional(lora(tiny_model(head=False), seed=1))
    mntp.save_pretrained(tmp_path / "mntp")
    simcse = lora(mntp.merge_and_unload(), seed=2)
    simcse.save_pretrained(tmp_path / "simcse")
    opened = peft.PeftModel.from_pretrained(tiny_model(head=False), str(tmp_path / "mntp")).merge_and_unload()
    opened = peft.PeftModel.from_pretrained(opened, str(tmp_path / "simcse")).eval()
    same(encode(opened), encode(simcse))
    alone = peft.PeftModel.from_pretrained(tiny_model(head=False), str(tmp_path / "simcse")).eval()
    assert not torch.allclose(encode(alone), encode(simcse), atol=1e-2)


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


# --- a process that has enabled nothing yet ---


def in_a_new_process(code, *arguments):
    """stdout of `code`, its arguments in sys.argv."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("first", ["bidirect_patch", "peft"])
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
    assert in_a_new_process(code, tmp_path / "base", folder, first).split() == ["True", "True"]


def test_a_whole_model_opened_in_a_new_process_is_guarded(tmp_path):
    model = enable_bidirectional(tiny_model())
    torch.save(model, tmp_path / "model.pt")
    code = """
import sys, torch, json
model = torch.load(sys.argv[1], weights_only=False)
try:
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
except Exception as error:
    print(type(error).__name__)
model.save_pretrained(sys.argv[2])
print(json.load(open(sys.argv[2] + "/config.json"))["is_causal"])
"""
    assert in_a_new_process(code, tmp_path / "model.pt", tmp_path / "out").split() == ["GenerateError", "False"]


def test_auto_leaves_encoders_alone(tmp_path):
    from transformers import AutoModel, BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    config = BertConfig(**sizes)
    config.is_causal = False
    BertModel(config).save_pretrained(tmp_path)
    in_a_new_process(
        "import sys, bidirect_patch.auto\nfrom transformers import AutoModel\nAutoModel.from_pretrained(sys.argv[1])", tmp_path
    )
    assert AutoModel.from_pretrained(tmp_path).config.is_causal is False


def test_a_hybrid_patched_in_part_is_not_saved_as_bidirectional(tmp_path):
    from ..helpers import zoo

    if "lfm2" not in zoo.model_types():
        pytest.skip("this transformers has no LFM2")
    model = zoo.build("lfm2")
    enable_bidirectional(model, allow_partial=True).save_pretrained(tmp_path)
    assert "is_causal" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.skipif(TRANSFORMERS >= Version("5.2"), reason="there the flag is honoured, and the model is not causal")
def test_disabled_again_it_is_saved_without_the_flag(tmp_path):
    with bidirectional(model := tiny_model()):
        model.save_pretrained(tmp_path / "both")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert model.config.is_causal is False
    disable_bidirectional(enable_bidirectional(model)).save_pretrained(tmp_path / "causal")
    assert "is_causal" not in json.loads((tmp_path / "causal" / "config.json").read_text())
    assert model.config.is_causal is False
