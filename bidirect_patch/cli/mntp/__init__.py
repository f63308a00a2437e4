"""`bidirect-patch mntp`: masked next token prediction, after transformers' run_mlm.py and LLM2Vec's run_mntp.py."""

from .. import check_training_packages


def run(argv: list[str]) -> int:
    """Train and evaluate as `[CONFIG.json] [--name value ...]` says.

    Returns:
        The exit code 0.

    Raises:
        BackendError: A package that training needs is not installed.
        ConfigError: A setting, a file or a model cannot be used.
    """
    check_training_packages()
    # Imported here: these modules need the packages above.
    from .settings import parse
    from .training import train

    train(parse(argv))
    return 0
