"""pytest with its counts as JSON: `python -m gpu_check.run_tests OUTPUT.json ARGUMENTS...`; exit code 1 also if nothing but skips came of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


class Counts:
    """How many tests passed, failed and were skipped, and why the latter."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
        self.skipped: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped:
            reason: Any = report.longrepr
            self.skipped[str(reason[2] if isinstance(reason, tuple) else reason).removeprefix("Skipped: ")] += 1
        elif report.failed:
            self.failed.append(report.nodeid)
            print(f"\n{report.nodeid}\n{report.longreprtext[-6000:]}", flush=True)  # now, as the limit may end all of it


def main(output: Path, arguments: list[str]) -> int:
    counts = Counts()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[counts])
    output.write_text(json.dumps({"counts": counts.counts, "skipped": counts.skipped, "failed": counts.failed}), encoding="utf-8")
    if not code and not counts.counts["passed"]:
        print("no test ran")
        return 1
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
