"""A scan for faults: every decoder class of the installed transformers, with every argument that its signature names."""
