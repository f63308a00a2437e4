"""The engines that run or rewrite a model: two ranks, accelerate's hooks, Liger's patches, Trainer. Real libraries, on CPU."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bidirect_patch import apply_mntp_head, disable_bidirectional, enable_bidirectional, is_bidirectional
from bidirect_patch.errors import ForeignWrapperError, OrderError

from .conftest import tiny_model

IDS = torch.arange(5, 37).view(4, 8)
MASK = torch.ones_like(IDS)
MASK[0, 6:] = MASK[2, 6:] = 0
LABELS = torch.full_like(IDS, -100)
LABELS[:, 2] = IDS[:, 2]  # each row scores as much, so that the mean of the ranks' means is the mean
LABELS[:, 4] = IDS[:, 4]
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


@torch.no_grad()
def encode(model):
    return model(input_ids=IDS, attention_mask=MASK)[0][MASK.bool()]


def loss_and_gradients(model, wrapped, batch):
    loss = wrapped(**batch).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return loss.detach(), gradients


def run_rank(rank, folder, engine):
    """What one of two ranks does; rank 0 writes the mean loss and the whole gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = apply_mntp_head(tiny_model()).train()
        wrapped = {"ddp": data_parallel, "fsdp2": sharded}[engine](model)
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in BATCH.items()}
        loss, gradients = loss_and_gradients(model, wrapped, half)
        dist.all_reduce(loss)
        if rank == 0:
            torch.save((loss / 2, gradients), f"{folder}/result")
    finally:
        dist.destroy_process_group()


def data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_give_the_loss_and_gradients_of_one_process(tmp_path, engine):
    mp.spawn(run_rank, (str(tmp_path), engine), nprocs=2)
    loss, gradients = torch.load(tmp_path / "result")
    stock = enable_bidirectional(tiny_model()).train()
    want_loss, want = loss_and_gradients(stock, stock, BATCH)
    torch.testing.assert_close(loss, want_loss)
    assert gradients.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(gradients[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shard_first_is_refused_and_nothing_is_changed(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(head=False)
    fully_shard(model, mesh=one_rank)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(OrderError, match="first, then shard"):
        enable_bidirectional(model)
    assert [type(m) for m in model.modules()] == classes


def test_a_head_put_on_after_sharding_gives_the_stock_loss(one_rank):
    """The head holds no shard of its own; attention that was bidirectional before stays it."""
    stock = enable_bidirectional(tiny_model()).train()
    want, gradients = loss_and_gradients(stock, stock, BATCH)
    model = apply_mntp_head(sharded(enable_bidirectional(tiny_model()))).train()
    loss, found = loss_and_gradients(model, model, BATCH)
    torch.testing.assert_close(loss, want)
    for name in gradients:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-4, atol=1e-5)


def test_what_was_sharded_since_is_not_undone(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = enable_bidirectional(tiny_model(head=False))
    want = encode(model)
    fully_shard(model, mesh=one_rank)
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
