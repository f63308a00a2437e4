"""An import path that stays: `bidirect_patch.head`. The head lives in `bidirect_patch.mntp.head`."""

from .mntp.head import apply_mntp_head as apply_mntp_head
from .mntp.head import remove_mntp_head as remove_mntp_head
