"""The tasks of the E5 data that LLM2Vec's supervised settings name, one file a task, and the instruction of each."""

# Where a task has two instructions, its rows take turns.
E5_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    ),
    "dureader": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "eli5_question_answer": ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": ("Given a multi-hop question, retrieve documents that can help answer the question",),
    "miracl": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "mrtydi": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "msmarco_passage": ("Given a web search query, retrieve relevant passages that answer the query",),
    "msmarco_document": ("Given a web search query, retrieve relevant documents that answer the query",),
    "nq": ("Given a question, retrieve Wikipedia passages that answer the question",),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": ("Retrieve Wikipedia passages that answer the question",),
    "t2ranking": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
}
# LLM2Vec up to 0.1.5 read a file for each of two instructions, such as allnli_split1. The data hold these files beside the whole.
E5_SPLITS: dict[str, str] = {  # such a file, and the task that it is a part of
    f"{task}_split{number}": task
    for task, instructions in E5_INSTRUCTIONS.items()
    if len(instructions) > 1
    for number in range(1, len(instructions) + 1)
}
E5_INSTRUCTIONS |= {split: (E5_INSTRUCTIONS[task][int(split[-1]) - 1],) for split, task in E5_SPLITS.items()}

# There the documents of these were texts of the same kind as the query, and had the instruction too.
E5_OF_ONE_KIND = frozenset({"allnli_split2", "quora_duplicates_split1", "quora_duplicates_split2"})
