# SPDX-License-Identifier: Apache-2.0
"""`perf` is a folder of the repository, not an installed package."""

import sys
from pathlib import Path

# Last on the path, so that it shadows nothing.
sys.path.append(str(Path(__file__).resolve().parents[2]))
