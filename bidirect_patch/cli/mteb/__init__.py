"""`bidirect-patch mteb MODEL --tasks ...`: an encoder on tasks of MTEB, after LLM2Vec's mteb_eval.py, by the package mteb.

The results are in mteb's own format and folders.
"""

from .. import extra_needed


def run(argv: list[str]) -> int:
    """Evaluate a model as the arguments say.

    Returns:
        The exit code 0.

    Raises:
        BackendError: A package or an attention backend is not installed.
        ConfigError: A flag, a task, a file or a model cannot be used.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    from .flags import read

    flags = read(argv)
    with extra_needed("mteb", subject="mteb"):
        import mteb  # noqa: F401
        import peft  # noqa: F401
        import sentence_transformers.base.modules  # noqa: F401
    # Imported here: these modules need the packages above.
    from .evaluation import evaluate

    evaluate(flags)
    return 0
