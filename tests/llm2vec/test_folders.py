"""The folders that LLM2Vec makes, where their settings come from, and encoders that are saved and opened again."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

from bidirect_patch import disable_bidirectional, is_bidirectional, load_llm2vec

from ..helpers.llm2vec_folders import INSTRUCTION, NAMES, TEXTS, change_json, write_adapter, write_settings
from ..helpers.processes import in_a_new_process
from ..helpers.saved import lora
from ..helpers.versions import TRANSFORMERS

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
pytest.importorskip("sentence_transformers.base.modules", reason="sentence-transformers 5.4 or newer isn't installed")
pytest.importorskip("peft", reason="the folders hold adapters")

SETTINGS = {"pooling_mode": "weighted_mean", "max_length": 30, "doc_max_length": 20, "skip_instruction": False}


def embeddings(encoder):
    return np.concatenate([encoder.encode(TEXTS), encoder.encode(TEXTS, prompt=INSTRUCTION)])


def same(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def with_files_of(base, folder):
    """The adapter's folder with the base's config.json and tokenizer too, as adapters are published."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(base) / file).exists():
            shutil.copy(Path(base) / file, folder)
    return folder


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_what_llm2vec_saved_encodes_as_it_did(bases, tmp_path, merged):
    llm2vec = pytest.importorskip("llm2vec", reason="llm2vec isn't installed", exc_type=ImportError)
    if Version("4.44.2") != TRANSFORMERS:
        pytest.skip(f"llm2vec 0.2.3 is written for transformers 4.44, not {TRANSFORMERS}")
    base = bases("llama", NAMES[1])
    theirs = llm2vec.LLM2Vec.from_pretrained(base, **SETTINGS)
    theirs.model = lora(theirs.model)
    want = [theirs.encode([[i, t] for t in TEXTS], show_progress_bar=False).numpy() for i in ("", INSTRUCTION)]
    theirs.save(str(tmp_path), merge_before_save=merged)
    encoder = load_llm2vec(tmp_path) if merged else load_llm2vec(base, tmp_path)
    same(embeddings(encoder), np.concatenate(want))


def test_settings_come_from_the_adapters_folder_and_arguments_come_first(bases, adapter):
    folder = adapter(**SETTINGS)
    encoder = load_llm2vec(bases(), folder)
    by_argument = load_llm2vec(bases(), adapter("bare"), **SETTINGS)
    assert encoder.max_seq_length == 30
    same(embeddings(encoder), embeddings(by_argument))
    other = load_llm2vec(bases(), folder, pooling_mode="mean", skip_instruction=True, max_length=500, doc_max_length=400)
    same(embeddings(other), embeddings(load_llm2vec(bases(), adapter("bare"))))
    assert other.max_seq_length == 500


def test_an_adapter_changes_the_embeddings_as_its_merged_weights_do(bases, adapter):
    from peft import PeftModel
    from transformers import AutoModel

    from bidirect_patch import enable_bidirectional

    folder = adapter()
    encoder = load_llm2vec(bases(), folder)
    assert is_bidirectional(encoder) and not hasattr(encoder[0].model, "peft_config")
    model = PeftModel.from_pretrained(enable_bidirectional(AutoModel.from_pretrained(bases())), folder).eval()
    ids = encoder.tokenizer("dogs", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids)[0][0, 1:].mean(0)
    same(encoder.encode(["dogs"])[0], want)
    assert abs(encoder.encode(["dogs"]) - load_llm2vec(bases()).encode(["dogs"])).max() > 0.01


def test_an_adapter_as_base_is_merged_before_the_next(bases, adapter, tmp_path):
    """LLM2Vec's chain: the MNTP adapter's folder, with a config.json in it, and the SimCSE adapter."""
    base = bases()
    first = with_files_of(base, adapter("mntp"))
    second = write_adapter(tmp_path / "simcse", base, seed=1)
    chained = load_llm2vec(first, second)
    merged = load_llm2vec(first)
    same(embeddings(merged), embeddings(load_llm2vec(base, first)))
    merged[0].model.save_pretrained(tmp_path / "merged")
    with_files_of(base, tmp_path / "merged")
    same(embeddings(chained), embeddings(load_llm2vec(tmp_path / "merged", second)))
    assert abs(embeddings(chained) - embeddings(merged)).max() > 0.01


def test_a_base_that_is_bidirectional_by_its_config_is_the_same(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    change_json(folder / "config.json", is_causal=False)
    same(embeddings(load_llm2vec(folder)), embeddings(load_llm2vec(bases())))


def test_a_full_folder_of_llm2vecs_class_is_opened_without_a_warning(bases, tmp_path, only_warns, recwarn):
    folder = tmp_path / "base"
    shutil.copytree(bases(), folder)
    change_json(folder / "config.json", architectures=["LlamaBiModel"])
    same(embeddings(load_llm2vec(folder)), embeddings(load_llm2vec(bases())))
    assert not [w for w in recwarn if "bidirectional" in str(w.message)]


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "eos_token", "bos_token"])
@pytest.mark.parametrize("name", ["", NAMES[0], NAMES[6]])
def test_saved_and_opened_again_it_encodes_the_same(bases, tmp_path, name, pooling, only_warns, recwarn):
    encoder = load_llm2vec(bases("llama", name), pooling_mode=pooling)
    want = embeddings(encoder)
    encoder.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert is_bidirectional(opened)
    assert not [w for w in recwarn if "causal model" in str(w.message)]
    same(embeddings(opened), want)
    same(embeddings(load_llm2vec(tmp_path)), want)


def test_with_an_adapter_it_is_saved_merged(bases, adapter, tmp_path):
    """It needs neither the base nor the adapter any more."""
    base = shutil.copytree(bases(), tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", base, pooling_mode="weighted_mean")
    encoder = load_llm2vec(base, folder)
    want = embeddings(encoder)
    encoder.save_pretrained(str(tmp_path / "saved"))
    for gone in (base, folder):
        shutil.rmtree(gone)
    same(embeddings(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")), want)


def test_a_limit_and_prompts_are_kept(bases, tmp_path):
    encoder = load_llm2vec(bases(), max_length=200)
    encoder.max_seq_length = 7
    encoder.prompts = {"query": INSTRUCTION}
    want = embeddings(encoder)
    encoder.save_pretrained(str(tmp_path))
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert opened.max_seq_length == 7
    same(embeddings(opened), want)
    same(opened.encode(TEXTS, prompt_name="query"), want[len(TEXTS) :])
    assert abs(want - embeddings(load_llm2vec(bases()))).max() > 0.01


def test_made_causal_it_is_opened_causal(bases, tmp_path):
    encoder = disable_bidirectional(load_llm2vec(bases()))
    want = embeddings(encoder)
    encoder.save_pretrained(str(tmp_path))
    opened = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert not is_bidirectional(opened)
    same(embeddings(opened), want)


def test_weights_are_float32_unless_asked_and_opened_as_they_were_saved(bases, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(bases(), half)
    load_llm2vec(bases())[0].model.to(torch.bfloat16).save_pretrained(half)
    assert load_llm2vec(half)[0].model.dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        encoder = load_llm2vec(half, **{name: torch.bfloat16})
        assert encoder[0].model.dtype == torch.bfloat16
    assert encoder.encode(TEXTS).dtype == np.float32
    encoder.save_pretrained(str(tmp_path / "saved"))
    opened = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(embeddings(opened), embeddings(encoder))


OPEN = """
import sys
from sentence_transformers import SentenceTransformer
def encode(**trust):
    print(SentenceTransformer(sys.argv[1], device="cpu", **trust).encode({texts!r}, prompt={instruction!r}).tolist())
try:
    encode()
except ValueError as error:
    assert "trust_remote_code" in str(error), error
    print("refused")
assert "bidirect_patch.patch" not in sys.modules or sys.argv[2] == "takes any class"
encode(trust_remote_code=True)
import bidirect_patch.auto
encode()
"""


@pytest.mark.slow
def test_a_fresh_process_opens_it_if_it_trusts_the_class_or_has_imported_the_package(bases, tmp_path):
    """And never without the class: sentence-transformers 6 refuses, older releases take any class."""
    encoder = load_llm2vec(bases("llama", NAMES[1]))
    encoder.save_pretrained(str(tmp_path))
    strict = Version(st.__version__) >= Version("6")
    code = OPEN.format(texts=TEXTS, instruction=INSTRUCTION)
    refuses = "refuses" if strict else "takes any class"
    first, *others = in_a_new_process("-c", code, tmp_path, refuses).strip().splitlines()
    assert len(others) == 2 and (first == "refused") == strict
    for line in others if strict else (first, *others):
        same(np.array(json.loads(line)), encoder.encode(TEXTS, prompt=INSTRUCTION))


def test_classes_of_others_still_need_trust(bases, tmp_path):
    """Only this package's own modules are taken without trust_remote_code."""
    if Version(st.__version__) < Version("6"):
        pytest.skip(f"sentence-transformers {st.__version__} takes any class")
    load_llm2vec(bases()).save_pretrained(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["type"] = "bidirect_patch_of_others.modules.LLM2VecPooling"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="trust_remote_code"):
        st.SentenceTransformer(str(tmp_path), device="cpu")
    assert "bidirect_patch_of_others" not in sys.modules


def test_it_trains_with_sentence_transformers_trainer(bases, tmp_path):
    datasets = pytest.importorskip("datasets")
    if Version("4.46") > TRANSFORMERS:
        pytest.skip(f"the trainer of sentence-transformers {st.__version__} does not run on transformers {TRANSFORMERS}")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder = load_llm2vec(bases())
    before = embeddings(encoder)
    data = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=0.01,
        prompts={"anchor": INSTRUCTION},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(encoder)
    st.SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=data, loss=loss).train()
    assert is_bidirectional(encoder) and abs(embeddings(encoder) - before).max() > 1e-3


def test_the_settings_file_of_a_plain_encoder_is_llm2vecs(bases, tmp_path):
    """LLM2Vec takes no key but its own."""
    load_llm2vec(bases(), **SETTINGS).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "llm2vec_config.json").read_text()) == SETTINGS
    write_settings(tmp_path, **{**SETTINGS, "pooling_mode": "mean"})
    same(embeddings(load_llm2vec(tmp_path)), embeddings(load_llm2vec(bases(), **{**SETTINGS, "pooling_mode": "mean"})))
