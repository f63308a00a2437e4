"""Write what llm2vec 0.2.3 itself gives for a tiny model, for the releases on which it does not run.

    python -m tests.helpers.llm2vec_embeddings tests/llm2vec/embeddings_of_llm2vec_0_2_3.json

It needs an environment with llm2vec 0.2.3 and transformers 4.44.2.
"""

import json
import sys
import tempfile

from .llm2vec_folders import INSTRUCTION, POOLINGS, TEXTS, make_tokenizer, write_base

NUMBERS = 4  # of each embedding

if __name__ == "__main__":
    from llm2vec import LLM2Vec

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        write_base(folder, tokenizer=make_tokenizer(prepend="never"))
        for pooling in POOLINGS:
            model = LLM2Vec.from_pretrained(folder, pooling_mode=pooling)
            for instruction in ("", INSTRUCTION):
                vectors = model.encode([[instruction, text] for text in TEXTS], show_progress_bar=False)
                rows = [[round(float(x), 7) for x in vector[:NUMBERS]] for vector in vectors]
                cases.append({"pooling_mode": pooling, "instruction": instruction, "embeddings": rows})
    with open(sys.argv[1], "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
