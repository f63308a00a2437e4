"""Each attention kernel against the decoder in plain torch, float32: hidden states and gradients.

A kernel may be twice as far from it as stock eager attention with the mask written out is in the same dtype, which is what
rounding does, and one thousandth more. How far the causal model is from it stands beside, so that the bound is seen to
mean something.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.progress import Run
from benchmarks.gpu.stand_ins import backend_there, flash_backends

BATCHES = ("dense", "padded right", "padded left", "packed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Kernel:
    """How a model is run."""

    backend: str
    sdpa: str | None = None  # the name of the only SDPBackend that SDPA may take
    compiled: str | None = None  # the mode of torch.compile
    graph: bool = False  # captured as a CUDA graph on another batch, and replayed
    batches: tuple[str, ...] = BATCHES
    dtypes: tuple[str, ...] = tuple(DTYPES)
    windows: tuple[bool, ...] = (False, True)
    seconds: float = 1.0  # what the first case may cost, compiling


KERNELS = {
    "FlashAttention 2": Kernel("flash_attention_2"),
    "FlashAttention 3": Kernel("flash_attention_3"),
    "FlashAttention 4": Kernel("flash_attention_4", seconds=10),
    "SDPA flash": Kernel("sdpa", sdpa="FLASH_ATTENTION", batches=("dense",), windows=(False,)),  # it takes no mask
    "SDPA efficient": Kernel("sdpa", sdpa="EFFICIENT_ATTENTION"),
    "SDPA cuDNN": Kernel("sdpa", sdpa="CUDNN_ATTENTION"),
    "SDPA, CUDA graph": Kernel("sdpa", graph=True),
    "SDPA, compiled": Kernel("sdpa", compiled="default", dtypes=("bf16",), windows=(True,), seconds=20),
    "flex, compiled": Kernel("flex_attention", seconds=12),
    "SDPA, max-autotune": Kernel(
        "sdpa",
        compiled="max-autotune",
        batches=("dense", "padded left"),
        dtypes=("bf16",),
        windows=(False,),
        seconds=30,
    ),
}


@dataclass(frozen=True)
class Case:
    """One kernel on one batch."""

    kernel: str  # of KERNELS
    dtype: str  # of DTYPES
    batch: str  # of BATCHES
    window: bool

    def __str__(self) -> str:
        return f"{self.kernel}, {self.dtype}, {self.batch}{', window' if self.window else ''}"


CASES = [
    Case(name, dtype, batch, window)
    for name, kernel in KERNELS.items()
    for dtype in kernel.dtypes
    for window in kernel.windows
    for batch in kernel.batches
]


@dataclass(frozen=True)
class Distance:
    """From the float32 reference, relative to its norm, over the real tokens."""

    hidden: float
    gradients: float | None  # of all weights together; None where none were taken


@dataclass(frozen=True)
class Outcome:
    """A kernel's distance, that of the stock model, eager, in the same dtype, and that of the causal model in float32."""

    kernel: Distance
    stock: Distance
    causal: float

    @property
    def fits(self) -> bool:
        """Whether the kernel computes what the reference does, up to its dtype."""
        pairs = [(self.kernel.hidden, self.stock.hidden), (self.kernel.gradients or 0, self.stock.gradients)]
        return all(of_kernel <= 2 * rounding + 1e-3 for of_kernel, rounding in pairs)


@dataclass(frozen=True)
class Batch:
    """What a model is called with. All tensors are (rows, length)."""

    ids: Tensor  # int64
    real: Tensor  # bool
    positions: Tensor | None  # int64

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments of a forward."""
        found = {"input_ids": self.ids.to(device)}
        if not self.real.all():
            found["attention_mask"] = self.real.long().to(device)
        if self.positions is not None:
            found["position_ids"] = self.positions.to(device)
        return found


def make_batch(kind: str, dry: bool, seed: int = 0) -> Batch:
    """Three rows; of one length, or padded on a side, or packed of sequences of several lengths."""
    length = 12 if dry else 192
    ids = torch.randint(3, 61, (3, length), generator=torch.Generator().manual_seed(seed))
    real = torch.ones_like(ids, dtype=torch.bool)
    if kind.startswith("padded"):
        real = torch.arange(length) < torch.tensor([[length], [length * 2 // 3], [length // 4]])
        real = real if kind.endswith("right") else real.flip(1)
    if kind != "packed":
        return Batch(ids, real, None)
    cuts = [(length,), (length // 3, length - length // 3), (length // 2, length // 4, length - length * 3 // 4)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    return Batch(ids, real, positions)


@functools.cache
def make_model(window: bool, dry: bool) -> nn.Module:
    """A random Mistral of two layers whose attention is neither flat nor a choice of one token; float32, on the CPU."""
    from transformers import MistralConfig, MistralModel

    hidden = 32 if dry else 256
    config = MistralConfig(
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        sliding_window=(4 if dry else 33) if window else None,
        initializer_range=hidden**-0.5,
        use_cache=False,
    )
    torch.manual_seed(0)
    return MistralModel._from_config(config, attn_implementation="eager").eval()


@functools.cache
def reference(dtype: str, kind: str, window: bool, dry: bool) -> tuple[Tensor, Tensor, float]:
    """The plain decoder's hidden states of real tokens, its gradients on one line, and how far off a causal one is."""
    from tests.helpers.references.plain_decoder import hidden_states

    model = copy.deepcopy(make_model(window, dry)).to(DTYPES[dtype]).float()  # the weights that the kernel gets
    weights = dict(model.named_parameters())
    model.state_dict = lambda: weights  # by itself it is detached
    batch = make_batch(kind, dry)

    def run(causal: bool) -> Tensor:
        seen = visible(kind, window, dry, causal)
        return hidden_states(model, batch.ids, seen, batch.positions)[batch.real]

    hidden = run(causal=False)
    (hidden * direction(hidden.shape)).sum().backward()
    return hidden.detach(), gradients_of(model), relative(run(causal=True).detach(), hidden.detach())


@functools.cache
def visible(kind: str, window: bool, dry: bool, causal: bool = False) -> Tensor:
    """Who sees whom, pair by pair: bool (rows, length, length)."""
    from tests.helpers.references.plain_decoder import reach

    batch = make_batch(kind, dry)
    return reach(batch.real, batch.positions, make_model(window, dry).config.sliding_window, causal)


@functools.cache
def stock(dtype: str, kind: str, window: bool, device: torch.device, dry: bool) -> Distance:
    """The stock model that was never patched, eager, with the mask written out."""
    hidden, gradients, _ = reference(dtype, kind, window, dry)
    model = copy.deepcopy(make_model(window, dry)).to(device, DTYPES[dtype])
    seen = visible(kind, window, dry)[:, None].to(device)
    mask = torch.zeros(seen.shape, dtype=DTYPES[dtype], device=device).masked_fill(
        ~seen, torch.finfo(DTYPES[dtype]).min
    )
    batch = make_batch(kind, dry)
    inputs = batch.inputs(device) | {"attention_mask": mask}
    found = model(**inputs).last_hidden_state[batch.real.to(device)]
    (found.float() * direction(found.shape).to(device)).sum().backward()
    return Distance(relative(found.detach(), hidden), relative(gradients_of(model), gradients))


def direction(shape: torch.Size) -> Tensor:
    """What the hidden states are multiplied with, so that their sum has gradients of all kinds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def gradients_of(model: nn.Module) -> Tensor:
    """All gradients on one line, float32, on the CPU."""
    return torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`; infinite where there is a NaN."""
    distance = float((actual.float().cpu() - expected).norm() / expected.norm())
    return distance if distance == distance else float("inf")


def check(case: Case, device: torch.device, dry: bool = False) -> Outcome:
    """Run one case.

    Args:
        case: Of CASES.
        device: Where the kernel runs.
        dry: Tiny sizes and stand-ins for the kernels, on a CPU.

    Raises:
        Exception: Whatever the kernel or its package raises, an ImportError where it is not installed.
    """
    hidden, gradients, causal = reference(case.dtype, case.batch, case.window, dry)
    rounding = stock(case.dtype, case.batch, case.window, device, dry)
    kernel = KERNELS[case.kernel]
    with backend_there(kernel.backend, dry):
        found, model = _run(kernel, case, device, dry)
    error = None if model is None else relative(gradients_of(model), gradients)
    return Outcome(Distance(relative(found, hidden), error), rounding, causal)


def _run(kernel: Kernel, case: Case, device: torch.device, dry: bool) -> tuple[Tensor, nn.Module | None]:
    """The hidden states of real tokens, and the model where it has gradients."""
    from bidirect_patch import enable_bidirectional

    model = copy.deepcopy(make_model(case.window, dry)).to(device, DTYPES[case.dtype])
    model.set_attn_implementation(kernel.backend)
    enable_bidirectional(model)
    batch = make_batch(case.batch, dry)
    if kernel.graph and not dry:
        return _replayed(model, batch, make_batch(case.batch, dry, seed=1), device)[batch.real.to(device)], None
    forward: Callable[..., object] = model
    if kernel.compiled:
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True, mode=kernel.compiled)
    has_gradients = not (dry and kernel.backend == "flex_attention")  # not on a CPU
    with _only(kernel.sdpa, dry), torch.set_grad_enabled(has_gradients):
        hidden = forward(**batch.inputs(device)).last_hidden_state[batch.real.to(device)]
        if not has_gradients:
            return hidden, None
        (hidden.float() * direction(hidden.shape).to(device)).sum().backward()
    return hidden.detach(), model


@contextlib.contextmanager
def _only(sdpa: str | None, dry: bool) -> Iterator[None]:
    """SDPA may take this kernel alone. A CPU has none of them."""
    if sdpa is None or dry:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, sdpa)]):
        yield


@torch.no_grad()
def _replayed(model: nn.Module, batch: Batch, other: Batch, device: torch.device) -> Tensor:
    """The hidden states of a CUDA graph that was captured on `other`, with nothing but real tokens, and given `batch`."""
    wanted = batch.inputs(device)
    static = {name: torch.ones_like(x) if name == "attention_mask" else x for name, x in wanted.items()}
    static = {name: x.clone() for name, x in static.items()} | {"input_ids": other.ids.to(device)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = model(**static).last_hidden_state
    for name, x in wanted.items():
        static[name].copy_(x)
    graph.replay()
    return hidden.clone()


def missing(kernel: Kernel, dry: bool) -> str:
    """Why a kernel can't run here, in words."""
    if kernel.backend.startswith("flash") and kernel.backend not in flash_backends(dry):
        return "not installed"
    return "needs a GPU" if kernel.graph and dry else ""


def part(run: Run) -> None:
    """One row for each kernel and dtype: its worst distances, and what didn't come out right."""
    run.write(
        "\nDistances from the decoder in plain torch, float32, relative to its norm: the worst of all batches (dense, padded "
        "right and left, packed; with and without a window), hidden states and gradients."
    )
    columns = ("kernel", "dtype", "cases", "hidden", "stock's", "gradients", "stock's", "causal, the least", "wrong")
    table = run.table(*columns)
    for name, kernel in KERNELS.items():
        if why := missing(kernel, run.dry):
            table.add(name, "", 0, *[""] * 5, why)
            continue
        for dtype in kernel.dtypes[:1] if run.dry else kernel.dtypes:
            outcomes, wrong = _outcomes([c for c in CASES if (c.kernel, c.dtype) == (name, dtype)], run)
            more = f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            table.add(name, dtype, len(outcomes), *_worst(outcomes), "; ".join(wrong[:2]) + more or "nothing")


def _outcomes(cases: list[Case], run: Run) -> tuple[list[Outcome], list[str]]:
    outcomes, wrong = [], []
    if run.dry:
        cases = cases[-2:]
    for case in cases:
        where = f"{case.batch}{', window' if case.window else ''}"
        if run.deadline.left() < KERNELS[case.kernel].seconds:
            wrong.append(f"{where}: no time was left")
            break
        try:
            outcomes.append(check(case, run.device, run.dry))
        except Exception as error:  # one kernel's fault is a cell of the table
            wrong.append(f"{where}: {run.failed(str(case), error)}")
            continue
        if not outcomes[-1].fits:
            wrong.append(where)
            run.problems.append(f"{case}: {outcomes[-1]}")
    return outcomes, wrong


def _worst(outcomes: list[Outcome]) -> list[str]:
    if not outcomes:
        return [""] * 5
    trained = [o for o in outcomes if o.kernel.gradients is not None]
    numbers = [
        max(o.kernel.hidden for o in outcomes),
        max(o.stock.hidden for o in outcomes),
        max((o.kernel.gradients for o in trained), default=None),
        max((o.stock.gradients for o in trained), default=None),
        min(o.causal for o in outcomes),
    ]
    return ["" if n is None else f"{n:.4f}" for n in numbers]
