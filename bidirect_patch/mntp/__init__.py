"""Masked next token prediction: batches (`collator`), the loss (`head`), and what a `Trainer` reports of it (`metrics`).

`features` and `tokens` read what the collator is given. `head` uses `causal_lm` to find the model with the loss, `inputs` to
check a call, `strategies` (with `views` and `loss`) to compute the loss, and `eval_logits` for what is kept of the logits.
"""
