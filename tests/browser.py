"""A browser for tests: Chromium as Qt WebEngine brings it (pip install PySide6-WebEngine), without a screen.

`Browser` starts this file as a program in a process of its own, for Qt wants to be alone, and talks to it in lines of
JSON. Mouse and keys take the way that a person's take, so what they come to is there a little later: `eventually`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def eventually(holds, seconds=20):
    """Whether it does, within so many seconds."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


class Browser:
    """A page that is open: with Browser(file, "dark", 400, 800) as page. Skips the test where there is no browser."""

    def __init__(self, file, theme, width, height):
        words = [sys.executable, __file__, str(file), theme, str(width), str(height)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        said = json.loads(self._process.stdout.readline())
        if said != "open":
            self.__exit__()
            pytest.skip(said)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, kind, value=None):
        self._process.stdin.write(json.dumps([kind, value]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def script(self, text):
        """What an expression in JavaScript comes to."""
        return json.loads(self._ask("script", f"JSON.stringify({text}) ?? 'null'"))

    def key(self, name):
        """Press a key, named as Qt does: Tab, Right, PageDown ..."""
        self._ask("key", name)

    def move(self, x, y):
        """The mouse, to CSS px of the window."""
        self._ask("move", [x, y])

    def click(self, x, y):
        self._ask("click", [x, y])

    def shoot(self, file):
        """A PNG of the window as it is drawn by now; the page moves on only while it is asked something."""
        self._ask("shoot", str(file))

    @property
    def requests(self):
        """Every address asked for so far, data: apart."""
        return self._ask("requests")

    @property
    def console(self):
        """What the page and the browser have said, alerts too."""
        return self._ask("console")


def main(file, theme, width, height):
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    scheme = {"dark": 0, "light": 1}[theme]
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={scheme}"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = flags
    try:
        from PySide6.QtCore import QEventLoop, QPoint, Qt, QUrl
        from PySide6.QtTest import QTest
        from PySide6.QtWebEngineCore import (
            QWebEnginePage,
            QWebEngineProfile,
            QWebEngineSettings,
            QWebEngineUrlRequestInterceptor,
        )
        from PySide6.QtWebEngineWidgets import QWebEngineView
        from PySide6.QtWidgets import QApplication
    except ImportError as error:
        answer(f"no browser, which PySide6-WebEngine would bring: {error}")
        return
    application = QApplication([__file__])
    requests, console = [], []

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            requests.append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: ARG002
            console.append(message)

        def javaScriptAlert(self, origin, message):  # noqa: ARG002
            console.append(f"alert: {message}")

    profile, watch, view = QWebEngineProfile(), Watch(), QWebEngineView()
    profile.setUrlRequestInterceptor(watch)
    page = Page(profile, view)
    page.settings().setAttribute(
        QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True
    )  # else it cannot
    view.setPage(page)
    view.resize(int(width), int(height))
    view.show()

    def wait_for(start):
        """What `start` hands to the function that it is given."""
        found, loop = [], QEventLoop()
        start(lambda result=None: (found.append(result), loop.quit()))
        if not found:
            loop.exec()
        return found[0]

    def load(done):
        page.loadFinished.connect(done)
        page.load(QUrl.fromLocalFile(str(Path(file).resolve())))

    answer("open" if wait_for(load) else f"{file} does not load")
    for line in sys.stdin:
        (kind, value), target, result = json.loads(line), view.focusProxy(), None
        at = QPoint(*map(round, value)) if kind in ("move", "click") else None
        if kind == "script":
            result = wait_for(lambda done, text=value: page.runJavaScript(text, done))
        elif kind == "key":
            QTest.keyClick(target, getattr(Qt.Key, f"Key_{value}"))
        elif kind == "shoot":
            view.grab().save(value)
        elif kind == "click":
            QTest.mouseClick(target, Qt.MouseButton.LeftButton, pos=at)
        elif kind == "move":
            QTest.mouseMove(target, at)
        else:
            result = {"requests": requests, "console": console}[kind]
        answer(result)
    del application


def answer(value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # Qt's own order of destruction would have the page outlive its profile
