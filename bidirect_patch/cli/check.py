"""`bidirect-patch check NAME_OR_PATH`: what each layer of a model attends to, before the patch and after it."""

import argparse
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoints.guard import opening_sinks
from ..checkpoints.marks import saved_sinks
from ..errors import StillCausalError, UnsupportedModelError
from ..model.sinks import Sinks
from ..model.tiny import tiny_like
from ..patch import bidirectional
from ..verify.probe import LENGTH
from ..verify.report import LONGEST, attention_report
from . import Parser, one_line
from .layers import number_of_layers
from .load_errors import loading
from .settings_by_release import DTYPE_ARGUMENT
from .sink_settings import check_sinkless, check_sinks, choose_sinks


def run(argv: list[str]) -> int:
    """Print one table for the model as it is, and one for the bidirectional model.

    Returns:
        0 if every layer became bidirectional and sees as far back as before, else 1. It is 1 too for a model that the
        patch refuses.

    Raises:
        BackendError: The attention backend is not installed.
        ConfigError: There is no such model, or the flags are wrong.
        UnsupportedModelError: No small model can be built from the config.
    """
    settings = _parser().read(argv)
    check_sinks(settings)
    model = _load_weights(settings) if settings.weights else _make_small(settings)
    sinks = _sinks(settings, model)
    if not settings.weights:
        print(f"A small random {type(model).__name__} stands for {settings.model}; --weights runs the real model.\n")
    length = settings.length or min(LENGTH + sinks.num_sink_tokens, LONGEST)
    before = attention_report(model, length=length)
    print(f"as it is:\n{before}\n")
    try:
        with bidirectional(model, **sinks._asdict()):
            after = attention_report(model, length=length)
    except (UnsupportedModelError, StillCausalError) as error:
        print(f"refused: {one_line(error)}")
        return 1
    print(f"bidirectional:\n{after}")
    unlike = after.unlike_mirror_of(before)
    for layer in unlike:
        old = before.layers[layer.index].backward
        print(f"note: {layer.name} looked back {old} positions and now reaches -{layer.backward} .. +{layer.forward}")
    # A layer that doesn't see the sink tokens looks back less far, and that is its mirror image all the same.
    narrower = {layer.index for layer in after.narrower_than(before)} & {layer.index for layer in unlike}
    return 0 if after.is_bidirectional and not narrower else 1


def _parser() -> Parser:
    parser = Parser(
        prog="bidirect-patch check",
        description="Show layer by layer which positions depend on which, before and after enable_bidirectional. The "
        "model is a small random one of the same class, unless --weights is given. The exit code is 1 if a layer stays "
        "causal or the model is refused.",
        epilog="example: bidirect-patch check HuggingFaceTB/SmolLM2-135M-Instruct",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model on the hub, or a folder with a config.json")
    parser.add_argument("--weights", action="store_true", help="load the real model and run that")
    parser.add_argument(
        "--attn_implementation", help="the backend: eager, sdpa, flash_attention_2, flex_attention, ..."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the model comes with")
    parser.add_argument("--length", type=_length, help="tokens in the short random text (default 7, and the sink tokens)")
    parser.add_argument("--num_sink_tokens", type=int, metavar="N", help="of enable_bidirectional (default: as saved, or 0)")
    parser.add_argument("--num_sinkless_layers", type=int, metavar="N", help="of enable_bidirectional (the same default)")
    parser.set_defaults(layers=None)
    return parser


def _length(text: str) -> int:
    if not text.isdigit() or not 3 <= int(text) <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 3 to {LONGEST}, not {text!r}")
    return int(text)


def _sinks(settings: argparse.Namespace, model: Any) -> Sinks:
    """The sinks that are asked for, else those that the model was saved with; as many sinkless layers as a small model has."""
    sinks = choose_sinks(settings, saved_sinks(model))
    layers = number_of_layers(model.config)
    if settings.weights:
        check_sinkless(sinks.num_sinkless_layers, layers)
        return sinks
    return sinks._replace(num_sinkless_layers=min(sinks.num_sinkless_layers, layers or 0))


def _make_small(settings: argparse.Namespace) -> nn.Module:
    config = _load(AutoConfig, settings)
    check_sinkless(settings.num_sinkless_layers or 0, number_of_layers(config))
    return tiny_like(config, settings.attn_implementation, settings.trust_remote_code)


def _load_weights(settings: argparse.Namespace) -> nn.Module:
    backend = settings.attn_implementation
    options = {"attn_implementation": backend} if backend else {}
    return _load(AutoModelForCausalLM, settings, **{DTYPE_ARGUMENT: "auto"}, **options).eval()


def _load(auto_class: Any, settings: argparse.Namespace, **options: Any) -> Any:
    with loading(repr(settings.model), failure="no model could be read from"), opening_sinks():
        return auto_class.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code, **options)
