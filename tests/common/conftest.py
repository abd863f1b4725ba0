"""transformers' common tests on this project's classes: `make common-tests`.

Each test must pass, or be listed in not_applicable.py with a reason. An entry of the list whose test passes or does not
exist is a failure.
"""

import os
import tempfile
from pathlib import Path

import pytest
from common import upstream

SOURCE = os.environ.get(upstream.VARIABLE)
collect_ignore_glob = [] if SOURCE else ["test_*.py"]

if SOURCE:
    _files = tempfile.TemporaryDirectory(prefix="ifseg-common-tests-")
    upstream.load(Path(SOURCE), Path(_files.name))

from common.not_applicable import NOT_RUN, reason  # noqa: E402

MARKERS = [
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "is_pipeline_test",
    "is_training_test",
    "order(index)",
]
SKIPPED_PART = pytest.StashKey[bool]()


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: marks tests of transformers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports a skipped test as failed unless it is listed, and a listed test as not applicable unless it passes."""
    report = yield
    why = reason(item)
    if why is None:
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = f"{item.name} was skipped, but is not listed in not_applicable.py: {report.longrepr}"
    elif report.skipped or report.failed or item.stash.get(SKIPPED_PART, False):
        item.stash[SKIPPED_PART] = True  # a subtest does not apply; others may pass
        if report.when != "teardown":
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1], f"Skipped: not applicable: {why}")
    elif report.when == "call":
        report.outcome = "failed"
        report.longrepr = f"{item.name} passes, but is listed in not_applicable.py: remove the entry."
    return report


def pytest_terminal_summary(terminalreporter):
    if not SOURCE:
        return
    for name, why in NOT_RUN.items():
        terminalreporter.write_line(f"not run: {name}: {why}")
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "skipped", "failed", "error")}
    terminalreporter.write_line(
        f"transformers' common tests: {counts['passed']} passed, {counts['skipped']} not applicable, "
        f"failed = {counts['failed'] + counts['error']}"
    )
