"""All tests train in float32 unless they say otherwise: they hold runs to digits that bfloat16 does not have."""

import os

# Inherited by every rank and command that a test starts.
os.environ["COMOE_BF16"] = "0"
