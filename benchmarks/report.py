"""A picture of the feature report, for the README.

`python -m benchmarks.report out/demo --feature 2207 --search otherwise` takes the page that `sae-fast report` wrote, opens
it in Debian's Chromium, searches, chooses a feature, marks it, and writes docs/report.png.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer
from selenium import webdriver
from selenium.webdriver.common.by import By


def main(
    run: Annotated[Path, typer.Argument(help="The folder that holds report.html.")] = Path("out/demo"),
    feature: Annotated[int, typer.Option(help="The feature that is open.")] = 0,
    search: Annotated[str, typer.Option(help="What is searched for.")] = "",
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("docs/report.png"),
) -> None:
    """Write a picture of a run's page with a feature open."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_window_size(1440, 1080)
        driver.get(f"{(run / 'report.html').resolve().as_uri()}#{feature}")
        while not driver.execute_script("return performance.getEntriesByName('contexts').length"):
            time.sleep(0.05)
        driver.find_element(By.CSS_SELECTOR, "th[data-key=density] button").click()
        driver.find_element(By.ID, "where").send_keys("at the token")
        driver.find_element(By.ID, "search").send_keys(search)
        driver.find_element(By.CSS_SELECTOR, "[data-mark=relevant]").click()
        time.sleep(1)
        driver.save_screenshot(str(out))
    finally:
        driver.quit()


if __name__ == "__main__":
    typer.run(main)
