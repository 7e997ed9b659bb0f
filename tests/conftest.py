"""All tests train in float32 unless they say otherwise: they hold runs to digits that bfloat16 does not have."""

import os

import hypothesis

# Inherited by every rank and command that a test starts.
os.environ["COMOE_BF16"] = "0"

# A busy machine is no fault.
hypothesis.settings.register_profile("comoe", deadline=None)
hypothesis.settings.load_profile("comoe")
