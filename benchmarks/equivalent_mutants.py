"""Mutants that no test can tell from the original, each with the reason: (file, text of the line, change) -> why."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("swap/apply.py", "deque(steps, maxlen=0)", "0 -> 1"): "the last None is kept until the function returns",
    (
        "attention/padding_and_packing.py",
        "if length > 1:",
        "Gt -> GtE",
    ): "one position has no difference to the one before, so that no sequence starts",
    (
        "attention/padding_and_packing.py",
        "mask = mask.to(device)",
        "mask = mask.to(device) -> pass",
    ): "there is one device where these tests run",
    (
        "swap/instance_forward.py",
        'return "stock"',
        "'stock' -> 'stockXX'",
    ): "the answer is compared with the two others alone",
    (
        "swap/instance_forward.py",
        'return "stock"',
        "return 'stock' -> return None",
    ): "the answer is compared with the two others alone",
    (
        "attention/ready_mask.py",
        "if READY_MASKS_ARE_INVERTED and mask.is_floating_point() and not mask.is_meta and bool((mask > 0).any()):",
        "0 -> 1",
    ): "the newest transformers stops at the first word of the line",
    (
        "attention/ready_mask.py",
        "if READY_MASKS_ARE_INVERTED and mask.is_floating_point() and not mask.is_meta and bool((mask > 0).any()):",
        "Gt -> GtE",
    ): "the newest transformers stops at the first word of the line",
    (
        "mntp/collator.py",
        "state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]",
        "1 -> 2",
    ): "more words are made, and the first one is the same",
    (
        "mntp/collator.py",
        'real = torch.from_numpy(join(rows, "attention_mask", lengths, 1) != 0)',
        "1 -> 2",
    ): "any number but 0 is real",
    (
        "mntp/collator.py",
        "first[at] = torch.diff(row_of[at], prepend=row_of.new_tensor([-1])) != 0",
        "1 -> 2",
    ): "any number that is no row's does",
    (
        "mntp/features.py",
        "return value.astype(np.int64, copy=False)",
        "False -> True",
    ): "a copy of the same numbers, which nobody writes to",
    ("mntp/loss.py", "return tensor.is_cuda", "return tensor.is_cuda -> return None"): "without a GPU both are false",
    ("mntp/loss.py", "CHUNK_BYTES = 108 * 2**20", "108 -> 109"): "a share of memory, not of the result",
    (
        "mntp/loss.py",
        "raw = weight.new_zeros(1, weight.shape[0], dtype=matmul_dtype(weight))",
        "1 -> 2",
    ): "what a family does to its logits, it does to two rows as to one",
    (
        "mntp/loss.py",
        "size = max(1, min(CHUNK_BYTES // (4 * weight.shape[0]), len(hidden)))",
        "1 -> 2",
    ): "the sum is the same in chunks of two rows",
    (
        "mntp/loss.py",
        "for start in range(0, max(len(hidden), 1), size):  # once too where nothing is scored, for the sink",
        "1 -> 2",
    ): "one more chunk, without rows",
    ("mntp/head.py", "rank = 20", "20 -> 21"): "no other mixin has a rank between the two",
    (
        "mntp/loss.py",
        "needs = [how.with_grad and needed for needed in ctx.needs_input_grad[:3]]",
        "3 -> 4",
    ): "the fourth are the targets, integers without a gradient",
    (
        "mntp/loss.py",
        "torch.log_softmax(logits.detach(), -1, dtype=torch.float32, out=log_p)",
        "-1 -> 1",
    ): "the same dimension of a matrix",
    (
        "mntp/strategies.py",
        'labels = F.pad(scored.targets, (1, 0), value=kwargs.get("ignore_index", -100))[None]',
        "'ignore_index' -> 'ignore_indexXX'",
    ): "the stock shift drops this label",
    (
        "mntp/strategies.py",
        'labels = F.pad(scored.targets, (1, 0), value=kwargs.get("ignore_index", -100))[None]',
        "-100 -> 100",
    ): "the stock shift drops this label",
    (
        "mntp/strategies.py",
        'labels = F.pad(scored.targets, (1, 0), value=kwargs.get("ignore_index", -100))[None]',
        "100 -> 101",
    ): "the stock shift drops this label",
    (
        "mntp/strategies.py",
        "return hidden.new_zeros(1, 1, lm_head.out_features)",
        "1 -> 2",
    ): "its place is taken by other logits, whatever its shape",
    (
        "mntp/strategies.py",
        'return (getattr(function, "__module__", None) or "").startswith("transformers.models.")',
        "'' -> 'XX'",
    ): "neither begins with the name of a family",
}
