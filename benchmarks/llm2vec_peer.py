"""Forward and backward of a patched Llama beside llm2vec 0.2.3's own `LlamaBiModel`, in the same run.

    python -m benchmarks.llm2vec_peer [--rounds 15] [--quick]

It needs an environment with llm2vec 0.2.3 and transformers 4.44.2, which `tox -e t4442` makes.
"""

import copy
import statistics
import sys
from importlib.util import find_spec

import torch

from benchmarks.measure import paired_times, table
from benchmarks.report import bars, goal, paired, parser, single_thread, spread


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    options = parser(__doc__, rounds=15).parse_args(arguments)
    if find_spec("llm2vec") is None:
        sys.exit(__doc__)
    from llm2vec.models import LlamaBiModel
    from transformers import LlamaConfig, LlamaModel

    from bidirect_patch import enable_bidirectional

    single_thread()
    hidden, layers, batch, length = (64, 1, 2, 16) if options.quick else (512, 4, 2, 256)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=8)
    rows, figure = [], {}
    for backend in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=1000, use_cache=False, **sizes)
        stock = LlamaModel._from_config(copy.deepcopy(config), attn_implementation=backend)
        config._attn_implementation = backend
        peer = LlamaBiModel(config)
        peer.load_state_dict(stock.state_dict())
        ours = enable_bidirectional(stock)
        real = torch.arange(length) < torch.linspace(length // 2, length, batch).long()[:, None]
        ids = torch.randint(1000, real.shape)
        for padded in (False, True):
            mask = real if padded else torch.ones_like(real)

            def make(model, ids=ids, mask=mask):
                def step() -> torch.Tensor:
                    model.zero_grad()
                    hidden = model(ids, attention_mask=mask.long()).last_hidden_state[mask]
                    hidden.sum().backward()
                    return hidden.detach()

                return step

            steps = {"llm2vec": make(peer), "ours": make(ours)}
            torch.testing.assert_close(steps["ours"](), steps["llm2vec"](), atol=1e-4, rtol=1e-4)
            times = paired_times(steps, 2 if options.quick else options.rounds)
            ratios = paired(times, "ours", "llm2vec")
            figure[f"{backend}, {'padded' if padded else 'all real'}"] = ratios
            rows.append(
                {
                    "backend": backend,
                    "batch": "padded" if padded else "all real",
                    "llm2vec, ms": f"{1e3 * statistics.median(times['llm2vec']):.0f}",
                    "ours, ms": f"{1e3 * statistics.median(times['ours']):.0f}",
                    "ours / llm2vec": spread(ratios),
                }
            )
    print(table(rows))
    if not options.quick:
        goal("no slower than llm2vec (within 2%)", max(statistics.median(r) for r in figure.values()) <= 1.02)
        bars("llm2vec", "forward + backward, ours / llm2vec 0.2.3", figure, 1.02)


if __name__ == "__main__":
    main()
