"""LLM2Vec's embedding of one text in plain torch: a stock model under a mask of zeros, one row, no padding."""

import torch

SHORT = 400  # LLM2Vec's limit of a text, which the texts of the tests stay below


@torch.no_grad()
def embedding(model, tokenizer, text, instruction="", pooling="mean", skip=True, chat=("", ""), end=""):
    """float32 of shape (width,).

    Args:
        model: A stock decoder without a head, on eager or SDPA.
        tokenizer: Its tokenizer.
        text, instruction: What is encoded; "" means no instruction.
        pooling: LLM2Vec's name.
        skip: LLM2Vec's skip_instruction.
        chat: What stands before and after both. `end`: what stands after that.
    """
    first = f"{instruction.strip()} " if instruction else ""
    behind = text.rstrip() if chat[1] or end else text
    ids = tokenizer(chat[0] + first + behind + chat[1] + end, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    pooled = len(tokenizer(behind + chat[1] + end, add_special_tokens=False)["input_ids"]) if skip else length
    hidden = model(input_ids=ids, attention_mask=torch.zeros(1, 1, length, length))[0][0].float()
    if pooling in ("eos_token", "last_token"):
        return hidden[-1]
    if pooling == "bos_token":
        return hidden[ids[0].tolist().index(tokenizer.bos_token_id)]
    counted = hidden[max(length - pooled, 0) :]
    if pooling == "mean":
        return counted.mean(0)
    total = sum(rank * vector for rank, vector in enumerate(counted, start=1))
    return total / (len(counted) * (len(counted) + 1) / 2)
