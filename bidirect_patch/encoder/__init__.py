"""What an encoder has after its model: which tokens are pooled, as a function and as a module of sentence-transformers.

`reopening` lets sentence-transformers open the modules of this package that it saved.
"""
