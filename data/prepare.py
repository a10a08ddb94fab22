"""Downloads what the papers train and test on, and the models: python data/prepare.py commonsense

    commonsense    commonsense_170k.json and its 8 test sets      113 MB    LLM-Adapters on GitHub
    math           math_50k.json and the 6 arithmetic test sets    79 MB    (math_10k, math_14k too)
    olmoe          allenai/OLMoE-1B-7B-0924                      13.8 GB    Hugging Face
    olmoe_0125     allenai/OLMoE-1B-7B-0125                      13.8 GB
    mixtral        mistralai/Mixtral-8x7B-v0.1                   93.4 GB
    qwen3          Qwen/Qwen3-30B-A3B                            61.1 GB
    owner/model    any Hugging Face model with safetensors weights

It goes below data/downloads. A file grows as X.part and gets its own name once its size and hash
are right: what has its name is whole, and on a later run its size alone is looked at. What was cut
off (no network, Ctrl-C) is kept, and the same command continues it; what is there is never
overwritten. A model's config.json comes last: without it a folder is unfinished, and the loader
says so.

The data's sizes and hashes stand in FACTS; a model's come with the hub's list of its files (sha256
of large files, git's blob hash, sha1 of "blob <size>\\0" and the bytes, of small ones). So a mirror
can give no other data.

The training sets hold a trap. ft-training_set/math_data.json of the same source is not offered:
80 % of it is test questions. The MAWPS rows of the others contain most of MultiArith, AddSub and
SingleEq test; the report at the end counts the test questions that stand word for word in the
training file. Clean: GSM8K train -> gsm8k, SVAMP, AQuA.

HF_TOKEN: your access token, for gated models (sent to the hub, not to where it redirects).
HF_ENDPOINT: another hub.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, this folder is on it

from data import run  # noqa: E402
from data.tasks import GROUPS, TRAINING_SETS  # noqa: E402

SOURCE = "https://github.com/AGI-Edgerunners/LLM-Adapters/raw/main"
HUB = "https://huggingface.co"
MODELS = {
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "olmoe_0125": "allenai/OLMoE-1B-7B-0125",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen3": "Qwen/Qwen3-30B-A3B",
}
FACTS = {  # name: (bytes, sha256)
    "commonsense_170k": (
        96529722,
        "4651a3e707fbe28be03f486f96fcf57f8c38b2173f3e38812003108970793ac8",
    ),
    "math_10k": (7842041, "0342d0d860ad8592b579329337c90e42eefd3d9f2898043140cbd120630418b8"),
    "math_14k": (10784981, "ea339ad9d38d9f48931f12eb5963ea708a920d5310e7e62771c4d7db8c5f4a4c"),
    "math_50k": (76934505, "cfdc03afe5c1c110ad9fa980db16314b1d00a33bed881a3b88fbf7890d2a054d"),
    "AQuA": (152063, "de677f5f0139340009eb01f17c0db781b4161912cd1f4efa77292f2fcf3478ee"),
    "ARC-Challenge": (622510, "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7"),
    "ARC-Easy": (1157216, "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc"),
    "AddSub": (170411, "62a8662b1ad40879953c4df0e61883a749d03aa3fc5e71f1cdb842b816e139ff"),
    "MultiArith": (275458, "a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28"),
    "SVAMP": (459713, "ffed015784f738f317c5603177861d044c4fc94e09211d78b25e96d46c656e2c"),
    "SingleEq": (212001, "712b15edb851c97aab42a5de106d94008f94d917366c92537ed5400a8aacb207"),
    "boolq": (899151, "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9"),
    "gsm8k": (824475, "2cc616a1e0b23ea1df29370476365cde71c4e0aa823fb06cc194c5a8a9381abe"),
    "hellaswag": (11099046, "3ea7e99795e63a01f2f5e9ddbc4dca964d9ebb22f04201e64d1ac043be51ab61"),
    "openbookqa": (202545, "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e"),
    "piqa": (913157, "3860d11b9b42e590b6b4bbc1643214d373ed0b0d4ac62fcc7bdceb8e044ad141"),
    "social_i_qa": (843748, "71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d"),
    "winogrande": (497409, "6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9"),
}
BLOCK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without a byte
PATIENCE = 60  # seconds that an answer may be slower than SLOWEST
SLOWEST = 1000  # bytes a second
LARGEST_LIST = 1_000_000  # bytes
PAUSES = 1, 2, 4, 8, 16  # seconds, before a download that broke off is continued
SHOW_EVERY = 2  # seconds between two looks at a download
KEPT = "what is here is kept: the same command continues"


class File(NamedTuple):
    url: str
    path: Path
    size: int
    digest: str  # 64 hex digits: sha256; 40: git's blob hash

    @property
    def part(self):
        return Path(f"{self.path}.part")


class Again(ConnectionError):
    """A failure that may pass: a slow or broken connection, a server in trouble."""


# One connection ----------------------------------------------------------------------------------


class Redirects(HTTPRedirectHandler):
    """A redirect leads to https, or from http to http, and nowhere else.

    A token (an "unredirected" header) does not follow. To the same host it may: the hub redirects
    the small files of a gated model to itself, and the large ones to a storage host.
    """

    def redirect_request(self, request, answer, *details):
        new = super().redirect_request(request, answer, *details)
        if new.type not in ("https", request.type):
            raise ValueError(f"redirects to {new.type}, which is refused: {new.full_url}")
        if (new.type, new.host) == (request.type, request.host):
            new.unredirected_hdrs |= request.unredirected_hdrs
        answer.close()  # urllib would read the page that comes with a redirect, however long it is
        return new


def open_url(url, token, begin=0):
    """The server's answer from byte `begin` on."""
    with explained(url):
        request = Request(url, headers={"User-Agent": "nano-moe-prepare/1.0"})
        if request.type not in ("http", "https"):
            raise ValueError("it must begin with http:// or https://")
        if begin:
            request.add_header("Range", f"bytes={begin}-")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return build_opener(Redirects).open(request, timeout=TIMEOUT)


def blocks(url, answer, most):
    """The body as it arrives, up to `most` bytes: what came before a break is not lost.

    Each byte puts the deadline 1 / SLOWEST seconds off, up to PATIENCE from now.
    """
    deadline = monotonic() + PATIENCE
    while monotonic() < deadline:
        with explained(url):
            block = answer.read1(min(BLOCK, most))
        if not block:
            return
        most -= len(block)
        deadline = min(deadline + len(block) / SLOWEST, monotonic() + PATIENCE)
        yield block
    raise Again(f"{url}: too slow for {PATIENCE} seconds")


@contextmanager
def explained(url):
    """What goes wrong on the way to a server, as Again or as a ValueError, of one line."""
    try:
        yield
    except HTTPError as error:
        answer = f"{url}: the server answers {error.code}"
        if error.code in (408, 429) or error.code >= 500:
            raise Again(answer) from None
        raise ValueError(
            f"{answer}; is the name right, is there a proxy or a login between? If the model is "
            "gated or private, accept its licence on its page, and set HF_TOKEN to an access token "
            "of your account"
        ) from None
    except (ValueError, InvalidURL) as error:  # from above, or of an address that is none
        raise ValueError(
            f"{url}: {run.shown(str(error))}; is the address right? A model's hub is set by "
            "HF_ENDPOINT, a mirror of the data by --source"
        ) from None
    except (OSError, HTTPException) as error:
        raise Again(f"{url}: the connection failed ({run.shown(str(error))})") from None


# One file ----------------------------------------------------------------------------------------


def download(file, token=""):
    """Bring the file, continuing its part if there is one."""
    for pause in (*PAUSES, None):
        try:
            fetch(file, token)
            break
        except Again as error:
            if pause is None:
                raise Again(f"{error}; {KEPT}") from None
            print(f"trying again in {pause} s: {error}", file=sys.stderr, flush=True)
            sleep(pause)
    if hash_of(file) != file.digest:
        file.part.unlink()  # more bytes cannot make it right
        raise ValueError(
            f"{file.url}: its hash is not the published one, and nothing of it is kept; try again, "
            "and if it stays so: was it changed there, or on the way (a proxy, a mirror)?"
        )
    os.replace(file.part, file.path)


def fetch(file, token):
    """One attempt to complete the part."""
    have = size_of(file.part)
    if have and have >= file.size:  # nothing to ask for
        return
    with open_url(file.url, token, have) as answer:
        if answer.status == 200:  # a server that knows no ranges sends all of it
            have = 0
        whole = file.size if answer.length is None else have + answer.length
        if whole != file.size:
            raise ValueError(
                f"{file.url}: the server has {whole:,} bytes, expected {file.size:,}; "
                "is this a login page, or another version of the file?"
            )
        bar = tqdm(
            desc=file.path.name,
            initial=have,
            total=file.size,
            unit="B",
            unit_scale=True,
            file=sys.stdout,
            delay=SHOW_EVERY,
            mininterval=SHOW_EVERY,
        )
        with open(file.part, "ab" if have else "wb") as part, bar:
            for block in blocks(file.url, answer, file.size + 1 - have):  # one more: a wrong hash
                part.write(block)
                have += len(block)
                bar.update(len(block))
            part.flush()
            os.fsync(part.fileno())
    if have < file.size:
        raise Again(f"{file.url}: ended after {have:,} of {file.size:,} bytes")


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def hash_of(file):
    """The hash of the part, of the kind of file.digest."""
    hasher = hashlib.sha256()
    if len(file.digest) == 40:
        hasher = hashlib.sha1(b"blob %d\0" % file.size)
    with open(file.part, "rb") as part:
        while block := part.read(BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


# Many files --------------------------------------------------------------------------------------


def get_all(files, token=""):
    """Download those that are not there, once it is known that there is room for all. ValueError
    for one of another size, which may be somebody's work.
    """
    missing = []
    for file in files:
        if not file.path.exists():
            file.path.parent.mkdir(parents=True, exist_ok=True)
            missing.append(file)
        elif size_of(file.path) == file.size:
            print(f"{file.path}: already there")
        else:
            raise ValueError(
                f"{file.path}: has {size_of(file.path):,} bytes, expected {file.size:,}; it is "
                "left as it is: move it away, then run the same command again"
            )
    needed = sum(file.size - size_of(file.part) for file in missing)
    folder = files[0].path.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "make room, or go elsewhere with --out DIR"
        )
    for file in missing:
        download(file, token)
        print(f"{file.path}: complete, {file.size:,} bytes", flush=True)


# The data ----------------------------------------------------------------------------------------


def get_data(name, out, source):
    train, group = TRAINING_SETS[name], name.split("_")[0]
    training = File(f"{source}/ft-training_set/{train}.json", out / f"{train}.json", *FACTS[train])
    tests = [
        File(f"{source}/dataset/{test}/test.json", out / f"test/{test}.json", *FACTS[test])
        for test in GROUPS[group]
    ]
    get_all([training, *tests])

    known = set(questions(training.path))
    for test in tests:
        asked = questions(test.path)
        seen = sum(question in known for question in asked)
        found = f"{seen} of {len(asked)} questions stand in {train}.json too"
        print(f"overlap: {test.path.stem} {found}")
    print(
        f"next: python train.py --variant perft_r --base {out}/OLMoE-1B-7B-0924 --dtype bfloat16 "
        f"--data {name} --recipe perft_paper"
    )


def questions(path):
    """What the rows of a data set ask, with single blanks."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [" ".join(f"{row['instruction']} {row.get('input', '')}".split()) for row in rows]


# A model -----------------------------------------------------------------------------------------

NEEDED = (
    r"tokenizer[\w.-]*\.json|(special_tokens_map|generation_config)\.json|"
    r"model\.safetensors\.index\.json|model(-\d+-of-\d+)?\.safetensors"
)


def get_model(repo, out):
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):  # http.client would print it in its complaint
        raise ValueError("HF_TOKEN: holds a character that no token has (a blank?); set it again")
    folder = out / repo.split("/")[1]
    files = list_files(hub, repo, folder, token)
    names = [name for name in files if re.fullmatch(NEEDED, name, re.A)]
    weights = [name for name in names if name.endswith(".safetensors")]
    if "config.json" not in files or not weights:
        raise ValueError(
            f"{hub}/{repo}: no config.json with safetensors weights; is this the right model?"
        )
    get_all([files[name] for name in [*names, "config.json"]], token)
    print(
        f"next: python eval.py --base {folder} --dtype bfloat16 "
        '--prompt "Mixture-of-Experts models are"'
    )


def list_files(hub, repo, folder, token):
    """The hub's list of a model's files -> {name: File}; a stranger may have written it."""
    url = f"{hub}/api/models/{repo}/tree/main"
    with open_url(url, token) as answer:
        body = b"".join(blocks(url, answer, LARGEST_LIST))
    files = {}
    try:
        for entry in json.loads(body):
            name, size = entry["path"], entry["size"]
            digest = (entry.get("lfs") or entry)["oid"]  # a large file's own is that of a pointer
            if not 0 <= size < 2**63 or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest):
                raise ValueError
            files[name] = File(f"{hub}/{repo}/resolve/main/{name}", folder / name, size, digest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{url}: the answer is not a list of files; is HF_ENDPOINT a hub?"
        ) from None
    return files


# The command -------------------------------------------------------------------------------------


@run.command
def main(argv=None):
    parser = run.Parser(prog="prepare.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the page has tables
    here = Path(__file__).parent / "downloads"
    add = parser.add_argument
    add("name", metavar="NAME", help="what to bring, from the list above")
    add("--out", metavar="DIR", type=Path, default=here, help="where it goes (%(default)s)")
    add("--source", metavar="URL", default=SOURCE, help="a mirror of the data")
    args = parser.parse_args(argv)
    repo = MODELS.get(args.name, args.name)
    if args.name not in TRAINING_SETS and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.A):
        names = ", ".join([*TRAINING_SETS, *MODELS])
        parser.error(f"{run.shown(args.name)} is none of {names}, and no owner/model")
    with run.last_words(lambda: KEPT), run.naming(args.out):
        if args.name in TRAINING_SETS:
            get_data(args.name, args.out, args.source.rstrip("/"))
        else:
            get_model(repo, args.out)


if __name__ == "__main__":
    main()
