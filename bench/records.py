"""Records of measurements, as they lie in bench/results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ceat_fast.environment import describe_environment
from ceat_fast.files import write_json


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the command that is running, with its arguments, the machine and what was measured as JSON."""
    command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": command, "environment": describe_environment(), **record})
