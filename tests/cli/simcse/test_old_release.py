"""Where the trainer of sentence-transformers does not run, one clear error comes first."""

import pytest
from packaging.version import Version

from bidirect_patch.cli import main

from ...helpers.versions import TRANSFORMERS

pytest.importorskip("sentence_transformers", "5.4", reason="simcse needs the extra [simcse]")
pytest.importorskip("datasets", reason="simcse needs the extra [simcse]")


@pytest.mark.skipif(TRANSFORMERS >= Version("4.46"), reason="the trainer of sentence-transformers runs from 4.46 on")
def test_transformers_before_4_46(capsys, tmp_path):
    settings = ["--model_name_or_path", "m", "--dataset_file_path", "texts.txt", "--output_dir", str(tmp_path / "out")]
    assert main(["simcse", *settings, "--do_train"]) == 2
    assert "simcse needs transformers 4.46 or newer" in capsys.readouterr().err and not (tmp_path / "out").exists()
