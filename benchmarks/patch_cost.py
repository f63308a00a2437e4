"""What the patch costs beside its peers: per step, to switch on and off, and under torch.compile.

    python -m benchmarks.patch_cost [--rounds 15] [--quick]

The peer is transformers' own `config.is_causal = False` from 5.2 on, and hand-written subclasses on 4.39.
"""

import copy
import statistics
import time

import torch
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import paired_times, table
from benchmarks.report import bars, goal, paired, parser, single_thread, spread

VERSION = Version(transformers.__version__)


def config(hidden: int = 512, layers: int = 8, **settings):
    sizes = dict(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    return transformers.LlamaConfig(**{**sizes, **settings})


def make_peer(settings) -> tuple[str, torch.nn.Module] | None:
    """What people use without this package, on the installed transformers."""
    if VERSION >= Version("5.2"):
        settings = copy.deepcopy(settings)
        settings.is_causal = False
        return "native is_causal=False", transformers.LlamaModel(settings)
    if VERSION < Version("4.40"):
        from tests.helpers.references.tutorial import LlamaBiModel

        settings._attn_implementation = "sdpa"
        return "hand-written subclass", LlamaBiModel(settings)
    return None


def make_steps(settings, batch: int, length: int, padded: bool, tolerance: float = 1e-4) -> dict:
    """Forward and backward of a bare Llama on SDPA: the peer's and ours, with the same weights and hidden states."""
    from bidirect_patch import enable_bidirectional

    torch.manual_seed(0)
    name, peer = make_peer(settings)
    ours = transformers.LlamaModel._from_config(copy.deepcopy(settings), attn_implementation="sdpa")
    ours.load_state_dict(peer.state_dict())
    enable_bidirectional(ours)
    inputs = {"input_ids": torch.randint(settings.vocab_size, (batch, length))}
    real = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        real = torch.arange(length) < torch.linspace(length // 2, length, batch).long()[:, None]
        inputs["attention_mask"] = real.long()

    def make(model):
        def step() -> torch.Tensor:
            model.zero_grad()
            hidden = model(**inputs).last_hidden_state
            hidden[real].sum().backward()
            return hidden.detach()[real]

        return step

    steps = {name: make(peer), "ours": make(ours)}
    torch.testing.assert_close(steps["ours"](), steps[name](), atol=tolerance, rtol=tolerance)
    return steps


def step_cost(rounds: int, quick: bool) -> None:
    """Print forward + backward against the peer."""
    if make_peer(config(64, 1)) is None:
        print(f"No peer on transformers {VERSION}: it has neither a native switch nor the hand-written subclasses.")
        return
    shapes = {"4 layers of 512, 2x256": (config(layers=4), 2, 256), "12 layers of 64, 1x16": (config(64, 12), 1, 16)}
    if quick:
        shapes = {"1 layer of 64, 2x16": (config(64, 1), 2, 16)}
    rows, figure, worst = [], {}, 0.0
    for shape, (settings, batch, length) in shapes.items():
        for padded in (False, True):
            steps = make_steps(copy.deepcopy(settings), batch, length, padded)
            name = next(iter(steps))
            tiny = length <= 16
            if tiny:  # one step is too short for the clock
                steps = {way: lambda step=step: [step() for _ in range(20)] for way, step in steps.items()}
            times = paired_times(steps, rounds)
            ratios = paired(times, "ours", name)
            per = 20 if tiny else 1
            rows.append(
                {
                    "model": shape,
                    "mask": "padded" if padded else "none",
                    "peer": name,
                    "peer, ms": f"{1e3 * statistics.median(times[name]) / per:.1f}",
                    "ours, ms": f"{1e3 * statistics.median(times['ours']) / per:.1f}",
                    "ours / peer": spread(ratios),
                }
            )
            figure[f"{shape}, {'padded' if padded else 'no mask'}"] = ratios
            if not tiny:
                worst = max(worst, statistics.median(ratios))
    print(table(rows))
    if quick:
        return
    goal(
        f"forward + backward within 2% of the peer (transformers {VERSION}, the larger model)",
        worst <= 1.02,
        "The arithmetic is the same; what is left is the ready mask and the Python around each layer.",
    )
    bars(f"patch_cost_{VERSION}", f"forward + backward, ours / {name} (transformers {VERSION})", figure, 1.02)


class TensorCount(TorchDispatchMode):
    """Counts the tensors that come out of torch operators."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out))
        return out


def switch_cost(rounds: int, quick: bool) -> None:
    """Print what enabling and disabling a Llama-2-7B-shaped model costs."""
    from bidirect_patch import disable_bidirectional, enable_bidirectional

    sizes = config(4096, 32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(sizes)

    def toggle() -> None:
        enable_bidirectional(model)
        disable_bidirectional(model)

    start = time.perf_counter()
    toggle()
    first = 1e3 * (time.perf_counter() - start)
    later = [1e3 * t for t in paired_times({"toggle": toggle}, 3 if quick else 3 * rounds)["toggle"]]
    with TensorCount() as tensors:
        toggle()
    rows = [{"the first time, ms": f"{first:.1f}", "later, ms": spread(later, 1), "tensors made": tensors.count}]
    print(table(rows))
    met = statistics.median(later) < 20 and not tensors.count
    goal("enable + disable at Llama-2-7B's size under 20 ms without one tensor", met)


def compile_cost() -> None:
    """Print the graphs that torch.compile makes, and whether switching back and forth makes more."""
    from torch._dynamo.utils import counters

    from bidirect_patch import disable_bidirectional, enable_bidirectional

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    model = transformers.LlamaModel(config(64, 2)).eval()
    compiled = torch.compile(model, backend=backend)
    ids = torch.arange(24).view(2, 12)
    rows = []
    for mode in (True, False, True, False, True):
        (enable_bidirectional if mode else disable_bidirectional)(model)
        before = len(graphs)
        with torch.no_grad():
            out = compiled(ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(out, model(ids, use_cache=False).last_hidden_state, atol=1e-5, rtol=1e-5)
        breaks = sum(counters["graph_break"].values())
        rows.append(
            {"run": "bidirectional" if mode else "causal", "new graphs": len(graphs) - before, "breaks": breaks}
        )
    print(table(rows))
    new = [row["new graphs"] for row in rows]
    met = new[0] == 1 and new[1] <= 1 and not any(new[2:]) and not rows[-1]["breaks"]
    goal("one graph, no break, and toggling recompiles at most once per mode", met)


def main(arguments: list[str] | None = None) -> None:
    """Print the three tables."""
    options = parser(__doc__, rounds=15).parse_args(arguments)
    single_thread()
    step_cost(3 if options.quick else options.rounds, options.quick)
    print()
    switch_cost(options.rounds, options.quick)
    if VERSION >= Version("4.48") and not options.quick:
        print()
        compile_cost()


if __name__ == "__main__":
    main()
