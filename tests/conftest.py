"""What holds for all tests."""

from __future__ import annotations

import hypothesis

# A machine that is busy with something else is no failure.
hypothesis.settings.register_profile("rlsys", deadline=None)
hypothesis.settings.load_profile("rlsys")
