"""Sink tokens on disk: they come back with `auto`, and without it nothing opens as another model."""

import json
import warnings

import pytest
import torch
import transformers

from bidirect_patch import bidirectional, disable_bidirectional, enable_bidirectional
from bidirect_patch.checkpoints.guard import opening_sinks
from bidirect_patch.checkpoints.marks import saved_sinks, sinks_on_disk
from bidirect_patch.errors import ArgumentError
from bidirect_patch.model.sinks import NO_SINKS, Sinks
from bidirect_patch.swap.record import plans_of

from ..helpers import zoo
from ..helpers.processes import in_a_new_process
from ..helpers.saved import WAYS_TO_LOAD, config_of, encode, load_adapter, lora, same
from ..helpers.tiny_models import tiny_model

WITH_SINKS = {"num_sink_tokens": 1, "num_sinkless_layers": 1}


def saved(folder, **changes):
    """A model with sinks, saved in `folder`; and what it gives."""
    model = enable_bidirectional(tiny_model(**changes), **WITH_SINKS)
    model.save_pretrained(folder)
    return encode(model)


@pytest.mark.parametrize("opener", ["AutoModelForCausalLM", "AutoModel", "LlamaModel"])
def test_with_auto_it_opens_with_its_sinks(tmp_path, auto, opener):
    want = saved(tmp_path)
    opened = getattr(transformers, opener).from_pretrained(tmp_path)
    if opener == "AutoModelForCausalLM":
        same(encode(opened), want)
    model = tiny_model()
    model.load_state_dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    got = encode(getattr(opened, "model", opened))
    same(got, encode(enable_bidirectional(model, **WITH_SINKS).model))
    assert not torch.allclose(got, encode(enable_bidirectional(model).model), atol=1e-3)


OPENERS = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel
for opener in (AutoModel, AutoModelForCausalLM, LlamaModel, AutoConfig, LlamaConfig):
    for how in {}, {"attn_implementation": "eager"}, {"local_files_only": True}:
        try:
            opener.from_pretrained(sys.argv[1], **how)
            print("opened")
        except OSError as error:
            print("import.bidirect_patch.auto" in str(error))
assert not any(name.startswith("bidirect_patch") for name in sys.modules)
"""


def test_without_this_package_transformers_opens_nothing_and_names_it(tmp_path):
    saved(tmp_path)
    assert set(in_a_new_process("-c", OPENERS, tmp_path).split()) == {"True"}


def test_this_package_without_auto_opens_nothing_either(tmp_path, only_warns):
    saved(tmp_path)
    with pytest.raises(OSError, match="import.bidirect_patch.auto"):
        transformers.AutoModel.from_pretrained(tmp_path)
    with opening_sinks():
        opened = transformers.AutoModel.from_pretrained(tmp_path)
    assert saved_sinks(opened) == saved_sinks(opened.config) == sinks_on_disk(tmp_path) == Sinks(1, 1)
    with pytest.raises(OSError, match="import.bidirect_patch.auto"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_opened_and_saved_again_it_is_the_same(tmp_path, auto):
    saved(tmp_path / "one")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    opened.save_pretrained(tmp_path / "two")
    one, two = config_of(tmp_path / "one"), config_of(tmp_path / "two")
    two.pop("_name_or_path", None)  # transformers 4 writes it
    assert one == two and one["num_sink_tokens"] == one["num_sinkless_layers"] == 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(encode(again), encode(opened))


@pytest.mark.parametrize("how", ["none", "disabled", "causal block", "others"])
def test_numbers_that_are_gone_leave_nothing_on_disk(tmp_path, how):
    model = enable_bidirectional(tiny_model(), **WITH_SINKS)
    model.config.num_sink_tokens, model.config.num_sinkless_layers = 1, 1  # as of a model that was opened with sinks
    if how == "none":
        enable_bidirectional(model).save_pretrained(tmp_path)
    elif how == "disabled":
        disable_bidirectional(model)
        model.config.is_causal = False
        with bidirectional(model, enabled=False):
            model.save_pretrained(tmp_path)
    elif how == "causal block":
        with bidirectional(model, enabled=False):
            model.save_pretrained(tmp_path)
    else:
        enable_bidirectional(model, num_sink_tokens=2).save_pretrained(tmp_path)
        assert sinks_on_disk(tmp_path) == Sinks(2, 0)
        return
    config = config_of(tmp_path)
    assert sinks_on_disk(tmp_path) == NO_SINKS and "configuration_files" not in config
    assert not any("sink" in name for name in config)


def built(folder, how):
    """A model of a folder, built from its config before its weights are loaded."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if how == "from_config":
        made = transformers.AutoModelForCausalLM.from_config(config)
        made.load_state_dict(transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict())
        return made.eval()
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        made = transformers.AutoModelForCausalLM.from_config(config)
    made.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(made, str(folder), device_map={"": "cpu"}).eval()


@pytest.mark.parametrize("how", ["from_config", "load_checkpoint_and_dispatch"])
def test_with_auto_a_model_that_is_built_from_its_config_has_its_sinks(tmp_path, auto, how):
    want = saved(tmp_path / "with")
    made = built(tmp_path / "with", how)
    same(encode(made), want)
    made.save_pretrained(tmp_path / "again")
    assert sinks_on_disk(tmp_path / "again") == Sinks(1, 1)


def test_without_auto_a_model_that_is_built_from_a_config_with_sinks_warns(tmp_path, only_warns):
    saved(tmp_path)
    with opening_sinks():
        config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"is built as a model .*call enable_bidirectional\(model, num_sink_tokens=1"):
        transformers.AutoModelForCausalLM.from_config(config)
    with opening_sinks(), warnings.catch_warnings():  # who asks for it enables it
        warnings.filterwarnings("error", message="the model of this config")
        transformers.AutoModelForCausalLM.from_config(config)


def test_with_auto_a_constructor_of_a_composite_model_enables_no_part_of_it(tmp_path, auto):
    """It builds its text model by from_config."""
    if "gemma3" not in zoo.model_types():
        pytest.skip("this transformers has no composite Gemma 3")
    model = enable_bidirectional(zoo.build("gemma3"), **WITH_SINKS)
    model.save_pretrained(tmp_path)
    made = transformers.Gemma3ForConditionalGeneration(transformers.AutoConfig.from_pretrained(tmp_path))
    assert not any(map(plans_of, made.modules()))


def test_with_auto_a_model_without_values_that_cannot_be_enabled_yet_says_so(tmp_path, auto):
    """GPT-Neo keeps a causal mask in a buffer."""
    enable_bidirectional(zoo.build("gpt_neo")).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"), pytest.warns(UserWarning, match="is to be bidirectional, .* yet: .* load the model first"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    assert not any(map(plans_of, made.modules()))


def test_a_model_that_a_constructor_made_of_such_a_config_is_saved_without_sinks(tmp_path, auto):
    """It never had any: as it gives now, it has to give when it is opened again, with this package or without."""
    saved(tmp_path / "with")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "with")
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    want = encode(made)
    made.save_pretrained(tmp_path / "without")
    assert saved_sinks(made) == Sinks(1, 1) and sinks_on_disk(tmp_path / "without") == NO_SINKS
    same(encode(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "without").eval()), want)


def test_saving_changes_nothing(tmp_path):
    model = enable_bidirectional(tiny_model(), **WITH_SINKS)
    before, config, attributes = encode(model), model.config.to_dict(), set(vars(model))
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == config and set(vars(model)) == attributes
    assert torch.equal(encode(model), before)


def test_a_composite_config_has_them_in_its_text_part(tmp_path, auto):
    if "gemma3" not in zoo.model_types():
        pytest.skip("this transformers has no composite Gemma 3")
    model = enable_bidirectional(zoo.build("gemma3"), **WITH_SINKS)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        want = model(input_ids=ids)[0]
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["text_config"]["num_sink_tokens"] == 1
    opened = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        same(opened(input_ids=ids)[0], want)


def test_numbers_without_meaning_are_refused(tmp_path, auto):
    saved(tmp_path)
    config = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_sink_tokens": "one"}))
    with pytest.raises(ArgumentError, match="num_sink_tokens must be an int of 0 or more, got 'one'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("through", WAYS_TO_LOAD)
@pytest.mark.parametrize("base", ["stock", "no sinks", "the same sinks"])
def test_an_adapter_brings_its_sinks(tmp_path, auto, through, base):
    pytest.importorskip("peft")
    model = enable_bidirectional(lora(tiny_model()), **WITH_SINKS)
    model.save_pretrained(tmp_path)
    start = tiny_model()
    if base != "stock":
        enable_bidirectional(start, **WITH_SINKS if base == "the same sinks" else {})
    same(encode(load_adapter(start, tmp_path, through)), encode(model))


@pytest.mark.parametrize("through", WAYS_TO_LOAD)
def test_without_auto_an_adapter_warns_unless_the_base_has_its_sinks(tmp_path, only_warns, recwarn, through):
    pytest.importorskip("peft")
    model = enable_bidirectional(lora(tiny_model()), **WITH_SINKS)
    model.save_pretrained(tmp_path)
    for base in tiny_model(), enable_bidirectional(tiny_model()):
        with pytest.warns(UserWarning, match=r"call enable_bidirectional\(model, num_sink_tokens=1, num_sinkless_layers=1\)"):
            load_adapter(base, tmp_path, through)
    recwarn.clear()
    loaded = load_adapter(enable_bidirectional(tiny_model(), **WITH_SINKS), tmp_path, through)
    assert not [w for w in recwarn if "trained with bidirectional" in str(w.message)]
    same(encode(loaded), encode(model))


def test_an_adapter_that_is_loaded_and_saved_keeps_its_mark(tmp_path, only_warns):
    pytest.importorskip("peft")
    enable_bidirectional(lora(tiny_model()), **WITH_SINKS).save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match="sink"):
        loaded = load_adapter(tiny_model(), tmp_path / "one", "peft")
    loaded.save_pretrained(tmp_path / "two")
    files = [(tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two")]
    assert json.loads(files[0]) == json.loads(files[1])
    enable_bidirectional(loaded).save_pretrained(tmp_path / "three")
    assert sinks_on_disk(tmp_path / "three") == NO_SINKS
    assert json.loads((tmp_path / "three" / "adapter_config.json").read_text())["peft_type"] == "LORA"


ADAPTERS = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
for load in (lambda m: PeftModel.from_pretrained(m, adapter), lambda m: m.load_adapter(adapter)):
    try:
        load(AutoModelForCausalLM.from_pretrained(base))
        print("opened")
    except Exception as error:
        print("import bidirect_patch.auto" in str(error) or repr(error))
assert not any(name.startswith("bidirect_patch") for name in sys.modules)
"""


def test_without_this_package_peft_opens_no_adapter_with_sinks(tmp_path):
    pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    enable_bidirectional(lora(tiny_model()), **WITH_SINKS).save_pretrained(tmp_path / "adapter")
    out = in_a_new_process("-c", ADAPTERS, tmp_path / "base", tmp_path / "adapter")
    assert out.split("\n")[:-1] == ["True", "True"]


def test_a_pickle_keeps_them(tmp_path):
    model = enable_bidirectional(tiny_model(), **WITH_SINKS)
    torch.save(model, tmp_path / "model.pt")
    opened = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(encode(opened), encode(model))
    assert not torch.equal(encode(enable_bidirectional(opened)), encode(model))
