"""Programs run by a Sandbox Fusion service: verl's own client against a server that speaks its protocol."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rredcot_verl.rewards.code import SandboxError, run_program_sync
from rredcot_verl.rewards.code_tests import CodeTests


class _Service(BaseHTTPRequestHandler):
    """Runs what it is sent, as the service does: a script in a file, its input by a pipe."""

    requests: list[dict] = []
    broken = False

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        if self.broken:
            self.send_error(500)
            return
        answer = json.dumps(self._run(request)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(answer)

    def _run(self, request: dict) -> dict:
        script = self.server.folder / f"script{len(self.requests)}_{threading.get_ident()}.py"
        script.write_text(request["code"])
        run = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": "", "execution_time": 0.0}
        try:
            done = subprocess.run(
                [sys.executable, script],
                input=request["stdin"],
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
            )
            run |= {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except subprocess.TimeoutExpired:
            run["status"] = "TimeLimitExceeded"
        good = run["status"] == "Finished" and run["return_code"] == 0
        return {"status": "Success" if good else "Failed", "compile_result": None, "run_result": run}

    def log_message(self, *_):
        pass


@pytest.fixture
def service(tmp_path, monkeypatch):
    # A service's Python has buffers, whatever the tests run with.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    _Service.requests, _Service.broken = [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    server.folder = tmp_path
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/run_code"
    server.shutdown()
    server.server_close()
    thread.join()


SUMS = CodeTests("stdin", inputs=("1 2\n", "1 1\n"), outputs=("3.0 \n", "5\n"))
DOUBLES = CodeTests("call", entry_point="f", setup="two = 2", tests=("assert f(1) == two", "assert f(3) == 6"))


def test_stdin_tests(service):
    verdict = run_program_sync("print(sum(map(int, input().split())))", SUMS, sandbox_fusion_url=service)
    # Compared here, by the rule of the local sandbox: the tolerance is not the service's.
    assert verdict.passed == (True, False)
    assert "expected '5'" in verdict.detail


def test_call_tests(service):
    assert run_program_sync("def f(x):\n    return 2 * x", DOUBLES, sandbox_fusion_url=service).num_passed == 2
    verdict = run_program_sync("def f(x):\n    return 2", DOUBLES, sandbox_fusion_url=service)
    assert verdict.passed == (True, False)
    assert "AssertionError" in verdict.detail


def test_tolerance_prelude_and_the_programs_own_names_hold_there_too(service):
    options = {"sandbox_fusion_url": service, "float_tolerance": 1e-6, "prelude": "third = 1 / 3"}
    program = "from __future__ import annotations\ndef sum(x):\n    return x * third + 1e-9"
    tests = CodeTests("call", entry_point="sum", tests=("assert sum(1.0) == 0.333333333",))
    assert run_program_sync(program, tests, **options).detail == ""
    assert run_program_sync("pass", tests, **options).num_passed == 0
    stdin = CodeTests("stdin", inputs=("",), outputs=("0.333333333",))
    assert run_program_sync(f"{program}\nprint(sum(1))", stdin, **options).detail == ""


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "class Liar(int):\n    __eq__ = lambda *a: True\ndef f(x): return Liar(0)",
        "import os\nfor n in range(16):\n    try: os.write(n, b'passed')\n    except OSError: pass\ndef f(x): return 0",
        # The script that holds both sides, and the word that stands for "passed", are not where they can be found.
        "import glob, os, re\ndef f(x):\n"
        "    for path in glob.glob('/proc/*/fd/*') + glob.glob('/proc/*/cmdline'):\n"
        "        try: text = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), errors='replace').read(10**6)\n"
        "        except OSError: continue\n"
        "        found = re.search(r'f\\(%d\\) == (\\d+)' % x, text)\n"
        "        if found: return int(found.group(1))\n",
    ],
)
def test_programs_that_forge_pass_nothing_there_either(service, program):
    tests = CodeTests("call", entry_point="f", tests=("assert f(11) == 22",))
    assert run_program_sync(program, tests, sandbox_fusion_url=service, time_limit_s=20.0).num_passed == 0


def test_timeouts_and_limits_are_passed_on(service):
    tests = CodeTests("stdin", inputs=("",), outputs=("",))
    options = {"sandbox_fusion_url": service, "sandbox_fusion_timeout_s": 1.0, "sandbox_fusion_memory_limit_mb": 300}
    verdict = run_program_sync("while True: pass", tests, **options)
    assert verdict.timed_out and verdict.num_passed == 0
    (request,) = _Service.requests
    assert (request["run_timeout"], request["memory_limit_MB"]) == (1, 300)


def test_a_failing_service_is_no_wrong_program(service):
    _Service.broken = True
    with pytest.raises(SandboxError, match="api_error"):
        run_program_sync("print(3)", SUMS, sandbox_fusion_url=service)
