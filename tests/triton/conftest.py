"""Tests in `interpreted/` need ``TRITON_INTERPRET=1`` before Triton is imported; without it they are not collected."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
