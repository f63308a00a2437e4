"""Seeing what a model does, instead of believing its flags.

`report` runs a model (`probe`) and tells which positions depend on which (`dependence`). `trial` patches a small random model of
a class and reports on it, and `proof` keeps what came out, once per class, before the patch of the real one is trusted. `late`
does so at the first forward, for what can't run yet. `mode` tells whether a model is bidirectional now.
"""
