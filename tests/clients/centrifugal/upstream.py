#!/usr/bin/env python3
"""The SDK's own tests, from the source distribution of centrifuge-python, against natter.

    upstream.py NATTER

NATTER is the binary. Fetches the source distribution of the version in requirements.txt into .natter/clients, and runs those
tests of `tests/test_client.py` that talk to a server. They are written for Centrifugo with the configuration of their
docker-compose.yml. What is replaced in them is its address and its secret, which is too short for natter; the SDK is not
changed. Those that can't pass are listed below with the reason.

The tests have no deadlines of their own, so each has one here. Prints `N passed, N failed` and exits 0 or 1.
"""

import importlib
import inspect
import logging
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import unittest

from support import ROOT, SECRET, START_DEADLINE, Up

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = ROOT / ".natter/clients/centrifuge-python"
TEST_SECONDS = 30

USERS = "natter counts users, not connections, and both connections of the test are one user"
# Test, and why natter does not pass it.
CANNOT_PASS = {
    "TestJoinLeave.test_join_leave": f"{USERS}; and it does not ask for joins: Centrifugo's option pushes them to everybody",
    "TestPresenceTwoClients.test_presence_two_clients": USERS,
    "TestAutoRecovery.test_auto_recovery": "takes offsets for the numbers 1, 2, 3 …; natter's only grow",
    "TestServerSideSubscriptions.test_server_side_subs": "needs Centrifugo's personal channel, `#42`",
    "TestGetState.test_get_state_called_again_on_unrecoverable_position": "needs a channel that keeps two messages only",
}


def version():
    return re.search(r"^centrifuge-python==(\S+)$", (HERE / "requirements.txt").read_text(), re.MULTILINE)[1]


def fetch(address):
    """The unpacked source distribution, with the address and the secret of this run; its folder."""
    name = f"centrifuge_python-{version()}"
    archive = FOLDER / f"{name}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(FOLDER), f"centrifuge-python=={version()}"]
        subprocess.run(command, check=True, timeout=START_DEADLINE)
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(FOLDER, filter="data")
    path = FOLDER / name / "tests/test_client.py"
    text = path.read_text()
    for old, new in [("localhost:8000", address), ('hmac_secret = "secret"', f"hmac_secret = {SECRET!r}")]:
        assert old in text, f"{path} of this version has no {old}"
        text = text.replace(old, new)
    path.write_text(text)
    return FOLDER / name


def name_of(test):
    return f"{type(test).__name__}.{test._testMethodName}"


def tests_of(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


def talks_to_a_server(test):
    source = inspect.getsource(type(test))
    return "get_token" in source and "FakeCentrifugoServer" not in source


class Result(unittest.TestResult):
    """Prints a line a test; a subtest that failed fails its test."""

    def __init__(self):
        super().__init__()
        self.passed, self.broken = 0, {}

    def addError(self, test, error):  # noqa: N802
        self.broken.setdefault(test, []).append(f"{error[0].__name__}: {error[1]}")

    addFailure = addError  # noqa: N815

    def addSubTest(self, test, subtest, error):  # noqa: N802
        if error:
            self.addError(test, (error[0], f"{subtest}: {error[1]}", None))

    def stopTest(self, test):  # noqa: N802
        super().stopTest(test)
        if test in self.broken:
            print(f"FAIL  {name_of(test)}: {'; '.join(self.broken[test])}", flush=True)
        else:
            self.passed += 1
            print(f"ok    {name_of(test)}", flush=True)


def late(*_):
    raise TimeoutError(f"not done within {TEST_SECONDS} s")


def main():
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} NATTER", file=sys.stderr)
        return 64
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Up(sys.argv[1]) as up:
        sys.path.insert(0, str(fetch(up.address())))
        module = importlib.import_module("tests.test_client")
        logging.disable()
        result = Result()
        signal.signal(signal.SIGALRM, late)
        every = list(tests_of(unittest.defaultTestLoader.loadTestsFromModule(module)))
        unheard = CANNOT_PASS.keys() - {name_of(test) for test in every}
        assert not unheard, f"this version has no {unheard}"
        for test in every:
            if name_of(test) in CANNOT_PASS or not talks_to_a_server(test):
                continue
            signal.alarm(TEST_SECONDS)
            test.run(result)
            signal.alarm(0)
    print(f"can't pass: {len(CANNOT_PASS)}")
    for name, reason in CANNOT_PASS.items():
        print(f"  {name}: {reason}")
    print(f"{result.passed} passed, {len(result.broken)} failed")
    return 1 if result.broken else 0


if __name__ == "__main__":
    sys.exit(main())
