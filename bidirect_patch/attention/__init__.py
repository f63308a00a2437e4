"""The forward pass of a patched model, from the user's mask to each attention module.

`padding_and_packing` reads the user's mask and positions. `ready_mask` makes of them what each backend takes (`dense`, `flex`,
`flash`, `packed_sdpa`), or `mirror` does so of a mask that the model made itself. `model_forward` and `attention_forward` change
the arguments of the two kinds of forward, `plan` says what each module of a decoder gets, and refuses what a backend can't do.
`mixed` refuses a model of which only some layers are patched, `labels` puts on the hooks that look for labels that leak
(`label_leak`), `indexer_positions` serves sparse attention. `versions` and `old_releases` hold what differs by release of
transformers, `handling` what differs by architecture.
"""
