"""Headless Chromium for tests of pages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def find_browser() -> str:
    """Return the browser, or skip the test (in CI: fail it)."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI has no chromium; .ci/run installs it")
        pytest.skip("no chromium is installed")
    return browser


def browse(browser: str, profile: Path, *words: str) -> str:
    """Run a browser without network access beyond this machine, and return its standard output."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    done = subprocess.run([browser, *flags, *words], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
