"""What the modules of the model that is computing in this thread need to know of the step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from adapterbay.server.mix.attention import PromptStore
    from adapterbay.server.mix.plan import AdapterMix


class StepContext(threading.local):
    """`mix`: who uses what; None is the base alone. `kept`: the tokens, ascending, that reach the language-model head.

    `virtual`: (indices [count] of tokens of the step, embeddings [count, hidden]) that take the place of what the
    input embedding gives for them. `prompts`: what single attention layers look at beside a row's own keys. `behind`:
    what is to be added to what the attention module under way will give, [tokens, hidden].
    """

    mix: AdapterMix | None = None
    kept: tuple[int, ...] | None = None
    virtual: tuple[Tensor, Tensor] | None = None
    prompts: PromptStore | None = None
    behind: Tensor | None = None


step_context = StepContext()
