"""A headless Chromium that tests drive by its DevTools protocol, over a pipe: no network at all."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
# The browser reads from descriptor 3 and writes to 4.
LAUNCH = "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); "
LAUNCH += "os.execvp(sys.argv[3], sys.argv[3:])"
KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
SECONDS = 60


class Browser:
    """One page in one browser. `events` has everything that the browser has said unasked."""

    def __init__(self, profile):
        program = next((p for p in PROGRAMS if shutil.which(p)), None)
        if program is None:
            pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
        theirs_in, self.out = os.pipe()
        self.inn, theirs_out = os.pipe()
        # Above 4, so that neither is overwritten before it is duplicated.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, theirs), program, *flags],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (theirs_in, theirs_out, *theirs):
            os.close(fd)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def close(self):
        os.close(self.out)
        os.close(self.inn)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def send(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        reply = self.wait(lambda said: said.get("id") == self.number, method)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def wait(self, wanted, what):
        """The next message that is wanted; others are kept in `events`."""
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self.buffer:
                line, self.buffer = self.buffer.split(b"\0", 1)
                said = json.loads(line)
                if "id" not in said:
                    self.events.append(said)
                if wanted(said):
                    return said
            ready, _, _ = select.select([self.inn], [], [], max(0, end - time.monotonic()))
            assert ready, f"{what}: the browser did not answer within {SECONDS} s"
            read = os.read(self.inn, 2**20)
            assert read, f"{what}: the browser has ended"
            self.buffer += read

    def open(self, url):
        """Load a page, also where only the part behind # differs from the page that is shown."""
        for address in ("about:blank", url):
            self.events.clear()
            self.send("Page.navigate", url=address)
            if not any(e["method"] == "Page.loadEventFired" for e in self.events):
                self.wait(lambda said: said.get("method") == "Page.loadEventFired", address)

    def run(self, expression):
        """The value of a JavaScript expression, awaited, as JSON."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key):
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == " ":
            code["text"] = " "
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **code)

    def size(self, width, height=1000):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def dark(self, on):
        scheme = "dark" if on else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, path):
        """Write a PNG of the whole page."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self):
        """Errors of scripts, messages of the console and the log, and requests of the page."""
        found = []
        for event in self.events:
            method, said = event["method"], event["params"]
            if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(json.dumps(said)[:500])
            if method == "Network.requestWillBeSent":
                url = said["request"]["url"]
                if not url.startswith("data:") and said.get("type") != "Document":
                    found.append(url)
        return found
