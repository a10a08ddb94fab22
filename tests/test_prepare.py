"""Downloads, against servers of our own on this machine: whatever the network does, a file that has
its name is whole, what was fetched is not fetched again, it ends, and what goes wrong is one line.
No test leaves 127.0.0.1."""

import hashlib
import io
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import pytest

from data import prepare, run
from data.tasks import GROUPS, TRAINING_SETS

ROOT = Path(__file__).parent.parent
MANIFEST = Path(__file__).resolve().parents[2] / "shared/data/manifest.json"
BODY = random.Random(0).randbytes(300_000)
HALF = len(BODY) // 2


# The servers -------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        todo = server.script.pop(0) if server.script else server.always
        if callable(todo):
            return todo(self)
        if self.path in server.redirects:
            return self.reply(302, b"", Location=server.redirects[self.path])
        if self.path not in server.files:
            return self.reply(404, b"nothing here")
        self.serve(server.files[self.path], todo)

    def serve(self, body, todo):
        begin, status, headers = 0, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and todo not in ("no_ranges", "no_ranges_cut"):
            begin = int(asked[1])
            if begin >= len(body):
                return self.reply(416, b"", **{"Content-Range": f"bytes */{len(body)}"})
            status, headers = 206, {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
        rest = body[begin:]
        sent = (
            rest[: len(rest) // 2] if todo in ("cut", "no_ranges_cut", "reset", "stall") else rest
        )
        self.reply(status, sent, len(rest), **headers)
        if todo == "stall":
            self.wfile.flush()
            self.server.released.wait(10)
        if todo == "reset":  # linger 0: closing sends RST instead of FIN
            self.wfile.flush()
            time.sleep(0.05)  # else what was sent may be thrown away with the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


class Server(ThreadingHTTPServer):
    """files: path -> body; redirects: path -> address; script: what happens to the next requests,
    then `always`: "cut", "reset" and "stall" send half, "no_ranges" and "no_ranges_cut" ignore
    Range, a function does as it likes, None serves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects, self.script, self.always, self.requests = {}, {}, [], None, []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args):
        pass  # a client that goes away is part of the tests

    def ranges(self):
        return [headers.get("Range") for _, headers in self.requests]

    def paths(self):
        return [path for path, _ in self.requests]


def status(code, **headers):
    return lambda handler: handler.reply(code, b"<html>no</html>", **headers)


def make_servers():
    servers = []

    def make():
        servers.append(Server())
        return servers[-1]

    yield make
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


make_server = pytest.fixture(make_servers)


@pytest.fixture
def server(make_server):
    server = make_server()
    server.files["/file"] = BODY
    return server


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """No test sleeps; what would have been slept is here. No proxy, hub or token from outside."""
    pauses = []
    monkeypatch.setattr(prepare, "sleep", pauses.append)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return pauses


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def get(server, path, body=BODY, size=None, digest=None):
    size = len(body) if size is None else size
    prepare.download(prepare.File(f"{server.url}/file", path, size, digest or sha256(body)))


def part_of(path):
    return Path(f"{path}.part")


def fails(run, kind=ValueError):
    """The message of what it raises: one line that any terminal shows."""
    with pytest.raises(kind) as error:
        run()
    message = str(error.value)
    assert message.isprintable() and len(message) < 500
    return message


# One file ----------------------------------------------------------------------------------------


def test_a_file_arrives_with_one_request_and_leaves_no_part(server, tmp_path):
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.ranges() == [None] and os.listdir(tmp_path) == ["x"]
    assert server.requests[0][1]["User-Agent"].startswith("nano-moe")


def test_an_empty_file_arrives(server, tmp_path):
    server.files["/file"] = b""
    get(server, tmp_path / "x", b"")
    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_of_a_file_that_broke_off_only_the_rest_is_asked_for(server, tmp_path, pauses, how):
    server.script = [how]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.ranges() == [None, f"bytes={HALF}-"] and pauses == [1]


def test_a_part_of_an_earlier_run_is_continued_and_its_bytes_count_in_the_hash(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.ranges() == ["bytes=1000-"]


def test_a_part_that_is_complete_gets_its_name_without_a_request(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(BODY)
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and not server.requests


def test_a_server_that_knows_no_ranges_makes_it_start_over(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    server.always = "no_ranges"
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.ranges() == ["bytes=1000-"]


def test_a_server_that_knows_no_ranges_and_always_breaks_off_is_given_up(server, tmp_path, pauses):
    server.always = "no_ranges_cut"
    message = fails(lambda: get(server, tmp_path / "x"), ConnectionError)
    assert "ended after 150,000 of 300,000 bytes" in message
    assert len(server.requests) == 6 and pauses == [1, 2, 4, 8, 16]


def test_an_answer_for_another_range_is_not_appended(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    server.always = lambda h: h.reply(
        206, BODY[2000:], **{"Content-Range": f"bytes 2000-{len(BODY) - 1}/{len(BODY)}"}
    )
    assert "299,000 bytes, expected 300,000" in fails(lambda: get(server, tmp_path / "x"))
    assert part_of(tmp_path / "x").read_bytes() == BODY[:1000] and not (tmp_path / "x").exists()


def test_a_server_that_has_less_of_the_file_than_is_here_is_one_line(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(BODY[:-1])
    server.files["/file"] = BODY[:1000]
    assert "the server answers 416" in fails(lambda: get(server, tmp_path / "x"))
    assert part_of(tmp_path / "x").read_bytes() == BODY[:-1]


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again_after_growing_pauses(server, tmp_path, pauses, code):
    server.script = [status(code), status(code)]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and len(server.requests) == 3 and pauses == [1, 2]


def test_a_server_in_trouble_for_ever_is_given_up_and_the_part_kept(server, tmp_path, pauses):
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    server.always = status(500)
    message = fails(lambda: get(server, tmp_path / "x"), ConnectionError)
    assert (
        "500" in message and "the same command continues" in message and pauses == [1, 2, 4, 8, 16]
    )
    assert part_of(tmp_path / "x").read_bytes() == BODY[:1000] and not (tmp_path / "x").exists()


def test_each_attempt_goes_on_where_the_one_before_broke_off_and_there_are_six(
    server, tmp_path, pauses
):
    server.always = "cut"  # each brings half of the rest: 150,000, 75,000 ...
    fails(lambda: get(server, tmp_path / "x"), ConnectionError)
    sizes = [HALF, HALF + HALF // 2]
    assert server.ranges()[:3] == [None, *[f"bytes={size}-" for size in sizes]]
    assert len(server.requests) == 6 and pauses == [1, 2, 4, 8, 16]
    server.always = None
    get(server, tmp_path / "x")  # the same command once more
    assert (tmp_path / "x").read_bytes() == BODY and len(server.requests) == 7


def test_without_a_network_it_says_so_and_keeps_the_part(tmp_path, pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    file = facts(tmp_path / "x", url=url)
    message = fails(lambda: prepare.download(file), ConnectionError)
    assert (
        "the connection failed" in message
        and "refused" in message
        and "the same command continues" in message
    )
    assert len(pauses) == 5 and part_of(tmp_path / "x").read_bytes() == BODY[:1000]


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_the_timeout(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "TIMEOUT", 0.2)
    server.script = ["stall"]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "code, told", [(404, "is the name right"), (410, "is the name right"), (403, "a login")]
)
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, pauses, code, told):
    server.always = status(code)
    message = fails(lambda: get(server, tmp_path / "x"))
    assert message.startswith(f"{server.url}/file: the server answers {code}; ") and told in message
    assert not pauses and not os.listdir(tmp_path)


def test_a_page_of_another_size_is_refused_before_it_replaces_what_is_here(
    server, tmp_path, pauses
):
    part_of(tmp_path / "x").write_bytes(BODY[:1000])
    server.always = status(200)
    message = fails(lambda: get(server, tmp_path / "x"))
    assert "15 bytes, expected 300,000" in message and not pauses
    assert part_of(tmp_path / "x").read_bytes() == BODY[:1000]


def test_more_bytes_than_expected_without_an_announced_length_are_refused(server, tmp_path):
    def endless(handler):
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while not server.released.is_set():
            handler.wfile.write(BODY)

    server.always = endless
    assert "hash" in fails(lambda: get(server, tmp_path / "x"))
    assert not os.listdir(tmp_path)


def test_wrong_bytes_never_get_the_name_and_are_not_kept(server, tmp_path):
    server.files["/file"] = BODY[:-1] + b"?"
    message = fails(lambda: get(server, tmp_path / "x"))
    assert "hash" in message and len(server.requests) == 1 and not os.listdir(tmp_path)


def test_a_part_with_wrong_bytes_is_dropped_and_the_same_command_brings_the_file(server, tmp_path):
    part_of(tmp_path / "x").write_bytes(b"?" + BODY[1:1000])
    assert "try again" in fails(lambda: get(server, tmp_path / "x"))
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.ranges() == ["bytes=1000-", None]


def test_small_files_of_the_hub_are_checked_with_gits_hash_of_a_blob(server, tmp_path):
    digest = (
        subprocess.run(["git", "hash-object", "--stdin"], input=BODY, capture_output=True)
        .stdout.decode()
        .strip()
    )
    get(server, tmp_path / "x", digest=digest)
    assert (tmp_path / "x").read_bytes() == BODY
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    assert "hash" in fails(lambda: get(server, tmp_path / "y", digest=wrong))


def test_progress_is_shown_now_and_then(server, tmp_path, capsys, monkeypatch):
    get(server, tmp_path / "x")
    printed = capsys.readouterr()
    assert not printed.out and not printed.err  # done within two seconds: nothing to tell
    monkeypatch.setattr(prepare, "SHOW_EVERY", 0)
    get(server, tmp_path / "y")
    printed = capsys.readouterr()
    shown = re.findall(r"y: +\d+%.*?([\d.]+k?)/300k \[", printed.out)
    assert len(shown) > 1 and shown[-1] == "300k" and not printed.err


# Servers without an end --------------------------------------------------------------------------


def endless(head, piece, pause=0.0):
    """Sends `head` and then `piece` again and again; `handler.server.sent` counts the bytes."""

    def serve(handler):
        handler.close_connection = True
        handler.server.sent = 0
        handler.wfile.write(head)
        while not handler.server.released.wait(pause):
            handler.wfile.write(piece)
            handler.server.sent += len(piece)

    return serve


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
UNTOLD = OK + b"\r\n"  # no length is announced
LONG = {
    "body": (UNTOLD, b"[" * 10_000),
    "chunks": (CHUNKED, b"2710\r\n" + b"[" * 10_000 + b"\r\n"),
}


def test_a_byte_at_a_time_is_a_broken_connection(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.2)
    monkeypatch.setattr(prepare, "PAUSES", [1])
    server.always = endless(UNTOLD, b"[", pause=0.02)
    begin = time.monotonic()
    message = fails(lambda: get(server, tmp_path / "x"), ConnectionError)
    assert "too slow for 0.2 seconds" in message and len(server.requests) == 2
    assert time.monotonic() - begin < 5


def test_what_a_slow_connection_brought_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.2)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + BODY[:1000]
    server.script = [endless(head, BODY[1000:1001], pause=1)]
    get(server, tmp_path / "x")
    first, second = server.ranges()
    assert (tmp_path / "x").read_bytes() == BODY and first is None and second == "bytes=1001-"


def test_pauses_in_a_download_that_is_fast_between_them_are_borne(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.5)

    def halting(handler):
        handler.reply(200, b"", len(BODY))
        for begin in range(0, len(BODY), 50_000):
            handler.wfile.write(BODY[begin : begin + 50_000])
            time.sleep(0.2)

    server.script = [halting]
    get(server, tmp_path / "x")
    assert len(server.requests) == 1


@pytest.mark.parametrize("head, piece", LONG.values(), ids=LONG)
def test_an_answer_without_an_end_is_one_line(server, tmp_path, monkeypatch, head, piece):
    server.always = endless(head, piece)
    message = fails(lambda: get(server, tmp_path / "x"))
    assert "hash" in message


@pytest.mark.parametrize("head, piece", LONG.values(), ids=LONG)
def test_a_list_of_files_without_an_end_is_one_line(hub, tmp_path, capsys, head, piece):
    hub.server.always = endless(head, piece)
    assert command("owner/tiny", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {hub.server.url}{TREE}: ") and "not a list" in error
    assert error.count("\n") == 1 and hub.server.sent < 100_000_000


def test_a_list_of_files_a_byte_at_a_time_is_one_line(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.3)
    hub.server.always = endless(UNTOLD, b"[", pause=0.02)
    begin = time.monotonic()
    assert command("owner/tiny", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {hub.server.url}{TREE}: ") and "too slow" in error
    assert error.count("\n") == 1 and time.monotonic() - begin < 5


# Redirects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ftp", "file", "data", "gopher"])
def test_a_redirect_to_what_is_not_the_web_is_refused(server, tmp_path, pauses, scheme):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.05)
        server.redirects["/file"] = f"{scheme}://127.0.0.1:{other.getsockname()[1]}/etc/passwd"
        assert fails(lambda: get(server, tmp_path / "x")).startswith(f"{server.url}/file: ")
        with pytest.raises(TimeoutError):
            other.accept()
    assert len(server.requests) == 1 and not pauses and not os.listdir(tmp_path)


@pytest.mark.parametrize("there", ["http://[", "http:///x", "//", "http://a:b/", "http://x\x7f/"])
def test_a_redirect_to_no_address_is_one_line(server, tmp_path, there):
    server.redirects["/file"] = there
    kinds = (ValueError, ConnectionError)
    assert fails(lambda: get(server, tmp_path / "x"), kinds).startswith(f"{server.url}/file: ")


def test_redirects_in_a_circle_end_with_one_line(server, tmp_path):
    server.redirects = {"/file": "/a", "/a": "/b", "/b": "/file"}
    assert "302" in fails(lambda: get(server, tmp_path / "x")) and len(server.requests) < 20


def redirected(here, there, token="Bearer t"):
    """The request that follows one with a token from `here` to `there`."""
    request = Request(here)
    request.add_unredirected_header("Authorization", token)
    answer = io.BytesIO(b"")
    return prepare.Redirects().redirect_request(request, answer, 302, "Found", {}, there)


def test_a_redirect_never_leaves_https_and_a_token_never_its_host():
    with pytest.raises(ValueError, match="redirects to http, which is refused: http://h/x"):
        redirected("https://h/file", "http://h/x")
    for here, there, follows in [
        ("https://h/file", "https://h/x", True),
        ("http://h/file", "http://h/x", True),
        ("https://h/file", "https://h:444/x", False),
        ("https://h/file", "https://h@other/x", False),
        ("https://h/file", "https://h.other/x", False),
        ("http://h/file", "https://h/x", False),
        ("http://h/file", "http://other/x", False),
    ]:
        sent = redirected(here, there).get_header("Authorization")
        assert sent == ("Bearer t" if follows else None), (here, there)


def test_the_page_that_comes_with_a_redirect_is_not_read(server, tmp_path):
    server.files["/there"] = BODY
    head = b"HTTP/1.1 302 Found\r\nLocation: /there\r\n\r\n"
    server.script = [endless(head, b"x" * 10_000)]
    get(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and server.sent < 100_000_000


# What is already there ---------------------------------------------------------------------------


def facts(path, body=BODY, url="http://127.0.0.1:9/x"):
    return prepare.File(url, path, len(body), sha256(body))


def test_a_file_that_is_there_is_not_asked_for(tmp_path, capsys, server):
    (tmp_path / "x").write_bytes(BODY)
    prepare.get_all([facts(tmp_path / "x", url=f"{server.url}/file")])
    assert "already there" in capsys.readouterr().out and not server.requests


def test_another_file_of_that_name_is_refused_and_left_as_it_is(server, tmp_path):
    (tmp_path / "x").write_bytes(BODY[:-1])
    message = fails(lambda: prepare.get_all([facts(tmp_path / "x", url=f"{server.url}/file")]))
    assert "299,999 bytes, expected 300,000" in message and "move it away" in message
    assert (
        (tmp_path / "x").read_bytes() == BODY[:-1]
        and os.listdir(tmp_path) == ["x"]
        and not server.requests
    )


def test_a_file_that_is_there_is_known_by_its_size(tmp_path):
    (tmp_path / "x").write_bytes(BODY[::-1])
    prepare.get_all([facts(tmp_path / "x")])
    assert (tmp_path / "x").read_bytes() == BODY[::-1]


def test_a_download_larger_than_the_disk_is_refused_before_it_begins(server, tmp_path):
    file = facts(tmp_path / "x", url=f"{server.url}/file")._replace(size=10**18)
    message = fails(lambda: prepare.get_all([file]), OSError)
    assert (
        "1000000000.0 GB are needed" in message and "GB are free" in message and "--out" in message
    )
    assert not server.requests


# The data ----------------------------------------------------------------------------------------


def rows(*instructions):
    return json.dumps(
        [{"instruction": text, "input": "", "output": "", "answer": "1"} for text in instructions]
    ).encode()


@pytest.fixture
def arithmetic(server, monkeypatch):
    """A small math_50k and its test sets on the server. Of MultiArith's questions two stand in the
    training file."""
    server.files = {
        "/ft-training_set/math_50k.json": rows(
            *[f"How many  are {i}\nand {i}? " for i in range(10)]
        )
    }
    for test in GROUPS["math"]:
        server.files[f"/dataset/{test}/test.json"] = rows(
            f"{test}?", f"What does {test} ask?", "How many are 12 and 12?"
        )
    server.files["/dataset/MultiArith/test.json"] = rows(
        " How many are 3 and 3?", "How many are 4 and 4?", "How many?"
    )
    names = {path: path.split("/")[2] if "test" in path else "math_50k" for path in server.files}
    names["/ft-training_set/math_50k.json"] = "math_50k"
    for path, body in server.files.items():
        monkeypatch.setitem(prepare.FACTS, names[path], (len(body), sha256(body)))
    return server


def command(*argv):
    """The exit code of a command line."""
    try:
        prepare.main([str(arg) for arg in argv])
    except SystemExit as exit:
        if isinstance(exit.code, str):  # Python prints it and exits with 1
            print(exit.code, file=sys.stderr)
            return 1
        return exit.code or 0
    return 0


def test_the_command_brings_training_file_and_test_sets_and_counts_the_overlap(
    arithmetic, tmp_path, capsys
):
    assert command("math", "--out", tmp_path, "--source", arithmetic.url) == 0
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"math_50k.json", *[f"test/{name}.json" for name in GROUPS["math"]]}
    assert (tmp_path / "test/SVAMP.json").read_bytes() == arithmetic.files[
        "/dataset/SVAMP/test.json"
    ]
    out = capsys.readouterr().out
    assert "overlap: MultiArith 2 of 3 questions stand in math_50k.json too" in out
    assert out.count(" 0 of 3 questions") == 5 and out.count(": complete, ") == 7
    assert (
        f"--base {tmp_path}/OLMoE-1B-7B-0924 --dtype bfloat16 --data math --recipe perft_paper"
        in out
    )
    arithmetic.requests.clear()
    assert command("math", "--out", tmp_path, "--source", f"{arithmetic.url}/") == 0
    assert not arithmetic.requests and "2 of 3" in capsys.readouterr().out


def test_a_failure_is_one_line_and_exit_code_1(arithmetic, tmp_path, capsys):
    arithmetic.files.pop("/dataset/AQuA/test.json")
    assert command("math", "--out", tmp_path, "--source", arithmetic.url) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {arithmetic.url}/dataset/AQuA/test.json: the server answers 404; "
    )
    assert error.count("\n") == 1 and (tmp_path / "math_50k.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line(arithmetic, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command("math", "--out", tmp_path / "file/below", "--source", arithmetic.url) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tmp_path}/file")
        and "may it be written" in error
        and error.count("\n") == 1
    )


def test_sizes_and_hashes_are_those_of_the_manifest():
    if not MANIFEST.exists():
        pytest.skip("the manifest of the data is not beside this checkout")
    told = {}
    for path, file in json.loads(MANIFEST.read_text())["files"].items():
        name = path.split("/")[1].removesuffix(".json")
        assert path == (
            f"dataset/{name}/test.json" if "rows" in file else f"ft-training_set/{name}.json"
        )
        told[name] = (file["bytes"], file["sha256"])
    assert prepare.FACTS == told


def test_every_data_set_has_its_facts_and_the_test_questions_are_not_offered_for_training():
    for name, train in TRAINING_SETS.items():
        group = "commonsense" if name == "commonsense" else "math"
        assert prepare.FACTS.keys() >= {train, *GROUPS[group]}
    assert [len(GROUPS[group]) for group in ("commonsense", "math")] == [8, 6]
    assert "math_data" not in prepare.FACTS and "math_data" not in TRAINING_SETS.values()


# Models ------------------------------------------------------------------------------------------


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *SHARDS,
]
TREE = "/api/models/owner/tiny/tree/main"


class Hub:
    """A hub with one model; `storage` is the host to which it redirects large files."""

    def __init__(self, server, storage):
        self.server, self.storage, self.files = server, storage, {}
        draw = random.Random(1)
        for name in [
            *NEEDED,
            "README.md",
            "LICENSE",
            "pytorch_model.bin",
            "old.safetensors",
            "consolidated.pt",
        ]:
            self.put(name, draw.randbytes(draw.randrange(100, 2000)))
        self.put_index({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]})

    def put(self, name, body):
        self.files[name] = body
        where = f"/owner/tiny/resolve/main/{name}"
        if name.endswith((".safetensors", "tokenizer.json")):
            self.server.redirects[where] = f"{self.storage.url}/blob/{name}?signature=1"
            self.storage.files[f"/blob/{name}?signature=1"] = body
        elif name == "config.json":  # the hub redirects small files to itself
            self.server.redirects[where] = f"/api/cache/{name}"
            self.server.files[f"/api/cache/{name}"] = body
        else:
            self.server.files[where] = body
        self.list()

    def put_index(self, weight_map):
        self.put("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())

    def list(self, change=lambda entries: entries):
        entries = [{"type": "directory", "path": "original", "oid": "0" * 40, "size": 0}]
        for name, body in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            entry = {"type": "file", "path": name, "size": len(body), "oid": blob}
            if name.endswith((".safetensors", "tokenizer.json", ".bin", ".pt")):
                entry |= {
                    "oid": "1" * 40,
                    "lfs": {"oid": sha256(body), "size": len(body), "pointerSize": 134},
                }
            entries.append(entry)
        self.server.files[TREE] = json.dumps(change(entries)).encode()


@pytest.fixture
def hub(make_server, monkeypatch):
    hub = Hub(make_server(), make_server())
    monkeypatch.setenv("HF_ENDPOINT", hub.server.url)
    return hub


def test_a_model_comes_complete_and_without_what_is_not_needed(hub, tmp_path, capsys):
    assert command("owner/tiny", "--out", tmp_path) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "tiny").iterdir()} == {
        n: hub.files[n] for n in NEEDED
    }
    assert (
        len(hub.server.requests) + len(hub.storage.requests) == 1 + len(NEEDED) + 4
    )  # the list, files, redirects
    assert f"eval.py --base {tmp_path}/tiny" in capsys.readouterr().out
    hub.server.requests.clear(), hub.storage.requests.clear()
    assert command("owner/tiny", "--out", tmp_path) == 0
    assert hub.server.paths() == [TREE] and not hub.storage.requests


def test_a_model_that_broke_off_has_no_config_and_the_loader_says_so_until_it_is_continued(
    hub, tmp_path, capsys
):
    hub.storage.script = [
        None,
        None,
        "cut",
        *[status(500)] * 5,
    ]  # the tokenizer, a shard, half a shard
    assert command("owner/tiny", "--out", tmp_path) == 1
    assert "the same command continues" in capsys.readouterr().err
    config = tmp_path / "tiny/config.json"
    assert "is it complete" in fails(lambda: run.read_json(config), FileNotFoundError)
    half = part_of(tmp_path / "tiny" / SHARDS[1]).stat().st_size
    hub.storage.requests.clear()
    assert half > 0 and command("owner/tiny", "--out", tmp_path) == 0
    assert hub.storage.ranges() == [f"bytes={half}-"]
    assert {p.name for p in (tmp_path / "tiny").iterdir()} == set(NEEDED)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.storage.script = ["cut"]  # a continued request is none the laxer
    assert command("owner/tiny", "--out", tmp_path) == 0
    assert all(
        headers.get("Authorization") == "Bearer hf_secret" for _, headers in hub.server.requests
    )
    assert "/api/cache/config.json" in hub.server.paths() and len(hub.storage.requests) == 4
    assert "hf_secret" not in str(hub.storage.requests)


@pytest.mark.parametrize("token", ["hf_se\ncret", "hf_se cret", "hf_se\x7fcret", "hf_se\u00e9cret"])
def test_a_token_with_a_character_that_none_has_is_not_printed(
    hub, tmp_path, capsys, monkeypatch, token
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert command("owner/tiny", "--out", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: HF_TOKEN: ") and printed.err.count("\n") == 1
    assert "hf_se" not in printed.err and "cret" not in printed.err and not printed.out
    assert not hub.server.requests


def test_without_a_token_none_is_sent(hub, tmp_path):
    assert command("owner/tiny", "--out", tmp_path) == 0
    assert "Authorization" not in str(hub.server.requests)


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("listed", [True, False], ids=["files", "list"])
def test_a_gated_model_is_one_line_with_the_page_and_the_remedy(
    hub, tmp_path, capsys, pauses, code, listed
):
    hub.server.script = [None] * listed
    hub.server.always = status(code)
    assert command("owner/tiny", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"the server answers {code}" in error and not pauses
    assert hub.server.url in error and "gated" in error and "HF_TOKEN" in error


def test_a_model_that_is_not_there_is_one_line_with_its_address(hub, tmp_path, capsys):
    assert command("owner/other", "--out", tmp_path) == 1
    assert (
        f"{hub.server.url}/api/models/owner/other/tree/main: the server answers 404; "
        in capsys.readouterr().err
    )


STRANGE_NAMES = [
    "../model.safetensors",
    "a/model.safetensors",
    "/etc/tokenizer.json",
    "tokenizer.json/../../x",
]


def test_no_name_in_the_hubs_list_leads_out_of_the_models_folder(hub, tmp_path):
    for name in [
        *STRANGE_NAMES,
        "..",
        ".",
        "",
        "model-1-of-1.safetensors\n",
        "config.json/x",
        "a.py",
    ]:
        hub.put(name, b"evil")
    assert command("owner/tiny", "--out", tmp_path / "out") == 0
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in found} == {tmp_path / "out/tiny"}
    assert {path.name for path in found} == set(NEEDED)


BROKEN_LISTS = {
    "no list": lambda entries: {"error": "?"},
    "no objects": lambda entries: ["a"],
    "no sizes": lambda entries: [{k: v for k, v in e.items() if k != "size"} for e in entries],
    "size below 0": lambda entries: [e | {"size": -1} for e in entries],
    "size a text": lambda entries: [e | {"size": "1"} for e in entries],
    "hash no hash": lambda entries: [e | {"oid": "../x"} for e in entries],
    "size of 400 digits": lambda entries: [e | {"size": 10**400} for e in entries],
    "size infinite": lambda entries: [e | {"size": math.inf} for e in entries],
    "name a number": lambda entries: [e | {"path": 5} for e in entries],
    "name a list": lambda entries: [e | {"path": []} for e in entries],
    "hash a number": lambda entries: [e | {"oid": 5} for e in entries],
    "lfs a text": lambda entries: [e | {"lfs": "x"} for e in entries],
}


@pytest.mark.parametrize("change", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_an_answer_that_is_no_list_of_files_is_one_line(hub, tmp_path, capsys, change):
    hub.list(change)
    assert command("owner/tiny", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert (
        "not a list of files" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
    )


def test_a_model_without_safetensors_is_refused(hub, tmp_path, capsys):
    hub.list(lambda entries: [e for e in entries if not e["path"].startswith("model")])
    assert command("owner/tiny", "--out", tmp_path) == 1
    assert "no config.json with safetensors weights" in capsys.readouterr().err


def test_a_shard_larger_than_the_disk_is_refused_before_any_weight_comes(hub, tmp_path, capsys):
    hub.list(
        lambda entries: [e | {"size": 10**18} if e["path"] == SHARDS[1] else e for e in entries]
    )
    assert command("owner/tiny", "--out", tmp_path) == 1
    assert "GB are free" in capsys.readouterr().err and not hub.storage.requests


def test_the_short_names_are_the_models_of_the_papers(hub, tmp_path, capsys):
    repos = {
        "olmoe": "allenai/OLMoE-1B-7B-0924",
        "olmoe_0125": "allenai/OLMoE-1B-7B-0125",
        "mixtral": "mistralai/Mixtral-8x7B-v0.1",
        "qwen3": "Qwen/Qwen3-30B-A3B",
    }
    for name, repo in repos.items():
        assert command(name, "--out", tmp_path) == 1
        assert f"/api/models/{repo}/tree/main" in capsys.readouterr().err


NO_ADDRESSES = [
    "hub.example",
    "",
    "http://[",
    "file:///etc",
    "ftp://127.0.0.1",
    "http://a b",
    "é\n",
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_a_hub_or_a_source_that_is_no_address_is_one_line(
    address, tmp_path, capsys, monkeypatch, pauses
):
    monkeypatch.setenv("HF_ENDPOINT", address)
    for words in (["owner/tiny"], ["math", "--source", address]):
        assert command(*words, "--out", tmp_path) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "is the address right?" in error, error
        assert "HF_ENDPOINT" in error and "--source" in error
        assert error.count("\n") == 1 and error[:-1].isprintable() and not pauses


# The command -------------------------------------------------------------------------------------


SENSELESS = [
    "",
    "comonsense",
    "owner/",
    "../x",
    "a/..",
    "a/b/c",
    "math --out",
    "math olmoe",
]


@pytest.mark.parametrize("line", SENSELESS)
def test_a_command_that_makes_no_sense_is_one_line_and_exit_code_2(line, capsys):
    assert command(*line.split()) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("prepare.py: error: ")
        and error.endswith("see --help\n")
        and error.count("\n") == 1
    )


def script(*argv, **options):
    return subprocess.Popen(
        [sys.executable, ROOT / "data/prepare.py", *argv],
        cwd=ROOT,
        env={**os.environ, "no_proxy": "*"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_it_runs_as_a_script_and_tells_what_it_does():
    process = script("--help")
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "commonsense" in out and "data/downloads" in out
    process = script("comonsense")
    assert '"comonsense" is none of commonsense, math' in process.communicate(timeout=20)[1]
    assert process.returncode == 2


def test_it_does_not_load_torch():
    code = (
        "import sys; sys.path.insert(0, '.'); import data.prepare; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_keeps_what_has_come_and_says_so(server, tmp_path, number, code):
    sent = b"[" * 5000

    def stall(handler):
        handler.reply(200, sent, prepare.FACTS["math_50k"][0])
        server.released.wait(10)

    server.always = stall
    heard = partial(signal.signal, number, signal.SIG_DFL)  # in the background SIGINT is ignored
    process = script("math", "--out", tmp_path, "--source", server.url, preexec_fn=heard)
    part, deadline = tmp_path / "math_50k.json.part", time.monotonic() + 10
    while time.monotonic() < deadline and not part.exists():
        time.sleep(0.01)
    time.sleep(0.1)  # for the bytes to arrive
    process.send_signal(number)
    out, error = process.communicate(timeout=10)
    assert process.returncode == code and error.count("\n") == 1
    assert error.startswith("stopped: ") and "the same command continues" in error
    assert part.read_bytes() == sent and not (tmp_path / "math_50k.json").exists() and not out


def test_a_disk_that_takes_no_more_is_one_line_and_not_tried_again(server, tmp_path):
    resource = pytest.importorskip("resource")
    server.always = lambda handler: handler.reply(200, BODY * 10, prepare.FACTS["math_50k"][0])
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = script("math", "--out", tmp_path, "--source", server.url, preexec_fn=full)
    _, error = process.communicate(timeout=10)
    assert (
        process.returncode == 1
        and error.startswith(f"error: {tmp_path}: ")
        and "is there room" in error
    )
    assert error.count("\n") == 1 and len(server.requests) == 1
    assert part_of(tmp_path / "math_50k.json").read_bytes() == BODY[:100_000]
