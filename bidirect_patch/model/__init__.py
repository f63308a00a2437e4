"""What a model is made of: its decoders and attention modules, what their classes say of themselves, and small copies.

`facts` reads signatures and source once per class, `config` and `windows` read a config, `buffers` finds causal masks that are
kept as buffers, `walk` goes through a model's modules, `find` puts them together and says why a model is refused, `places` tells
whether layers were moved, `tiny` builds a small random model of the same class.
"""
