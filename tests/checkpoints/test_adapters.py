"""Adapters on disk: the mark, ways to load them, several of them, merging."""

import json
import threading
import time
import warnings

import pytest
import torch
import transformers

from bidirect_patch import disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.checkpoints import policy
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.checkpoints.marks import is_marked
from bidirect_patch.verify.mode import sinks_in

from ..helpers.one_text import reaches_back
from ..helpers.saved import WAYS_TO_LOAD, config_of, encode, load_adapter, lora, same
from ..helpers.tiny_models import tiny_model
from ..helpers.versions import lacks_add_adapter


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
    assert not is_marked(tmp_path / "causal")
    enable_bidirectional(model).save_pretrained(tmp_path / "both")
    assert is_marked(tmp_path / "both")
    assert sorted(p.name for p in (tmp_path / "causal").iterdir()) == sorted(
        p.name for p in (tmp_path / "both").iterdir()
    )


def test_threads_that_save_one_adapter_each_mark_theirs(tmp_path):
    peft = pytest.importorskip("peft")
    wide = enable_bidirectional(tiny_model(head=False, hidden_size=256, head_dim=64))
    model = peft.get_peft_model(wide, peft.LoraConfig(r=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    for number in range(8):
        folders = [tmp_path / f"{number}-{which}" for which in range(2)]
        threads = [threading.Thread(target=model.save_pretrained, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
            time.sleep(0.002)  # so that the first one ends while the second one saves
        for thread in threads:
            thread.join()
        for folder in folders:
            assert json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]["is_causal"] is False


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


@pytest.fixture
def hotswap():
    """PEFT's function that gives a model's adapter the weights of another one, by the name of the module that has it."""
    module = pytest.importorskip("peft.utils.hotswap", reason="this PEFT can't swap adapters")
    swap = module.hotswap_adapter  # as who imported it has it
    return lambda model, folder: swap(model, str(folder), adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("sinks", [0, 1])
def test_an_adapter_swapped_in_enables_a_causal_model_or_warns(tmp_path, auto, hotswap, monkeypatch, sinks):
    model = enable_bidirectional(lora(tiny_model()), num_sink_tokens=sinks)
    model.save_pretrained(tmp_path / "both")
    other = lora(tiny_model())
    hotswap(other, tmp_path / "both")
    same(encode(other), encode(model))
    assert sinks_in(other) == (sinks, 0) and is_bidirectional(other)
    monkeypatch.setattr(policy, "auto_is_imported", False)
    other = lora(tiny_model())
    with pytest.warns(UserWarning, match="is loaded onto a model that is causal: call enable_bidirectional"):
        hotswap(other, tmp_path / "both")
    assert not reaches_back(other)
    enable_bidirectional(other, num_sink_tokens=sinks).save_pretrained(tmp_path / "again")
    assert is_marked(tmp_path / "again")


def test_a_causal_adapter_swapped_in_changes_no_mode(tmp_path, auto, hotswap):
    lora(tiny_model()).save_pretrained(tmp_path)
    model = lora(tiny_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter")
        hotswap(model, tmp_path)
    assert not reaches_back(model) and not is_bidirectional(model)


def test_an_adapter_changes_the_sinks_of_its_model_and_says_so(tmp_path, auto):
    peft = pytest.importorskip("peft")
    enable_bidirectional(lora(tiny_model())).save_pretrained(tmp_path)
    base = enable_bidirectional(tiny_model(), num_sink_tokens=1)
    with pytest.warns(UserWarning, match="with no sink tokens, .* onto one with num_sink_tokens=1"):
        model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert sinks_in(model) == (0, 0) and reaches_back(model.eval())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter")
        base = enable_bidirectional(tiny_model(), num_sink_tokens=1)
        with opening_sinks():  # who loads it enables it
            model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert sinks_in(model) == (1, 0)


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
    assert not is_marked(tmp_path / "causal")


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
        assert is_marked(tmp_path / name)
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
