"The explorer in a real browser: JupyterLab on a free port, a headless Chromium that runs the notebook, clicks, and types."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing outside this machine is asked; a browser that is root needs --no-sandbox.
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
MASK, PAINTED, DETAIL = 0, 1, 2   # columns of pictures


def browser() -> str:
    "The Chromium of this machine; the test is skipped without one."
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on this machine (Debian: apt-get install chromium; or set CHROME)")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab of its own that serves a copy of the notebook, and that copy."
    browser()
    pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "nbs" / "analysis" / "54_explorer.ipynb", folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder / ".jupyter" / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(folder / ".ipython")}
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | own | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=t",
               f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    settings = folder / ".jupyter" / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')   # asks no one, and puts no question over the pictures
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api/status?token=t"), 60, lambda: (folder / "server.log").read_text()[-3000:])
        yield address, folder / "explorer.ipynb"
    finally:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/api/shutdown?token=t", method="POST"), timeout=5).close()   # ends its kernels too
            server.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            server.kill()
            server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as page:
            return page.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(true, seconds: float, why):
    "Until `true()` is true; fails with `why()` after so many seconds."
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, why()
        time.sleep(.05)
    return value


@pytest.fixture(scope="module")
def page(lab):
    "The notebook, opened and run to its end."
    from playwright.sync_api import sync_playwright
    address, _ = lab
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=FLAGS + ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0))
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(90_000)
        page.goto(f"{address}/lab/tree/explorer.ipynb?token=t&reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.get_by_text("| Idle").wait_for()       # the status bar: the kernel is there
        page.click(".lm-MenuBar-item:has-text('Run')")
        page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        page.wait_for_selector(".mae-picture img", state="attached", timeout=120_000)
        pictures(page).first.scroll_into_view_if_needed()
        yield page
        chromium.close()


def pictures(page): return page.locator(".mae-picture")


def pixels(page, column: int) -> str:
    "What the first picture of a column shows, as a data address."
    return pictures(page).nth(column).locator("img").evaluate("""async (image) => {
        for (let i = 0; i < 50; i++) if (await image.decode().then(() => true, () => false)) break;   // it may be replaced meanwhile
        const canvas = Object.assign(document.createElement('canvas'), { width: image.naturalWidth, height: image.naturalHeight });
        canvas.getContext('2d').drawImage(image, 0, 0);
        return canvas.toDataURL();
    }""")


def changes(page, column: int, before: str, seconds: float = 20) -> str:
    "The picture once it differs from `before`."
    def other():
        now = pixels(page, column)
        return now if now != before else None
    return wait_for(other, seconds, lambda: f"picture {column} stayed the same")


def patch(page, column: int, i: int): return pictures(page).nth(column).locator("button").nth(i)


def test_a_click_hides_a_patch_and_a_second_one_shows_it_again(page):
    mask, painted = pixels(page, MASK), pixels(page, PAINTED)
    pressed = patch(page, MASK, 20).get_attribute("aria-pressed")
    patch(page, MASK, 20).click()
    changed = changes(page, MASK, mask), changes(page, PAINTED, painted)
    wait_for(lambda: patch(page, MASK, 20).get_attribute("aria-pressed") != pressed, 5, lambda: "aria-pressed stayed")
    patch(page, MASK, 20).click()
    assert (changes(page, MASK, changed[0]), changes(page, PAINTED, changed[1])) == (mask, painted)


def test_arrow_keys_walk_and_enter_chooses(page):
    cols = page.evaluate("document.querySelector('.mae-patches').style.gridTemplate.match(/repeat\\((\\d+), 1fr\\)$/)[1] | 0")
    patch(page, MASK, cols + 1).click()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "End", "ArrowRight"):   # the border stops it
        page.keyboard.press(key)
    last = 2 * cols - 1
    assert page.evaluate("document.activeElement.dataset.patch") == str(last)
    assert page.locator(".jp-Cell.jp-mod-active .mae-picture").count() > 0          # the notebook did not take the keys
    for key in ("Enter", " "):
        before = patch(page, MASK, last).get_attribute("aria-pressed")
        page.keyboard.press(key)
        wait_for(lambda: patch(page, MASK, last).get_attribute("aria-pressed") != before, 20, lambda: f"{key!r} did nothing")
        page.wait_for_timeout(700)                                                  # all that the kernel sends has come
        assert page.evaluate("document.activeElement.dataset.patch") == str(last)   # a new picture does not take the focus away
    assert pictures(page).nth(MASK).locator("button[tabindex='0']").count() == 1    # one stop of the Tab key a picture


def test_a_click_on_attention_asks(page):
    mask, detail = pixels(page, MASK), pixels(page, DETAIL)
    patch(page, DETAIL, 3).click()
    changes(page, DETAIL, detail)
    wait_for(lambda: patch(page, DETAIL, 3).get_attribute("aria-pressed") == "true", 5, lambda: "not asked")
    assert "row 0, column 3, asks" == patch(page, DETAIL, 3).get_attribute("aria-label") and pixels(page, MASK) == mask


def test_a_scene_shows_all_views_and_a_mistake_is_one_line(page):
    count = pictures(page).count()
    models = page.locator(".widget-dropdown:has-text('model') select")
    models.first.select_option("siammae-tiny")
    wait_for(lambda: page.get_by_text("choose a scene").count(), 20, lambda: "no message")
    page.locator(".widget-dropdown:has-text('picture') select").select_option("scene 0, 3 views")
    wait_for(lambda: pictures(page).count() > count, 20, lambda: "no further views")
    assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']").count()


def test_no_state_is_saved(page, lab):
    "What JupyterLab writes holds no state of a widget, only the reference that a reader clears (a rule of test_repository)."
    _, notebook = lab
    before = notebook.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    wait_for(lambda: notebook.stat().st_mtime_ns != before and notebook.read_text().endswith("}\n"), 20, lambda: "not saved")   # to the end
    saved = json.loads(notebook.read_text())
    assert any(cell.get("execution_count") for cell in saved["cells"]) and "widgets" not in saved["metadata"]
    assert not any("widget-state" in mime for cell in saved["cells"] for output in cell.get("outputs", []) for mime in output.get("data", {}))
