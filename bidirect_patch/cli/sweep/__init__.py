"""`bidirect-patch sweep MODEL --eval_sts dev.csv`: which attention, first token, depth and pooling suit a model, untrained.

Every setup is measured on scored pairs. The best one of each attention is printed, and the best of all is written.
"""

from .. import extra_needed


def run(argv: list[str]) -> int:
    """Measure a model as the arguments say.

    Returns:
        The exit code 0.

    Raises:
        BackendError: A package or an attention backend is not installed.
        ConfigError: A flag, a file of pairs, a folder or a model cannot be used.
        UnsupportedModelError: The model cannot be made bidirectional.
    """
    from .flags import read

    flags = read(argv)
    with extra_needed("train", subject="sweep"):
        import datasets  # noqa: F401
    if flags.output_dir:
        with extra_needed("simcse", subject="--output_dir"):
            import sentence_transformers.base.modules  # noqa: F401
    # Imported here: these modules need the packages above.
    from .steps import measure_and_write

    measure_and_write(flags)
    return 0
