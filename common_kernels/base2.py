"""Numbers of a softmax in powers of two, as Python has them: kernels make constants of their language from these.

Scores are kept in the domain of base 2 (`score * log2(e)`), since `exp2` is one instruction where `exp` is two.
"""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# The maximum before any key was seen: finite, so that "minus infinity minus minus infinity" never arises, and so low
# that no score is below it.
LOWEST = -1.0e30
