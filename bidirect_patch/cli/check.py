"""`bidirect-patch check NAME_OR_PATH`: what each layer of a model attends to, before the patch and after it."""

import argparse
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import BackendError, ConfigError, StillCausalError, UnsupportedModelError
from ..patch import bidirectional
from ..verify.report import LONGEST, attention_report
from ..model.tiny import tiny_like
from . import Parser, one_line


def run(argv: list[str]) -> int:
    """Print the two tables; 0 if every layer became bidirectional and sees as far back as before, else 1.

    A model that is refused by name counts as 1. Bad input (no such model or backend, a config that no small model can
    be built from) raises a BidirectPatchError.
    """
    settings = _parser().parse_args(argv)
    model = _weights(settings) if settings.weights else _small(settings)
    before = attention_report(model, length=settings.length)
    print(f"as it is:\n{before}\n")
    try:
        with bidirectional(model):
            after = attention_report(model, length=settings.length)
    except (UnsupportedModelError, StillCausalError) as error:
        print(f"refused: {one_line(error)}")
        return 1
    print(f"bidirectional:\n{after}")
    for layer in after.unlike_mirror_of(before):
        old = before.layers[layer.index].backward
        print(f"note: {layer.name} looked back {old} positions and now reaches -{layer.backward} .. +{layer.forward}")
    return 0 if after.is_bidirectional and not after.narrower_than(before) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bidirect-patch check",
        description="Show layer by layer which positions depend on which, before and after enable_bidirectional. The "
        "model is a small random one of the same class, unless --weights is given.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="NAME_OR_PATH", help="a model on the hub, or a folder with a config.json")
    parser.add_argument("--weights", action="store_true", help="load the real model and run that")
    parser.add_argument(
        "--attn-implementation", help="the backend: eager, sdpa, flash_attention_2, flex_attention, ..."
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that the model comes with")
    parser.add_argument("--length", type=_length, default=7, help="tokens in the short random text (default 7)")
    return parser


def _length(text: str) -> int:
    if not text.isdigit() or not 3 <= int(text) <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 3 to {LONGEST}, not {text!r}")
    return int(text)


def _small(settings: argparse.Namespace) -> nn.Module:
    config = _loaded(AutoConfig, settings)
    return tiny_like(config, settings.attn_implementation, settings.trust_remote_code)


def _weights(settings: argparse.Namespace) -> nn.Module:
    backend = settings.attn_implementation
    options = {"attn_implementation": backend} if backend else {}
    return _loaded(AutoModelForCausalLM, settings, torch_dtype="auto", **options).eval()


def _loaded(auto_class: Any, settings: argparse.Namespace, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code, **options)
    except ImportError as error:
        raise BackendError(f"{settings.model} needs what isn't installed: {error}") from error
    except Exception as error:
        raise ConfigError(f"no model could be read from {settings.model!r}: {error}") from error
