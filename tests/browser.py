"""A headless Chromium, its profile empty, that notes what pages request and complain of. Without one, tests skip."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,2200",
)  # fmt: skip


def start(profile: Path):
    """A driver; the test is skipped, with the reason, where Chromium or its driver is missing or does not start."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    log = str(profile.parent / "chromedriver.log")
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "localhost,127.0.0.1"]))
    try:
        service = webdriver.ChromeService(executable_path=programs[1], log_output=log)
        driver = webdriver.Chrome(options=options, service=service)
    except Exception as error:  # whatever keeps a browser from starting is no fault of the page
        pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
    driver.set_page_load_timeout(60)
    return driver


def requested(driver) -> list[str]:
    """The addresses that pages asked for since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def complaints(driver) -> list[str]:
    """What stood on the console since the last call, at any level."""
    return [entry["message"] for entry in driver.get_log("browser")]
