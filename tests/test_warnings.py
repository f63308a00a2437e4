"""Which warnings fail a test, by setup.cfg: those out of our own code, and our own kinds wherever they are said to be. Whose line
they name."""

import inspect
import json
import warnings

import pytest
import torch
import transformers

from bidirect_patch import disable_bidirectional, enable_bidirectional, errors

from .helpers.saved import load_adapter, lora
from .helpers.tiny_models import tiny_model

IDS = torch.arange(5, 14)[None]

ADAPTER = UserWarning("the adapter /somewhere was trained with bidirectional attention and is loaded as a causal model")


def warn(what, module):
    warnings.warn_explicit(what, None, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("module", ["bidirect_patch", "bidirect_patch.swap.apply", "tests.test_warnings", "benchmarks.head"])
def test_a_warning_out_of_our_own_code_is_an_error(module):
    with pytest.raises(UserWarning, match="anything"):
        warn(UserWarning("anything"), module)
    with pytest.raises(DeprecationWarning):
        warn(DeprecationWarning("an old name"), module)


@pytest.mark.parametrize("what", [errors.CausalMaskWarning("a mask"), errors.LabelLeakWarning("labels"), ADAPTER], ids=repr)
def test_our_own_warnings_are_errors_wherever_they_are_said_to_be(what):
    with pytest.raises(type(what)):
        warn(what, "transformers.modeling_utils")


def test_every_own_warning_is_among_them():
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Warning)]
    assert len(own) == 2
    for kind in own:
        with pytest.raises(kind):
            warn(kind("anything"), "torch.nn.modules.module")


def labels(model, folder):
    model(input_ids=IDS, labels=IDS)


def labels_around_a_decoder(model, folder):
    model = disable_bidirectional(model)
    enable_bidirectional(model.model)
    model(input_ids=IDS, labels=IDS)


def a_mask(model, folder):
    model(input_ids=IDS, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())


def a_config(model, folder):
    model.config.save_pretrained(folder)


def weights(model, folder):
    pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, folder)


def through_peft(model, folder):
    load_adapter(tiny_model(), folder / "adapter", "peft")


def through_transformers(model, folder):
    load_adapter(tiny_model(), folder / "adapter", "transformers")


def a_checkpoint(model, folder):
    transformers.LlamaModel.from_pretrained(folder / "llm2vec")


def by_class(model, folder):
    transformers.AutoModel.from_pretrained(folder / "llm2vec")


@pytest.mark.parametrize("use", [
    labels, labels_around_a_decoder, a_mask, a_config, weights, through_peft, through_transformers, a_checkpoint, by_class
], ids=lambda use: use.__name__)  # fmt: skip
def test_a_warning_names_the_line_of_the_user(tmp_path, only_warns, use):
    """Through whatever the line calls, of this package or of another library."""
    if "peft" in use.__name__ or "transformers" in use.__name__:
        pytest.importorskip("peft")
        enable_bidirectional(lora(tiny_model())).save_pretrained(tmp_path / "adapter")
    tiny_model(head=False).save_pretrained(tmp_path / "llm2vec")
    config = tmp_path / "llm2vec" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["LlamaBiModel"]}))
    model = enable_bidirectional(tiny_model())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        use(model, tmp_path)
    (told,) = [each for each in told if "bidirectional" in str(each.message)]
    lines, first = inspect.getsourcelines(load_adapter if use in (through_peft, through_transformers) else use)
    file = inspect.getsourcefile(load_adapter if use in (through_peft, through_transformers) else use)
    assert told.filename == file and first <= told.lineno < first + len(lines)


def test_a_warning_of_another_library_about_itself_is_none_of_ours():
    with pytest.warns(DeprecationWarning, match="an old name"):
        warn(DeprecationWarning("an old name"), "bidirect_patch_of_others")
