"""`bidirect-patch simcse`: contrastive training, the third step of LLM2Vec, with sentence-transformers' trainer and loss.

With single texts, each text is encoded twice under dropout. The two encodings are a positive pair, and the rest of the
batch are negatives. Pairs and triplets train the same loss. The result is a sentence-transformers folder that opens
bidirectional.
"""

import transformers

from ...errors import BackendError
from .. import check_training_packages, extra_needed


def run(argv: list[str]) -> int:
    """Train as `[CONFIG.json] [--name value ...]` says.

    Returns:
        The exit code 0.

    Raises:
        BackendError: sentence-transformers or a package that training needs is not installed, or transformers is too old.
        ConfigError: A setting, a file of examples or a model cannot be used.
    """
    check_training_packages("simcse", subject="simcse")
    with extra_needed("simcse", subject="simcse"):
        import sentence_transformers.base.modules  # noqa: F401  (new in release 5.4)
    from ..settings_by_release import SENTENCE_TRANSFORMERS_TRAINS

    if not SENTENCE_TRANSFORMERS_TRAINS:
        raise BackendError(
            f"simcse needs transformers 4.46 or newer, and {transformers.__version__} is installed: the trainer of "
            "sentence-transformers does not run on it"
        )
    # Imported here: these modules need the packages above.
    from .settings import parse
    from .training import train

    train(parse(argv))
    return 0
