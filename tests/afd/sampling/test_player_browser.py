"""The live player in a real browser, on the shipped student: what a viewer sees and does."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

import afd
from tests.afd.sampling.conftest import Browser

pytestmark = pytest.mark.browser

ROOT = Path(afd.__file__).parents[1]
SCREENSHOTS = ROOT / "outputs" / "browser"
RED, YELLOW = "a large red ball is dropped", "a large yellow ball is dropped"
# The brightest red and green on the canvas: a red ball has little green, a yellow one as much as red.
BRIGHTEST = """(() => {
  const screen = document.getElementById("screen");
  const pixels = screen.getContext("2d").getImageData(0, 0, screen.width, screen.height).data;
  let red = 0, green = 0;
  for (let i = 0; i < pixels.length; i += 4) { red = Math.max(red, pixels[i]); green = Math.max(green, pixels[i + 1]); }
  return [red, green];
})()"""


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """`afd sample --stream --serve` without an end: the process, its page, its mp4."""
    out = tmp_path / "live.mp4"
    command = [sys.executable, "-m", "afd.cli", "sample", "--stream", "--serve", "0", "--prompt", RED, "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen(
        [*command, "--out", str(out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address is not None, f"expected the player's address, got {line!r}"
    try:
        yield process, address.group(), out
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=30)


def test_a_viewer_sees_frames_while_they_are_made_and_changes_the_prompt(
    stream: tuple[subprocess.Popen[str], str, Path], browser: Browser
) -> None:
    process, address, out = stream
    assert not out.exists()  # nothing is generated before somebody watches
    browser.go(address)
    shown = int(browser.wait_until("document.body.dataset.shown"))
    assert process.poll() is None  # the stream has no end, and its first frames are on the canvas
    red, green = browser.run(BRIGHTEST)
    assert red > 120 > green
    assert shown < 30
    browser.wait_until(f"document.body.dataset.shown >= {shown + 12}")
    for row in ("#first", "#seen"):
        assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", browser.text(row)), browser.text(row)
    for row in ("#fps", "#student"):
        assert re.fullmatch(r"[\d.]+ frames/s", browser.text(row)), browser.text(row)
    browser.screenshot(SCREENSHOTS / "player-red.png")
    with av.open(str(out)) as container:  # and the file plays meanwhile
        assert sum(1 for _ in container.decode(video=0)) >= shown

    browser.type("#prompt", YELLOW)
    browser.click("#send")
    browser.wait_until(f"document.body.dataset.prompt === '{YELLOW}'")
    changed_at = int(browser.run("document.body.dataset.frame"))
    browser.wait_until(f"document.body.dataset.frame >= {changed_at + 6}")
    _, green = browser.run(BRIGHTEST)
    assert green > 120
    assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", browser.text("#change"))
    first, second = browser.text("#prompts").splitlines()
    assert first == f"{RED} from frame 0"
    assert second.startswith(f"{YELLOW} from frame ")
    assert shown + 12 <= int(second.split()[-1]) <= changed_at  # playback went on while the driver asked
    browser.screenshot(SCREENSHOTS / "player-yellow.png")
    assert browser.errors() == []

    browser.type("#prompt", "a large yellow cube is dropped")
    browser.click("#send")
    browser.wait_until("document.getElementById('message').textContent.includes(\"does not know: 'cube'\")")
    browser.screenshot(SCREENSHOTS / "player-refused.png")
    assert process.poll() is None

    browser.click("#pause")
    browser.wait_until("document.body.dataset.state === 'paused'")
    browser.wait_until("document.getElementById('buffer').textContent === '0 frames'")
    still = browser.run("document.body.dataset.shown")
    time.sleep(0.5)
    assert browser.run("document.body.dataset.shown") == still
    browser.click("#pause")
    browser.wait_until(f"document.body.dataset.shown > {still}")

    browser.click("#stop")
    browser.wait_until("document.body.dataset.state === 'finished'")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"\d+ frames, first chunk after [\d.]+ s, then [\d.]+ frames/s", output)
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= int(browser.run("document.body.dataset.shown"))
