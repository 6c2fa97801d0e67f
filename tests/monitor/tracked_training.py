"""A short training that reports to Trackio; prints what is in its database."""

import json
import sys
from pathlib import Path

from monitor.test_trackers import train


project = Path(sys.argv[1]).name
train(Path(sys.argv[1]) / "run", "step_grpo", "trackio", project=project)

from trackio.sqlite_storage import SQLiteStorage  # noqa: E402


(run,) = SQLiteStorage.get_runs(project)
entries = SQLiteStorage.get_logs(project, run)
print(
    json.dumps(
        {
            "keys": sorted({key for entry in entries for key in entry}),
            "tables": [
                len(entry["completions_log/table"]["_value"]) for entry in entries if "completions_log/table" in entry
            ],
        }
    )
)
