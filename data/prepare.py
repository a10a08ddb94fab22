"""Downloads what the papers train and test on, and the models: python data/prepare.py commonsense

    commonsense    commonsense_170k.json and its 8 test sets           113 MB    LLM-Adapters on GitHub
    math           math_50k.json and the 6 arithmetic test sets         79 MB    (math_10k, math_14k: smaller ones)
    olmoe          allenai/OLMoE-1B-7B-0924                           13.8 GB    Hugging Face
    mixtral        mistralai/Mixtral-8x7B-v0.1                        93.4 GB
    owner/model    any Hugging Face model with safetensors weights

It goes below data/downloads. A file grows as X.part and gets its own name once its size and hash are right: what has
its name is whole. What was cut off (no network, Ctrl-C) is kept, and the same command continues it; what is there is
never overwritten. A model's config.json comes last: without it a folder is unfinished, and the loader says so.

The data's sizes and hashes stand in FACTS; a model's come with the hub's list of its files (sha256 of large files,
git's blob hash, sha1 of "blob <size>\\0" and the bytes, of small ones). So a mirror can give no other data.

The training sets hold a trap. ft-training_set/math_data.json of the same source is not offered: 80 % of it is test
questions. The MAWPS rows of the others contain most of MultiArith, AddSub and SingleEq test; the report at the end
counts the test questions that stand word for word in the training file. Clean: GSM8K train -> gsm8k, SVAMP, AQuA.

HF_TOKEN: your access token, for gated models (sent to the hub, not to where it redirects). HF_ENDPOINT: another hub.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from functools import partial
from http.client import HTTPException
from pathlib import Path
from time import sleep
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, this folder is on it instead

from data.tasks import GROUPS  # noqa: E402

SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters/raw/main"
HUB = "https://huggingface.co"
MODELS = {"olmoe": "allenai/OLMoE-1B-7B-0924", "mixtral": "mistralai/Mixtral-8x7B-v0.1"}
COMMONSENSE, MATH = GROUPS["commonsense"], GROUPS["math"]  # names of test sets
DATA = {  # name on the command line: (training file, test sets)
    "commonsense": ("commonsense_170k", COMMONSENSE),
    "math": ("math_50k", MATH), "math_10k": ("math_10k", MATH), "math_14k": ("math_14k", MATH),
}  # fmt: skip
FACTS = {  # name: (bytes, rows of a test set, sha256)
    "commonsense_170k": (96529722, None, "4651a3e707fbe28be03f486f96fcf57f8c38b2173f3e38812003108970793ac8"),
    "math_10k": (7842041, None, "0342d0d860ad8592b579329337c90e42eefd3d9f2898043140cbd120630418b8"),
    "math_14k": (10784981, None, "ea339ad9d38d9f48931f12eb5963ea708a920d5310e7e62771c4d7db8c5f4a4c"),
    "math_50k": (76934505, None, "cfdc03afe5c1c110ad9fa980db16314b1d00a33bed881a3b88fbf7890d2a054d"),
    "AQuA": (152063, 254, "de677f5f0139340009eb01f17c0db781b4161912cd1f4efa77292f2fcf3478ee"),
    "ARC-Challenge": (622510, 1172, "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7"),
    "ARC-Easy": (1157216, 2376, "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc"),
    "AddSub": (170411, 395, "62a8662b1ad40879953c4df0e61883a749d03aa3fc5e71f1cdb842b816e139ff"),
    "MultiArith": (275458, 600, "a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28"),
    "SVAMP": (459713, 1000, "ffed015784f738f317c5603177861d044c4fc94e09211d78b25e96d46c656e2c"),
    "SingleEq": (212001, 508, "712b15edb851c97aab42a5de106d94008f94d917366c92537ed5400a8aacb207"),
    "boolq": (899151, 3270, "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9"),
    "gsm8k": (824475, 1319, "2cc616a1e0b23ea1df29370476365cde71c4e0aa823fb06cc194c5a8a9381abe"),
    "hellaswag": (11099046, 10042, "3ea7e99795e63a01f2f5e9ddbc4dca964d9ebb22f04201e64d1ac043be51ab61"),
    "openbookqa": (202545, 500, "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e"),
    "piqa": (913157, 1838, "3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141"),
    "social_i_qa": (843748, 1954, "71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d"),
    "winogrande": (497409, 1267, "6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9"),
}
TIMEOUT = 30  # seconds without a byte
RETRIES = 5  # after pauses of 1, 2, 4, 8, 16 seconds; a failure after new bytes begins the count anew
NEW_BYTES = 1 << 20  # as many, at least: else a server that sends a byte at a time would keep us for years
REHASH_BELOW = 200_000_000  # bytes: a larger file that has its name is known by its size
LINE_EVERY = 10  # seconds, where there is no terminal for a progress bar


class File(NamedTuple):
    url: str
    path: Path
    size: int
    digest: str  # 64 hex digits: sha256; 40: git's blob hash


class Again(Exception):
    """A failure that may pass; args: the message, and how many seconds the server asks to wait."""


class Refused(ValueError):
    """401 or 403."""


# One connection -----------------------------------------------------------------------------------------------------


class TokenStaysHome(HTTPRedirectHandler):
    """An "unredirected" header does not follow a redirect. To the same host it may: the hub redirects the small files
    of a gated model to itself, and the large ones to a storage host."""

    def redirect_request(self, request, *redirect):
        new = super().redirect_request(request, *redirect)
        token = request.unredirected_hdrs.get("Authorization")
        if token and urlsplit(new.full_url)[:2] == urlsplit(request.full_url)[:2]:  # scheme, host:port
            new.add_unredirected_header("Authorization", token)
        return new


def open_url(url: str, token: str | None = None, **headers):
    """The server's answer (2xx or 416), else Again or a ValueError of one line."""
    request = Request(url, headers={"User-Agent": "nano-moe-prepare/1.0", **headers})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return build_opener(TokenStaysHome).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        code, wait = error.code, error.headers.get("Retry-After", "")
        if code == 416:
            return error
        if code in (408, 429) or code >= 500:
            raise Again(f"{url}: the server answers {code}", min(int(wait), 60) if wait.isdecimal() else 0) from None
        if code in (401, 403):
            raise Refused(f"{url}: refused ({code}); is there a proxy or a login between?") from None
        cause = "no such file (404)" if code == 404 else f"the server answers {code}"
        raise ValueError(f"{url}: {cause}; is the name right? Open the address in a browser") from None
    except (OSError, HTTPException) as error:
        raise Again(f"{url}: no connection ({getattr(error, 'reason', error)})", 0) from None


def blocks(url, response):
    """The body as it arrives: what came before a break is not lost."""
    try:
        while block := response.read1(1 << 20):
            yield block
    except (OSError, HTTPException) as error:
        raise Again(f"{url}: the connection broke ({error or type(error).__name__})", 0) from None


def persist(attempt, part: Path | None = None):
    """The result of attempt(), called again after each Again until RETRIES of them have brought no new bytes."""
    failures = farthest = 0
    while True:
        try:
            return attempt()
        except Again as error:
            (message, wait), size = error.args, size_of(part)
            failures = 1 if size >= farthest + NEW_BYTES else failures + 1
            farthest = max(farthest, size)
            if failures > RETRIES:
                raise ConnectionError(f"{message}; what is here is kept: later, the same command continues") from None
            wait = max(wait, 2 ** (failures - 1))
            print(f"{message}; trying again in {wait} s", file=sys.stderr, flush=True)
            sleep(wait)


# One file -----------------------------------------------------------------------------------------------------------


def size_of(path: Path | None) -> int:
    return path.stat().st_size if path and path.exists() else 0


def hash_of(path: Path, size: int, digest: str):
    """The hash (of the kind that `digest` is) of what a file holds so far; it can take in more."""
    hasher = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if path.exists():
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    return hasher


def download(url: str, path: str | Path, size: int, digest: str, token: str | None = None):
    """Bring a file of this size and hash to `path`, continuing `path`.part if there is one."""
    part = Path(f"{path}.part")
    for _ in range(2):
        if persist(partial(fetch, url, part, size, digest, token), part) == digest:
            os.replace(part, path)
            return
        part.unlink(missing_ok=True)  # more bytes cannot make it right; once more from the first one
    raise ValueError(f"{url}: twice its hash was not the published one, and nothing of it is kept; was it changed "
                     "there, or on the way (a proxy, a mirror)?")  # fmt: skip


def fetch(url, part, size, digest, token) -> str:
    """One attempt to complete the part: the hash of all of it, or Again."""
    have, hasher = size_of(part), hash_of(part, size, digest)
    if have and have >= size:  # nothing to ask for
        return hasher.hexdigest()
    with open_url(url, token, **({"Range": f"bytes={have}-"} if have else {})) as response:
        if response.status == 416:  # the server's file ends before this place: ours is not the beginning of it
            return "wrong"
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        begin = have if resumed else 0  # the server may know no ranges and send all of it
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and begin + int(length) != size:
            raise ValueError(f"{url}: the server has {begin + int(length):,} bytes, expected {size:,}; is this a "
                             "login page, or another version of the file?")  # fmt: skip
        if not resumed:
            part.unlink(missing_ok=True)
            have, hasher = 0, hash_of(part, size, digest)
        with open(part, "ab") as file, Progress(part.stem, have, size) as progress:
            for block in blocks(url, response):
                file.write(block)
                hasher.update(block)
                have += len(block)
                progress.update(len(block))
                if have > size:
                    return "wrong"
            file.flush()
            os.fsync(file.fileno())
    if have < size:
        raise Again(f"{url}: the connection ended after {have:,} of {size:,} bytes", 0)
    return hasher.hexdigest()


class Progress(tqdm):
    """A bar on a terminal, elsewhere a line every 10 seconds."""

    def __init__(self, name: str, have: int, size: int):
        self.lines = not sys.stderr.isatty()
        often = {"delay": LINE_EVERY, "mininterval": LINE_EVERY, "miniters": 1} if self.lines else {}
        look = {"bar_format": "{desc} {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"} if self.lines else {}
        super().__init__(desc=name, initial=have, total=size, unit="B", unit_scale=True, leave=False, **often, **look)

    def display(self, msg=None, pos=None):
        if not self.lines:
            super().display(msg, pos)
        elif msg is None:  # "" would wipe the bar
            print(self, file=sys.stderr, flush=True)


# Many files ---------------------------------------------------------------------------------------------------------


def is_there(file: File) -> bool:
    """True for the right file, False for none; a wrong one may be somebody's work and is not ours to replace."""
    if not file.path.exists():
        return False
    size, wrong = size_of(file.path), None
    if size != file.size:
        wrong = f"has {size:,} bytes, expected {file.size:,}"
    elif size < REHASH_BELOW and hash_of(*file[1:]).hexdigest() != file.digest:
        wrong = "has the right size and other content than the published file"
    if wrong:
        raise ValueError(f"{file.path}: {wrong}; it is left as it is: move it away, then run the same command again")
    print(f"{file.path}: already there")
    return True


def get_all(files: list[File], token: str | None = None):
    files, missing = [file for file in files if not is_there(file)], 0
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        missing += max(0, file.size - size_of(Path(f"{file.path}.part")))
    if missing > (free := shutil.disk_usage(file.path.parent).free if files else 0):
        raise OSError(f"{file.path.parent}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make "
                      "room, or go elsewhere with --out DIR")  # fmt: skip
    for file in files:
        download(*file, token)
        print(f"{file.path}: complete, {file.size:,} bytes", flush=True)


def get_data(name: str, out: Path, source: str):
    train, tests = DATA[name]
    places = {train: (f"ft-training_set/{train}.json", f"{train}.json")}
    places |= {test: (f"dataset/{test}/test.json", f"test/{test}.json") for test in tests}
    files = [File(f"{source}/{there}", out / here, *FACTS[key][::2]) for key, (there, here) in places.items()]
    get_all(files)
    known = set(questions(files[0].path))
    for test, file in zip(tests, files[1:]):
        asked, rows = questions(file.path), FACTS[test][1]
        if len(asked) != rows:
            raise ValueError(f"{file.path}: {len(asked)} rows, expected {rows}; move it away, then run this again")
        print(f"overlap: {test} {sum(q in known for q in asked)} of {rows} questions stand in {train}.json too")
    base = out / MODELS["olmoe"].split("/")[1]
    print(f"next: python train.py --variant perft_r --base {base} --dtype bfloat16 --data {name} --recipe perft_paper")


def questions(path: Path) -> list[str]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [" ".join(f"{row['instruction']} {row.get('input', '')}".split()) for row in rows]


def get_model(repo: str, out: Path):
    hub = address(os.environ.get("HF_ENDPOINT") or HUB)
    token = os.environ.get("HF_TOKEN", "").strip()
    folder = out / repo.split("/")[1]
    try:
        listed = list_files(f"{hub}/api/models/{repo}/tree/main", token)
        files = {n: File(f"{hub}/{repo}/resolve/main/{n}", folder / n, *facts) for n, facts in listed.items()}
        single, index = files.get("model.safetensors"), files.get("model.safetensors.index.json")
        if "config.json" not in files or not (single or index):
            raise ValueError(f"{hub}/{repo}: no config.json with safetensors weights; is this the right model?")
        if not single:
            get_all([index], token)
        names = r"tokenizer[\w.-]*\.json|special_tokens_map\.json|generation_config\.json"
        wanted = [file for name, file in files.items() if re.fullmatch(names, name, re.A)]
        wanted += [single] if single else [files[name] for name in shards(index.path, files)]
        get_all([*wanted, files["config.json"]], token)
    except Refused as error:
        refused = str(error).split(";")[0]
        raise ValueError(f"{refused}; the model is gated, private or misspelt: accept its licence at {hub}/{repo} "
                         "and set HF_TOKEN to an access token of your account") from None  # fmt: skip
    print(f'next: python eval.py --base {folder} --dtype bfloat16 --prompt "Mixture-of-Experts models are"')


def list_files(url: str, token: str) -> dict[str, tuple[int, str]]:
    """Name -> (size, hash) of a model's files; a stranger may have written the answer."""

    def read():
        with open_url(url, token) as response:
            return b"".join(blocks(url, response))

    body = persist(read)
    try:
        entries = [entry for entry in json.loads(body) if entry["type"] == "file"]
        listed = {entry["path"]: (entry["size"], (entry.get("lfs") or entry)["oid"]) for entry in entries}
        hexes = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
        if all(type(size) is int and size >= 0 and hexes.fullmatch(oid) for size, oid in listed.values()):
            return listed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{url}: the answer is not a list of files; is HF_ENDPOINT a hub?")


def shards(index: Path, files: dict[str, File]) -> list[str]:
    """The file names in an index: plain ones, and ones that the hub lists."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: no weight_map of tensor names to file names; is the model broken?") from None
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name), re.A) or name not in files:
            raise ValueError(f"{index}: names {name!r}, which is no weights file of the model; is the model broken?")
    return names


# The command --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def address(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address that begins with http:// or https://")
    return text.rstrip("/")


def known_name(text: str) -> str:
    if text not in DATA and text not in MODELS and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.A):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*DATA, *MODELS])}, and no owner/model")
    return text


def main(argv=None):
    parser = Parser(prog="prepare.py", usage="python data/prepare.py NAME [--out DIR] [--source URL]",
                    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    here = Path(os.path.relpath(Path(__file__).parent / "downloads"))
    add = parser.add_argument
    add("name", metavar="NAME", type=known_name, help=f"{', '.join([*DATA, *MODELS])} or owner/model")
    add("--out", metavar="DIR", type=Path, default=here, help="where it goes (%(default)s)")
    add("--source", metavar="URL", type=address, default=SOURCE, help="a mirror of the data (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.name in DATA:
            get_data(args.name, args.out, args.source)
        else:
            get_model(MODELS.get(args.name, args.name), args.out)
    except OSError as error:  # the network's have their line already; a full disk or a read-only folder gets it here
        place, cause = error.filename or args.out, error.strerror
        sys.exit(f"error: {place}: {cause}; is there room, and may it be written? --out DIR takes another place"
                 if cause else f"error: {error}")  # fmt: skip
    except (ValueError, argparse.ArgumentTypeError) as error:  # the user's input: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; what is here is kept: the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
