"""Known weights: one table that a user's file extends, fetched once, whole or not at all, and checked ever after."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub.constants
import pytest
from loopback import Served, serving

from loopback_http import HubAnswers, answering
from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, fetching_forbidden, no_fetching
from tinyfusion.core.weights import cache_folder, fetch_weights, known_weights, user_table

CONTENT = bytes(range(256)) * 3000
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a cache of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[Served]:
    with serving(CONTENT) as served:
        yield served


def table(text: str) -> None:
    user_table().parent.mkdir(parents=True, exist_ok=True)
    user_table().write_text(text, encoding="utf-8")


def entry(server: Served, **fields: str) -> None:
    table(f'[mine]\naddress = "{server.address}"\n' + "".join(f'{key} = "{value}"\n' for key, value in fields.items()))


def left() -> list[str]:
    folder = cache_folder() / "mine"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_the_shipped_table() -> None:
    known = known_weights()
    assert {"dit-xl-2-256", "dit-xl-2-512", "tinydit-d14"} <= {n for n, e in known.items() if e.kind == "model"}
    assert all(entry.license and entry.about for entry in known.values())
    assert known["dit-xl-2-256"].file_name == "DiT-XL-2-256x256.pt"
    assert (known["sit-xl-2-256"].file_name, known["sit-xl-2-256"].family) == ("SiT-XL-2-256.pt", "sit")
    assert known["inception-2015-12-05"].sha256 == "6726825d"


@pytest.mark.parametrize("says_length", [True, False])
def test_what_would_be_fetched_is_said_where_nothing_is_to_be(server: Served, says_length: bool) -> None:
    entry(server)
    server.says_length = says_length
    with no_fetching():
        assert fetching_forbidden()
        with pytest.raises(WouldFetch, match=f"would fetch mine from {server.address}") as refused:
            fetch_weights("mine")
    assert refused.value.num_bytes == (len(CONTENT) if says_length else None)
    assert server.requests == ["HEAD"] and left() == [] and not fetching_forbidden()
    path = fetch_weights("mine")
    with no_fetching():
        assert fetch_weights("mine") == path  # what is there may be used


def test_a_size_that_nobody_says_is_unknown() -> None:
    table('[mine]\naddress = "http://127.0.0.1:9/weights.pt"\n')
    with no_fetching(), pytest.raises(WouldFetch, match="of unknown size"):
        fetch_weights("mine")


def test_fetched_once_recorded_and_checked(server: Served) -> None:
    entry(server)
    path = fetch_weights("mine")
    assert path.read_bytes() == CONTENT and path.name == "weights one.pt"
    assert path.with_name("weights one.pt.sha256").read_text() == f"{SUM}  weights one.pt\n"
    assert left() == ["weights one.pt", "weights one.pt.sha256"]
    assert fetch_weights("mine") == path and server.requests == [None]
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(UserError, match=f"is damaged: .*sha256 says {SUM}"):
        fetch_weights("mine")
    path.unlink()
    server.content = CONTENT[::-1]  # another file at the same address
    with pytest.raises(UserError, match=f"gave a file .*sha256 says {SUM}"):
        fetch_weights("mine")


@pytest.mark.parametrize("digits", [8, 64])
def test_a_known_sum(server: Served, digits: int) -> None:
    entry(server, sha256=SUM[:digits])
    assert fetch_weights("mine").read_bytes() == CONTENT


def test_a_wrong_sum_leaves_nothing(server: Served) -> None:
    entry(server, sha256="0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {SUM}, and the table says {'0' * 64}"):
        fetch_weights("mine")
    assert not [name for name in left() if name.endswith((".pt", ".partial"))]


def test_a_cut_connection_is_taken_up(server: Served) -> None:
    entry(server, sha256=SUM)
    server.breaks = [100_000, 1, 250_000]
    assert fetch_weights("mine").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=100001-", "bytes=350001-"]


def test_another_call_goes_on(server: Served) -> None:
    entry(server, sha256=SUM)
    server.breaks = [100_000] + [0] * 20
    with pytest.raises(UserError, match=r"the connection broke after 0\.1 MiB, which are retained"):
        fetch_weights("mine")
    assert any(name.endswith(".partial") for name in left())
    server.breaks, server.requests = [], []
    assert fetch_weights("mine").read_bytes() == CONTENT
    assert server.requests == ["bytes=100000-"]
    assert left() == ["weights one.pt", "weights one.pt.sha256"]


def test_several_processes_fetch_once(server: Served) -> None:
    """As a launcher starts them: one fetches, the others wait for it."""
    entry(server, sha256=SUM)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch_weights, ["mine"] * 4))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT and server.requests == [None]
    assert left() == ["weights one.pt", "weights one.pt.sha256"]


def test_a_server_without_ranges_begins_anew(server: Served) -> None:
    entry(server, sha256=SUM)
    server.ranges, server.breaks = False, [500_000, 600_000]
    assert fetch_weights("mine").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_not_glued(server: Served) -> None:
    entry(server)
    server.breaks = [100_000] + [0] * 20
    with pytest.raises(UserError, match="retained"):
        fetch_weights("mine")
    server.content, server.tag, server.breaks = CONTENT[::-1], '"two"', []
    assert fetch_weights("mine").read_bytes() == CONTENT[::-1]


def test_a_shorter_file_meanwhile(server: Served) -> None:
    """Same version, said to be shorter than what is here: begun anew."""
    entry(server)
    server.breaks = [100_000] + [0] * 20
    with pytest.raises(UserError, match="retained"):
        fetch_weights("mine")
    server.content, server.breaks = CONTENT[:1000], []
    assert fetch_weights("mine").read_bytes() == CONTENT[:1000]


def test_no_length_and_no_tag(server: Served) -> None:
    entry(server)
    server.says_length, server.tag = False, None
    assert fetch_weights("mine").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_answer_that_is_none(server: Served, status: int) -> None:
    entry(server)
    server.status = status
    with pytest.raises(UserError, match=f"weights%20one.pt answers {status}"):
        fetch_weights("mine")


def test_nobody_there(server: Served) -> None:
    table('[mine]\naddress = "http://127.0.0.1:9/weights.pt"\n')
    with pytest.raises(UserError, match="cannot fetch mine from http://127.0.0.1:9/weights.pt"):
        fetch_weights("mine")


def test_the_users_table_wins(server: Served) -> None:
    table(f'[dit-xl-2-256]\naddress = "{server.address}"\n')
    assert known_weights()["dit-xl-2-256"].address == server.address
    assert known_weights()["dit-xl-2-512"].address.startswith("https://")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine\n", "not valid TOML"),
        ("mine = 3\n", "section"),
        ('[mine]\nadress = "http://a/b"\n', "adress"),
        ('[mine]\nabout = "x"\n', "address"),
        ('[mine]\naddress = "file:///etc/passwd"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/b"\nsha256 = "XYZ"\n', "hexadecimal"),
        ('[mine]\naddress = "http://a/b"\nkind = "cat"\n', "kind must be one of"),
        ('[mine]\naddress = "http://[::1"\n', "http address of a file"),
        ('[mine]\naddress = "http://a:99999/b"\n', "http address of a file"),
        ('[mine]\naddress = "http:///b"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/b c"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/b\\u0000"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/\u00e9"\n', "http address of a file"),
        ('[mine]\naddress = "ftp://a/b"\n', "http address of a file"),
        ('[mine]\naddress = "http://a/%2e%2e%2fb"\n', "name of a file of the cache: .*; got '../b'"),
        ('[mine]\naddress = "http://a/%2Fetc%2Fpasswd"\n', "name of a file of the cache: .*; got '/etc/passwd'"),
        ('[mine]\naddress = "http://a/%2e%2e"\n', "name of a file of the cache: .*; got '..'"),
        ('[mine]\naddress = "http://a/b%00"\n', "name of a file of the cache"),
        ('[mine]\naddress = "http://a/b%0a"\n', "name of a file of the cache"),
        ('[mine]\naddress = "http://a/?file=b"\n', "http address of a file"),
        (f'[mine]\naddress = "http://a/{"b" * 201}"\n', "name of a file of the cache: wanted 1 to 200 bytes"),
        ('["../mine"]\naddress = "http://a/b"\n', "'../mine'. names a folder of the cache"),
        ('["/mine"]\naddress = "http://a/b"\n', "'/mine'. names a folder of the cache"),
        ('[".."]\naddress = "http://a/b"\n', "'..'. names a folder of the cache"),
        ('[""]\naddress = "http://a/b"\n', "''. names a folder of the cache"),
        ('["a\\u0000"]\naddress = "http://a/b"\n', "names a folder of the cache"),
        (f"mine = {'[' * 5000}", "nested too deeply"),
    ],
)
def test_a_table_that_is_none(text: str, message: str) -> None:
    table(text)
    with pytest.raises(UserError, match=message) as raised:
        known_weights()
    assert "weights.toml" in str(raised.value)


def test_the_longest_names_are_fetched(server: Served) -> None:
    name = "n" * 200
    table(f'[{name}]\naddress = "{server.address.rpartition("/")[0]}/{"b" * 200}"\n')
    assert fetch_weights(name) == cache_folder() / name / ("b" * 200)


Answer = tuple[int, dict[str, str], bytes]
WHOLE: dict[str, str] = {"Content-Length": str(len(CONTENT)), "ETag": '"one"'}
CUT: Answer = (200, WHOLE, CONTENT[:1000])  # a connection that breaks
PART = {"Content-Range": f"bytes 0-999/{len(CONTENT)}", "Content-Length": "1000"}
CHUNKED = {"Transfer-Encoding": "chunked"}


@contextmanager
def scripted(*answers: Answer) -> Iterator[tuple[str, list[str | None]]]:
    """Address of a server that gives these answers, the last one again and again; and the ranges of its requests."""
    left, requests = list(answers), list[str | None]()

    class Handler(HubAnswers, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.headers.get("Range"))
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

    with answering(Handler) as address:
        yield f"{address}/weights.pt", requests


def chunk(content: bytes) -> bytes:
    """A body in one chunk."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)


NEVER_WHOLE: dict[str, tuple[list[Answer], str, int]] = {  # answers, reason, requests at most
    "a part without a request for it": ([(206, PART, CONTENT[:1000])], "it answers 206 bytes 0-999/768000, and the whole", 1),
    "a part without a range": ([(206, {}, CONTENT)], "it answers 206, and the whole file was requested", 1),
    "another range": ([CUT, (206, PART, CONTENT[:1000])], "and the whole file was requested", 6),
    "a range beyond the end": ([CUT, (206, {"Content-Range": "bytes 1000-1999/1500"}, b"x" * 1000)], "the whole file", 6),
    "a range of another length": (
        [CUT, (206, {"Content-Range": f"bytes 1000-1999/{len(CONTENT)}", "Content-Length": "5"}, b"x" * 5)], "the whole", 6,
    ),
    "compressed": ([(200, {"Content-Encoding": "gzip"}, gzip.compress(CONTENT))], "in the encoding 'gzip', which", 1),
    "longer than it says": ([(200, {**CHUNKED, "Content-Length": "10"}, chunk(CONTENT))], "says 10 bytes and sends", 5),
    "shorter than it says": ([(200, {**WHOLE, "Content-Length": "9"}, b"12345")], "the connection broke", 6),
    "broken off in a chunk": ([(200, CHUNKED, chunk(CONTENT)[:5000])], "IncompleteRead", 6),
    "no number of bytes": ([(200, {"Content-Length": "-1"}, CONTENT)], "it says Content-Length '-1'", 1),
    "a huge number of bytes": ([(200, {"Content-Length": "9" * 5000}, CONTENT)], "it says Content-Length '999", 1),
    "more than the disk has": ([(200, {"Content-Length": "9" * 17}, CONTENT)], "no space", 1),
    "nothing": ([(200, {"Content-Length": "0"}, b"")], "it sends an empty file", 1),
    "no content": ([(204, {}, b"")], "it answers 204, and the whole file was requested", 1),
    "416 at once": ([(416, {}, b"")], "answers 416 Requested Range Not Satisfiable", 1),
    "416 again and again": ([CUT, (416, {}, b""), CUT, (416, {}, b"")] * 50, "it answers 416", 12),
    "redirects in a circle": ([(302, {"Location": "/weights.pt"}, b"")], "infinite loop", 12),
    "to a file": ([(302, {"Location": "file:///etc/passwd"}, b"")], "answers 302", 1),
    "to another protocol": ([(302, {"Location": "ftp://127.0.0.1/x"}, b"")], "unknown url type: ftp", 1),
    "to nowhere": ([(302, {"Location": "http://[::1"}, b"")], "Invalid IPv6 URL", 1),
}  # fmt: skip


@pytest.mark.parametrize("what", NEVER_WHOLE)
def test_an_answer_that_is_not_the_whole_file_is_never_recorded(what: str) -> None:
    answers, reason, most = NEVER_WHOLE[what]
    with scripted(*answers) as (address, requests):
        table(f'[mine]\naddress = "{address}"\n')
        with pytest.raises(UserError, match="cannot fetch mine") as raised:
            fetch_weights("mine")
    assert reason in str(raised.value) and "\n" not in str(raised.value).strip()
    assert 1 <= len(requests) <= most
    assert not [name for name in left() if not name.startswith(".")]


def test_a_requested_part_may_be_shorter() -> None:
    """As servers with a limit per answer give it."""
    size = len(CONTENT)
    ranges: list[Answer] = [
        (206, {"Content-Range": f"bytes {first}-{last - 1}/{size}", "ETag": '"one"'}, CONTENT[first:last])
        for first, last in ((1000, 5000), (5000, size))
    ]
    with scripted(CUT, *ranges) as (address, requests):
        table(f'[mine]\naddress = "{address}"\n')
        assert fetch_weights("mine").read_bytes() == CONTENT
    assert requests == [None, "bytes=1000-", "bytes=5000-"]


def test_a_record_that_is_no_text(server: Served) -> None:
    entry(server)
    path = fetch_weights("mine")
    path.with_name(f"{path.name}.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="sha256 is damaged: not UTF-8"):
        fetch_weights("mine")


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean 'tinydit-d14'"):
        fetch_weights("tinydit-d15")
