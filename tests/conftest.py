"""Hypothesis: no deadlines, as machines are noisy; in CI the same examples every time, elsewhere new ones."""

import os

from hypothesis import settings

settings.register_profile("moeplan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("moeplan")
