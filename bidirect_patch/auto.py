"""`import bidirect_patch.auto`: what is saved as bidirectional opens as bidirectional.

After the import, on every transformers, `from_pretrained` of a checkpoint whose config says `is_causal: false` returns
an enabled model, and an adapter that was trained bidirectionally enables the model that it is loaded onto, through PEFT
or through transformers. Without the import the second only warns, once this package is in use.
"""

from .checkpoints import hooks
from . import patch

patch.install_hooks()
hooks.enables = True
