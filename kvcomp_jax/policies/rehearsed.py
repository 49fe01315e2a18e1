"""Tokens that a model looks at when it has to repeat the prompt."""

import jax

from kvcomp_jax.policies.base import Prompt, Stat
from kvcomp_jax.policies.prompt_rank import PromptRank
from kvcomp_jax.types import pytree, static


@pytree
class Rehearsed(PromptRank):
    """Rank by the greatest attention that any query of a rehearsal pays: the prompt again, after an instruction.

    The greatest over the tokens of the rehearsal and the heads of a group. It depends on no question. Rehearsing takes
    the model, so whoever runs it gives `close_prompt` the scores, see `Prompt.peak`.

    Attributes:
      chunk: Tokens of the prompt that are repeated in one pass; all of the prompt is seen by each.
      instruction: Text before each chunk.

    Source: KVzip, Kim et al. 2025, arXiv:2505.23416, section 3. Its code compares a chunk with that chunk's keys alone.
    """

    chunk: int = static(default=2048)
    instruction: str = static(default="\n\nRepeat the previous context:")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 token.")

    @property
    def most_instruction(self) -> int:
        """Tokens that the instruction may have."""
        return 64

    @property
    def rehearses(self) -> bool:
        """True."""
        return True

    def num_probes(self, capacity: int) -> int:
        """All queries of a pass."""
        return min(self.chunk + self.most_instruction, capacity)

    def from_prompt(self, stat: Stat | None, prompt: Prompt) -> jax.Array:
        """Refuse: nobody rehearsed."""
        del stat, prompt
        raise TypeError("this policy ranks by a rehearsal of the prompt: read it with models.generate, or give "
                        "close_prompt(stat=...) the scores.")  # fmt: skip
