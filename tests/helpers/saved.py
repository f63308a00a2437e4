"""Models that are saved and opened again: what they give, and what stands on disk."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from .versions import TRANSFORMERS

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
HONOURS_THE_FLAG = pytest.mark.skipif(
    Version("5.2") > TRANSFORMERS, reason=f"transformers {TRANSFORMERS} doesn't know is_causal in a config"
)


@torch.no_grad()
def encode(model):
    """What the model gives for the real tokens of IDS: (10, width)."""
    return model(input_ids=IDS, attention_mask=MASK)[0][MASK.bool()]


def told_of_causal_loading(what="the checkpoint"):
    """A block in which loading is to warn that what it loads belongs to a bidirectional model.

    From 5.2 on, transformers honours the flag in a checkpoint's config, and there is nothing to warn of. An adapter has no
    flag that it reads.
    """
    if what == "the checkpoint" and TRANSFORMERS >= Version("5.2"):
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=f"^{what} .* was trained with bidirectional attention")


def config_of(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def lora(model, seed=0, name="default", **settings):
    """`model` under a LoRA adapter that changes what it gives."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name).eval()


WAYS_TO_LOAD = ("peft", "mixed", "transformers")


def load_adapter(base, folder, through):
    """`base` under the adapter in `folder`, in one of WAYS_TO_LOAD."""
    import peft

    if through == "transformers":
        base.load_adapter(str(folder))
        return base.eval()
    cls = {"peft": peft.PeftModel, "mixed": peft.PeftMixedModel}[through]
    return cls.from_pretrained(base, str(folder)).eval()
