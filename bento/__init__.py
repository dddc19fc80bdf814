"""The BentoML service."""

import os
import sys
from contextlib import suppress

# BentoML reports each start to its makers, unless this is set. Its command looks before it imports the service, and
# remembers.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
with suppress(KeyError, AttributeError):
    sys.modules["bentoml._internal.utils.analytics.usage_stats"].do_not_track.cache_clear()
