"""The forward pass of a patched model, from the user's mask to each attention module.

`padding_and_packing` reads the user's mask and positions. `ready_mask` makes of them what each backend takes (`dense`, `flex`,
`flash`, `packed_sdpa`), or `mirror` does so of a mask that the model made itself. `model_forward` and `attention_forward` change
the arguments of the two kinds of forward, `plan` says what each module of a decoder gets. `mask_origin` tells whether a mask
is the patch's, `labels` watches for labels that leak, `indexer_positions` serves sparse attention. `versions` holds what
differs by release of transformers, `handling` what differs by architecture.
"""
