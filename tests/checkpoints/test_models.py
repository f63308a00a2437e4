"""Whole models on disk: config.json, shards, the Hub, GGUF; stock transformers opens them, or `auto` does."""

import copy
import json
import textwrap

import pytest
import torch
import transformers
from packaging.version import Version

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional

from ..helpers import zoo
from ..helpers.one_text import reaches_back
from ..helpers.processes import in_a_new_process
from ..helpers.saved import HONOURS_THE_FLAG, config_of, encode, same, told_of_causal_loading
from ..helpers.tiny_models import tiny_config, tiny_model
from ..helpers.versions import TRANSFORMERS


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


def test_a_config_that_is_saved_by_itself_warns_while_its_model_is_bidirectional(tmp_path, recwarn):
    """It would open causal: the flag is written with the model."""
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    enable_bidirectional(model).save_pretrained(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path)
    copy.deepcopy(model.config).save_pretrained(tmp_path)
    assert not [w for w in recwarn if "saved by itself" in str(w.message)]
    with pytest.warns(UserWarning, match="LlamaModel was saved by itself.*save_pretrained of the model"):
        model.config.save_pretrained(tmp_path)
    disable_bidirectional(model).config.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "saved by itself" in str(w.message)]


def test_weights_that_accelerate_saves_by_themselves_give_a_warning(tmp_path, recwarn):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    accelerator = accelerate.Accelerator(cpu=True)
    told = lambda: len([w for w in recwarn if "writes the weights of a bidirectional LlamaForCausalLM" in str(w.message)])  # noqa: E731
    accelerator.save_model(model, tmp_path)
    enable_bidirectional(model)
    with bidirectional(model, enabled=False):
        accelerator.save_model(model, tmp_path)
    assert told() == 0
    accelerator.save_model(accelerator.prepare_model(model), tmp_path)
    assert told() == 1
    accelerator.save_model(disable_bidirectional(model), tmp_path)
    assert told() == 1


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
    assert in_a_new_process("-c", script, tmp_path).split("\n")[0] == "two ways"


def test_sharded_safetensors(tmp_path, auto):
    model = enable_bidirectional(tiny_model())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(encode(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), encode(model))


@pytest.mark.parametrize("sinks", [0, 1])
def test_a_config_that_is_nested_two_deep_is_flagged_where_its_decoder_reads_it(tmp_path, auto, sinks):
    if not hasattr(transformers, "ColQwen2ForRetrieval"):
        pytest.skip("this transformers has no ColQwen2")
    special = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(vocab_size=96, bos_token_id=1, eos_token_id=2, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=1)
    vlm = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    torch.manual_seed(0)
    model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=vlm.to_dict(), embedding_dim=16)).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    enable_bidirectional(model, num_sink_tokens=sinks)
    with torch.no_grad():
        want = model(**batch)[0]
    model.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["vlm_config"]["text_config"]["is_causal"] is False
    assert "is_causal" not in saved and "is_causal" not in saved["vlm_config"]
    opened = transformers.ColQwen2ForRetrieval.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        same(opened(**batch)[0], want)


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
    assert in_a_new_process("-c", code, tmp_path / "model.pt", tmp_path / "out").split() == ["GenerateError", "False"]


def test_auto_leaves_encoders_alone(tmp_path):
    from transformers import AutoModel, BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    config = BertConfig(**sizes)
    config.is_causal = False
    BertModel(config).save_pretrained(tmp_path)
    code = "import sys, bidirect_patch.auto\nfrom transformers import AutoModel\nAutoModel.from_pretrained(sys.argv[1])"
    in_a_new_process("-c", code, tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.is_causal is False


def test_a_hybrid_patched_in_part_is_not_saved_as_bidirectional(tmp_path):
    if "lfm2" not in zoo.model_types():
        pytest.skip("this transformers has no LFM2")
    model = zoo.build("lfm2")
    enable_bidirectional(model, allow_partial=True).save_pretrained(tmp_path)
    assert "is_causal" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.skipif(TRANSFORMERS >= Version("5.2"), reason="there the flag is honoured, and the model is not causal")
def test_disabled_again_it_is_saved_without_the_flag(tmp_path):
    with bidirectional(model := tiny_model()):
        model.save_pretrained(tmp_path / "both")
    with told_of_causal_loading():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert model.config.is_causal is False
    disable_bidirectional(enable_bidirectional(model)).save_pretrained(tmp_path / "causal")
    assert "is_causal" not in json.loads((tmp_path / "causal" / "config.json").read_text())
    assert model.config.is_causal is False


@pytest.mark.slow
def test_hooks_come_off_again():
    """In a process of its own: other tests need them."""
    code = """
        from transformers import GenerationMixin, PreTrainedModel
        names = "save_pretrained", "from_pretrained", "load_adapter"
        before = [dict(vars(PreTrainedModel)), dict(vars(GenerationMixin))]
        from bidirect_patch.checkpoints import hooks
        hooks.install()
        hooks.install()
        assert vars(GenerationMixin)["generate"] is not before[1]["generate"]
        assert all(vars(PreTrainedModel)[name] is not before[0].get(name) for name in names)
        hooks.uninstall()
        assert [dict(vars(PreTrainedModel)), dict(vars(GenerationMixin))] == before
    """
    in_a_new_process("-c", textwrap.dedent(code))
