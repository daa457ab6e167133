"""``python -m swin_unetr``, which is what ``torchrun -m swin_unetr`` starts on every rank."""

import sys

from .cli import main

sys.exit(main())
