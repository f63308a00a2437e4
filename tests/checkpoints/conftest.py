"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest


@pytest.fixture
def pushed(monkeypatch):
    """What `push_to_hub` uploads: bytes by file name."""
    import huggingface_hub
    from transformers import modeling_utils
    from transformers.utils import hub

    files = {}

    def create_repo(*args, repo_id=None, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id or next(a for a in args if '/' in str(a))}")

    def create_commit(*args, operations, **kwargs):
        for operation in operations:
            source = operation.path_or_fileobj
            files[operation.path_in_repo] = Path(source).read_bytes() if isinstance(source, (str, Path)) else source

    for name, stand_in in {"create_repo": create_repo, "create_commit": create_commit}.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, stand_in)
        for module in (hub, modeling_utils):  # transformers 4 and 5.0 to 5.2 import them by name
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *a, **k: huggingface_hub.ModelCard(""))
    return files
