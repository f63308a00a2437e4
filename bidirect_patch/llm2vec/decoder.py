"""Loading the decoder under an encoder: the type of its weights, and no warning of what is put right at once."""

import warnings
from typing import Any

from transformers import AutoModel

from ..attention.versions import DTYPE_ARGUMENT


def load_decoder(name_or_path: str, default_dtype: Any, **model_kwargs: Any) -> Any:
    """`AutoModel.from_pretrained`, for a caller that then makes bidirectional what was trained so.

    Args:
        name_or_path: Folder or hub name.
        default_dtype: The type of the weights if model_kwargs has neither `dtype` nor `torch_dtype`. None leaves it to
            transformers.
        **model_kwargs: The other arguments.
    """
    names = ("dtype", "torch_dtype")  # one argument under the names of two releases
    given = [model_kwargs[name] for name in names if model_kwargs.get(name) is not None]
    wanted = given[0] if given else default_dtype
    rest = {name: value for name, value in model_kwargs.items() if name not in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint .*trained with bidirectional attention")
        return AutoModel.from_pretrained(name_or_path, **rest, **({} if wanted is None else {DTYPE_ARGUMENT: wanted}))
