"""Keeps libraries' own bars and notices out of a command's output; errors still come through."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """For commands, never for library code: what matters of these messages, the command says itself."""
    # Says at import that an optional kernel package is not installed; the built-in kernels serve.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
