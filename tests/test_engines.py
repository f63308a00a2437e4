"""The engines that run or rewrite a model: two ranks, accelerate's hooks, Liger's patches, Trainer. Real libraries, on CPU."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from bidirect_patch import apply_mntp_head, bidirectional, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ForeignWrapperError, OrderError

from .helpers.processes import in_two_ranks
from .helpers.tiny_models import tiny_model
from .helpers.training_step import BATCH, IDS, LEARNING_RATE, MASK, loss_and_gradients
from .helpers.versions import TRANSFORMERS

pytestmark = pytest.mark.filterwarnings("ignore::bidirect_patch.errors.LabelLeakWarning")  # a loss is a loss


@torch.no_grad()
def encode(model):
    return model(input_ids=IDS, attention_mask=MASK)[0][MASK.bool()]


def close(found, want):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_give_the_loss_and_gradients_of_one_process(tmp_path):
    """DDP, fully_shard, and a script of Trainer in the environment of `accelerate launch --use_fsdp`."""
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    how = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 2 --num_machines 1"
    how += " --fsdp_state_dict_type FULL_STATE_DICT --mixed_precision no --dynamo_backend no --main_process_port 0"
    launched = launch_command_parser().parse_args([*how.split(), "script"])
    environment = prepare_multi_gpu_env(launched) | {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    in_two_ranks("-m", "tests.helpers.two_ranks", tmp_path, **environment)
    stock = enable_bidirectional(tiny_model()).train()
    want_loss, want = loss_and_gradients(stock, stock, BATCH)
    for engine in ("data_parallel", "sharded", "accelerated"):
        loss, found = torch.load(tmp_path / engine)
        torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-5)
        close(found, want)
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["is_causal"] is False
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    close(trained, {name: p.detach() - LEARNING_RATE * p.grad for name, p in stock.named_parameters()})


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(*modules):
    """fully_shard each, the last of which holds the others; returns that one."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return [fully_shard(module, mesh=mesh) for module in modules][-1]


def first_fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize(
    "put",
    [
        pytest.param(lambda model: shard(*model.model.layers, model), id="layers-and-model"),
        pytest.param(lambda model: (shard(*model.model.layers), model)[1], id="layers"),
        pytest.param(lambda model: (shard(model.model), model)[1], id="base"),
        first_fsdp,
    ],
)
def test_shard_first_is_refused_and_nothing_is_changed(one_rank, put):
    model = put(tiny_model())
    classes, attributes = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    with pytest.raises(OrderError, match="first, then shard"):
        enable_bidirectional(model)
    with pytest.raises(OrderError, match="first, then shard"), bidirectional(model):
        pass
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m).keys() for m in model.modules()] == [a.keys() for a in attributes]


def test_a_causal_island_in_what_was_sharded_since(one_rank):
    """On leaving it the model is as it was on entry, though enabling a sharded model is refused otherwise."""
    causal = encode(tiny_model())
    model = enable_bidirectional(tiny_model())
    both = encode(model)
    shard(*model.model.layers, model)
    with bidirectional(model, enabled=False):
        torch.testing.assert_close(encode(model), causal)
    torch.testing.assert_close(encode(model), both)


def test_a_head_put_on_after_sharding_gives_the_stock_loss(one_rank):
    """The head holds no shard of its own; attention that was bidirectional before stays it."""
    stock = enable_bidirectional(tiny_model()).train()
    want_loss, want = loss_and_gradients(stock, stock, BATCH)
    model = enable_bidirectional(tiny_model())
    model = apply_mntp_head(shard(*model.model.layers, model)).train()
    loss, found = loss_and_gradients(model, model, BATCH)
    torch.testing.assert_close(loss, want_loss)
    close(found, want)


def test_what_was_sharded_since_is_not_undone(one_rank):
    model = enable_bidirectional(tiny_model())
    want = encode(model)
    shard(model.model)
    with pytest.raises(ForeignWrapperError, match="FSDP"):
        disable_bidirectional(model)
    assert is_bidirectional(model)
    torch.testing.assert_close(encode(model), want)


@pytest.mark.parametrize(
    "first, hooks",
    [
        ("patch", "cpu_offload"),
        ("hooks", "cpu_offload"),
        ("hooks", "dispatch_model"),
        ("patch", "dispatch_model"),
    ],
)
def test_accelerate_hooks_before_or_after(first, hooks):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    causal, want = encode(model), encode(enable_bidirectional(copy.deepcopy(model)))
    if first == "patch":
        enable_bidirectional(model)
    if hooks == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    enable_bidirectional(model)
    torch.testing.assert_close(encode(model), want)
    disable_bidirectional(model)
    torch.testing.assert_close(encode(model), causal)


# Liger calls the model by an old name. transformers blames the next frame, which is the patched forward's.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["patch", "liger"])
def test_ligers_instance_patch_before_or_after(first):
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel isn't installed")
    model = tiny_model()
    want = encode(enable_bidirectional(copy.deepcopy(model)))
    if first == "patch":
        enable_bidirectional(model)
    # what needs no GPU of it: the head's loss, put on the instance
    only_loss = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
    try:
        liger.apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **only_loss)
        torch.testing.assert_close(encode(enable_bidirectional(model)), want)
        if "forward" in model.__dict__:
            with pytest.raises(OrderError, match="replaced on the instance"):
                apply_mntp_head(model)
    finally:
        model.__dict__.pop("forward", None)


@pytest.mark.parametrize(
    "library, config, settings",
    [
        ("optimum.quanto", "QuantoConfig", {"weights": "int8"}),
        ("bitsandbytes", "BitsAndBytesConfig", {"load_in_8bit": True}),
        ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
)
def test_quantized_linears(tmp_path, library, config, settings):
    """Against the stock quantized model under an explicit mask that shows every token; the small model that proves the
    class has plain linears and knows of no quantization."""
    pytest.importorskip(library, reason=f"{library} isn't installed")
    pytest.importorskip("accelerate")
    if TRANSFORMERS < Version("4.46"):
        pytest.skip(f"transformers {TRANSFORMERS} looks for the packages that these libraries were before")
    tiny_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    quantization = getattr(transformers, config)(**settings)
    how = {"quantization_config": quantization, "device_map": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval()
    assert type(model.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    causal = encode(model)
    every = torch.zeros(len(IDS), 1, 8, 8, dtype=model.dtype)
    every = every.masked_fill(MASK[:, None, None] == 0, torch.finfo(model.dtype).min)
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=every)[0][MASK.bool()]
    assert (want - causal).abs().max() > 0.1
    torch.testing.assert_close(encode(enable_bidirectional(model)), want)
    assert torch.equal(encode(disable_bidirectional(model)), causal)


@pytest.mark.parametrize("line", [enable_bidirectional, apply_mntp_head])
def test_a_script_of_trainer_with_one_line_added(tmp_path, line):
    """As run_clm and run_mlm train: model, arguments, data set, Trainer. The first loss is the bidirectional model's."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = tiny_model()
    rows = [{name: value[i] for name, value in BATCH.items()} for i in range(len(IDS))]
    model = line(model)  # the line
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reference, causal = enable_bidirectional(tiny_model()), tiny_model()
    with torch.no_grad():
        want, other = (m.train()(**BATCH).loss.item() for m in (reference, causal))
    assert losses[0] == pytest.approx(want, abs=1e-3) and abs(losses[0] - other) > 1e-2
    assert losses[1] < losses[0] and is_bidirectional(model)
