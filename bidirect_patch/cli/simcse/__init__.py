"""`bidirect-patch simcse`: contrastive training, the third step of LLM2Vec, with sentence-transformers' trainer and loss.

With single texts, each text is encoded twice under dropout. The two encodings are a positive pair, and the rest of the
batch are negatives. Pairs and triplets train the same loss. The result is a sentence-transformers folder that opens
bidirectional.
"""

from .. import extra_needed


def run(argv: list[str]) -> int:
    """Train as `[CONFIG.json] [--name value ...]` says.

    Returns:
        The exit code 0.

    Raises:
        BackendError: sentence-transformers or a package that training needs is not installed.
        ConfigError: A setting, a file of examples or a model cannot be used.
    """
    with extra_needed("simcse", subject="simcse"):
        import accelerate  # noqa: F401  (transformers' Trainer needs it)
        import datasets  # noqa: F401
        import peft  # noqa: F401
        from sentence_transformers import SentenceTransformerTrainingArguments  # noqa: F401  (new in release 3)
    # Imported here: these modules need the packages above.
    from .settings import parse
    from .training import train

    train(parse(argv))
    return 0
