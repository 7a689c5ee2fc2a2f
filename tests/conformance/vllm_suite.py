"""vLLM's own attention tests, unedited, against our backends: one command, and a report.

    python tests/conformance/vllm_suite.py                   every file below, with TAUT_ATTENTION=on
    python tests/conformance/vllm_suite.py --stock           the same with vLLM's own backends, to compare
    python tests/conformance/vllm_suite.py --only mla        the files, or the tests, whose name says so

The tests travel in vLLM's source distribution. The one of the release that is installed is downloaded from the package
index once and its tests are kept in `.conformance/`; a machine without a network takes that folder along. They need
the shapes of six models, not the models: `models.json` holds what their configurations say. One of them is run, whole
engines at a time: it gets weights and words that are made up, and four layers of its 28.

Members of vLLM's registry that its tests walk (FLASH_ATTN, TRITON_ATTN, FLASH_ATTN_MLA, ...) are overridden as they are
for a user who sets `TAUT_ATTENTION=on`: each test then computes with our kernels under that member's name. The report
says how many tests did. Exit status 0: every test passed, or there is a reason listed here why it did not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".conformance"
INDEX = "https://pypi.org/pypi"

MANY = ("tests/v1/attention/test_attention_backends.py", "tests/v1/attention/test_mla_backends.py")  # tests in a file
FILES = (
    *MANY,
    "tests/test_attention_backend_registry.py",
    "tests/v1/attention/test_attention_backends_selection.py",
    "tests/v1/attention/test_attention_splitting.py",
    "tests/v1/attention/test_backend_per_kind.py",
    "tests/v1/attention/test_batch_reordering.py",
    "tests/v1/attention/test_chunked_local_attention.py",
    "tests/v1/attention/test_cpu_mla_backend.py",
    "tests/v1/attention/test_group_head_counts.py",
    "tests/v1/attention/test_group_sliding_window.py",
    "tests/v1/attention/test_kv_head_stride_canonicalization.py",
    "tests/v1/attention/test_mla_context_chunks.py",
    "tests/v1/attention/test_mla_noncausal.py",
    "tests/v1/attention/test_mla_prefill_quant_output.py",
    "tests/v1/attention/test_mla_prefill_registry.py",
    "tests/v1/attention/test_mla_prefill_selector.py",
    "tests/v1/attention/test_mm_prefix.py",
    "tests/kernels/attention/test_attention_selector.py",
    "tests/v1/cudagraph/test_cudagraph_dispatch.py",
    "tests/v1/cudagraph/test_cudagraph_mode.py",
)

RUN = {"tests/v1/cudagraph/test_cudagraph_mode.py": "Qwen/Qwen2-1.5B-Instruct"}  # who runs which model

# Why a skip is right, by what its reason says. A skip for any other reason counts as a failure.
KNOWN_SKIPS = {
    r"[Nn]o backends support kv_cache_dtype": "the test asks no backend of this machine",
    r"prefill backend|[Pp]refill.*not (available|supported)": "a prefill backend of vLLM that this GPU has not",
    r"not (available|installed)": "a package that is not installed here",
    r"[Rr]equires|[Nn]eeds|only (supported|runs|for)|not supported on": "other hardware",
    r"CUDA|ROCm|ROCM|XPU|SM\d|Blackwell|Hopper|GPU": "other hardware",
    r"only supports block_size": "the test's own table of blocks and backends",
    r"does not handle fallbacks when a backend is explicitly set": "the test's own, whatever the backend",
}

# Tests that ask a member of vLLM's registry about itself, where ours, under its name, rightly says something else.
KNOWN_DIFFERENCES = {
    r"::test_fp32_fallback\[cuda\]": "float32 needs no fallback: our kernels take it",
    r"::test_per_head_quant_scales_backend_selection\[.*-False\]": "our kernels take a scale for each head",
    r"::test_non_causal_(backend_selection\[.*-True-True\]|autoselect_backend)": "decoders that see what follows are "
    "refused by name: vLLM's setting does not say whether all rows of a batch do, or some",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one test.

    Args:
        test: pytest's name of it.
        outcome: passed, failed or skipped.
        why: the reason of a skip, the message of a failure.
        calls: how often our implementations were called in it.
        seconds: how long it took.
    """

    test: str
    outcome: str
    why: str
    calls: int
    seconds: float

    @property
    def file(self) -> str:
        return self.test.partition("::")[0]

    @property
    def is_wrong(self) -> bool:
        """Whether it failed or was skipped, for a reason that nobody has listed."""
        return self.outcome != "passed" and self.excuse is None

    @property
    def excuse(self) -> str | None:
        """Why it is right that it did not pass; None if it is not known to be."""
        return known_skip(self.why) if self.outcome == "skipped" else known_difference(self.test)


def known_difference(test: str) -> str | None:
    """Why a test rightly fails; None if it is not known to do so."""
    return next((said for pattern, said in KNOWN_DIFFERENCES.items() if re.search(pattern, test)), None)


def known_skip(why: str) -> str | None:
    """Why a skip is right; None if it is not known to be."""
    return next((said for pattern, said in KNOWN_SKIPS.items() if re.search(pattern, why)), None)


def installed_release() -> str:
    code = "import vllm; print(vllm.__version__)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return output.split()[-1].partition("+")[0]


def tests_of(release: str) -> Path:
    """The folder that holds `tests/` of a release of vLLM; downloaded once."""
    folder = CACHE / f"vllm-{release}"
    if (folder / "tests").exists():
        return folder
    with urllib.request.urlopen(f"{INDEX}/vllm/{release}/json") as answer:
        files = json.load(answer)["urls"]
    url = next(file["url"] for file in files if file["packagetype"] == "sdist")
    rich.print(f"downloading the tests of vLLM {release}")
    CACHE.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".tar.gz", dir=CACHE) as archive:
        with urllib.request.urlopen(url) as stream:
            while block := stream.read(1 << 20):
                archive.write(block)
        archive.flush()
        with tarfile.open(archive.name) as sources:
            wanted = [m for m in sources if m.name.startswith(f"vllm-{release}/tests/") and m.name.endswith(".py")]
            sources.extractall(CACHE, members=wanted, filter="data")
    return folder


def write_models(cache: Path, run: Container[str]) -> None:
    """The configurations that the tests name, as a cache of the model hub holds them, and the models that they run."""
    for name, configuration in json.loads((HERE / "models.json").read_text()).items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(configuration))
        if name in run:
            make_up(snapshot, configuration)


def make_up(folder: Path, configuration: dict[str, Any]) -> None:
    """Weights by chance, and a tokenizer that knows as many words as there are."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2TokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(**configuration)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(configuration))
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, *(f"<{number}>" for number in range(len(letters), configuration["vocab_size"]))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    end = dict.fromkeys(("eos_token", "pad_token", "unk_token"), words[-1])
    Qwen2TokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)


def run(file: str, tests: Path, attention: str, asked: argparse.Namespace, work: Path) -> list[Outcome]:
    """One file in a process of its own, or several where it has many tests; what was done when time was over counts."""
    outcomes, log = (work / f"{Path(file).stem}.{kind}" for kind in ("jsonl", "txt"))
    environment = os.environ | {
        "TAUT_ATTENTION": attention,
        "CONFORMANCE_OUTCOMES": str(outcomes),
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conformance.plugin", "-p", "no:cacheprovider"]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(tests),
        "--tb=short",
        file,
        *(["-k", asked.only] if asked.only else []),
    ]
    command += ["-n", str(asked.workers)] if asked.workers and file in MANY else []
    with log.open("w") as sink:
        try:
            status = subprocess.run(
                command, cwd=tests, env=environment, stdout=sink, stderr=sink, timeout=asked.seconds, check=False
            ).returncode
            said = f"pytest ended with status {status}"
        except subprocess.TimeoutExpired:
            status, said = -1, f"cut off after {asked.seconds:.0f} s"
    found = [Outcome(**json.loads(line)) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    if status not in (0, 1, 5):  # 1: tests failed, which they have said; 5: none was selected
        found.append(Outcome(f"{file}::", "failed", f"{said}: {log.read_text()[-3000:]}", 0, asked.seconds))
    return list({outcome.test: outcome for outcome in found}.values())  # each worker says what cannot be collected


def show(outcomes: list[Outcome], title: str) -> None:
    """The table by file, then every reason against a test, with how many it stopped."""
    table = Table("file", "passed", "failed", "skipped", "through ours", "seconds", title=title)
    for file in dict.fromkeys(outcome.file for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.file == file]
        counts = Counter(outcome.outcome for outcome in mine)
        through = sum(outcome.calls > 0 for outcome in mine)
        seconds = sum(outcome.seconds for outcome in mine)
        cells = [counts["passed"], counts["failed"], counts["skipped"], through, round(seconds)]
        table.add_row(file.removeprefix("tests/"), *map(str, cells))
    rich.print(table)
    for kind in ("skipped", "failed"):
        reasons = Counter(
            (o.file, o.why.partition("\n")[0][:200], o.excuse or "not listed") for o in outcomes if o.outcome == kind
        )
        for (file, why, excuse), count in reasons.most_common():
            rich.print(f"{kind} {count} x {Path(file).name}: {rich.markup.escape(why)} ({rich.markup.escape(excuse)})")


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="vLLM's own backends")
    parser.add_argument("--file", default="", help="only files whose name contains this")
    parser.add_argument("--only", default="", help="pytest's -k")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit of one file")
    parser.add_argument("--workers", type=int, default=0, help="processes side by side (two files need pytest-xdist)")
    parser.add_argument("--report", type=Path, help="where to write every outcome, as JSON")
    return parser.parse_args(given)


def main() -> int:
    asked = arguments()
    release, attention = installed_release(), "off" if asked.stock else "on"
    tests = tests_of(release)
    files = [file for file in FILES if asked.file in file and (tests / file).exists()]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_models(work / "hub", {RUN[file] for file in files if file in RUN})
        for together in side_by_side(files, asked.workers):
            rich.print(f"{', '.join(together)} ...")
            with ThreadPoolExecutor(max(1, asked.workers)) as pool:
                waiting = [pool.submit(run, file, tests, attention, asked, work) for file in together]
            for file, done in zip(together, waiting, strict=True):
                outcomes += done.result()
                counts = Counter(outcome.outcome for outcome in done.result())
                rich.print(f"  {Path(file).name}: " + ", ".join(f"{number} {kind}" for kind, number in counts.items()))
            if asked.report:  # whatever ends this run, what was done is kept
                asked.report.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    show(outcomes, f"vLLM {release}, its own tests, {'stock' if asked.stock else 'TAUT_ATTENTION=on'}")
    return int(any(outcome.is_wrong for outcome in outcomes) or not outcomes)


def side_by_side(files: list[str], workers: int) -> list[list[str]]:
    """The files that run together: all but those of many tests, which are shared out, and those that fill the GPU."""
    if not workers:
        return [[file] for file in files]
    together = [file for file in files if file not in MANY and file not in RUN]
    alone = [[file] for file in files if file not in together]
    return [*alone, together] if together else alone


if __name__ == "__main__":
    sys.exit(main())
