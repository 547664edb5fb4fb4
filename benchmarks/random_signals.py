"""Stop every verb at random moments by SIGTERM and SIGINT; called by `fault_harness.py --signals N`.

Half of the signals come from outside. The other half are sent while Python runs a `__del__`, which drops the exception that the
handler raises there: a timer creates and drops such an object at a random moment after the start. A signal passes if the
process ends with 128 + its number within the time limit, the same command then ends with 0, and its result is equal to that of
an undisturbed run. Signals that arrive when the process is about to end by itself are sent again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BOUND_S = 30.0  # from the signal to the end; includes one step, image batch or loading of this harness
ENDING_S = 2.0  # a process that ends with 0 so soon after a signal was ending anyway
PATIENCE_S = 300.0
SERVER = multiprocessing.get_context("forkserver")
CLOCKED = {"seconds", "waiting"}
TRAINING = "steps=12 batch_size=8 learning_rate=1e-3 ema_decay=0.9 log_every_steps=1 checkpoint_every_steps=4"
PRELOADED = ["tinyfusion.options", "accelerate", "diffusers", "peft", "sklearn.datasets", "torch._dynamo"]
PRELOADED += [
    f"tinyfusion.commands.{name}" for name in ("prune", "recover", "dynamic", "train", "sample", "evaluate", "encode")
]


def sets(section: str) -> str:
    return " ".join(f"--set {section}.{setting}" for setting in TRAINING.split())


FEWER = "--set dynamic.calibration_images=0 --set dynamic.finish_steps=2"
SMALL = "--set model.family=dit --set model.hidden_size=32 --set model.depth=2 --set model.num_heads=2"
# verb -> command; OUT is what it leaves, and those below read what others left undisturbed
COMMANDS = {
    "train": f"train {SMALL} {sets('train')} --out OUT",
    "prune": f"prune --teacher digits --scheme 1:2 {sets('prune.training')} --out OUT",
    "recover": f"recover --teacher digits --student prune {sets('recover.training')} --out OUT",
    "dynamic": f"dynamic --model digits --target 0.6 {FEWER} {sets('dynamic.training')} --out OUT",
    "sample": "sample --model digits --num-images 24 --batch-size 8 --sampler ddim --num-steps 10 --out OUT.npz --png OUT-png",
    "evaluate": "evaluate --samples sample.npz --reference digits --out OUT.json",
    "encode": "encode --data pictures --vae vae --size 16 --batch-size 4 --set encode.shard_images=8 --out OUT",
    "export": "export --model digits --to diffusers --out OUT",
    "report": "report prune recover --out OUT.html",
    "inspect": "inspect digits --json",
    "bench": "bench digits --vs prune --batch-size 4 --repeats 3 --set bench.product_size=256",
    "replay": "replay train --step 3 --json",
}


@dataclass
class Stop:
    """One signal. after_s: from the start of the process; took_s: from the signal to the end."""

    verb: str
    signal: signal.Signals
    inside: bool
    after_s: float
    took_s: float = 0.0
    code: int = 0
    faults: list[str] = field(default_factory=list)


def material(folder: Path) -> None:
    """Pictures and an autoencoder for `encode`."""
    import torch
    from diffusers import AutoencoderKL

    for index in range(40):
        path = folder / "pictures" / f"class-{index % 4}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4
    ).save_pretrained(folder / "vae")


def arguments(verb: str, out: str) -> list[str]:
    return [part.replace("OUT", out) for part in shlex.split(COMMANDS[verb])]


class Dying:
    """Sends a signal to its process in `__del__`, after logging that."""

    def __init__(self, note: Path, signum: int) -> None:
        self.note, self.signum = note, signum

    def __del__(self) -> None:
        self.note.write_text("sent", encoding="ascii")
        os.kill(os.getpid(), self.signum)


def sit(folder: Path, verb: str, out: str, stop: Stop | None) -> None:
    """Run the verb in this process, with a signal in a `__del__` if `stop` wants one."""
    import torch

    from tinyfusion.cli import main

    os.chdir(folder)
    torch.set_num_threads(1)
    for number, kind, mode in ((1, "out", os.O_TRUNC), (2, "err", os.O_APPEND)):
        os.dup2(os.open(f"{out}.{kind}", os.O_WRONLY | os.O_CREAT | mode), number)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    if stop is not None:
        signal.signal(signal.SIGALRM, lambda *_: Dying(Path(f"{out}.sent"), stop.signal) and None)
        signal.setitimer(signal.ITIMER_REAL, stop.after_s)
    sys.exit(main(arguments(verb, out)))


def started(folder: Path, verb: str, out: str, stop: Stop | None = None) -> ForkServerProcess:
    """A process of a verb, forked from one that has imported everything."""
    process = SERVER.Process(target=sit, args=(folder, verb, out, stop))
    process.start()
    return process


def ended(process: ForkServerProcess, within_s: float) -> int | None:
    """The exit code as a shell reports it; None while the process runs."""
    process.join(within_s)
    code = process.exitcode
    return 128 - code if code is not None and code < 0 else code


def left_by(folder: Path, verb: str, out: str) -> dict[str, Any]:
    """Results that must not depend on signals: tensors, images, logged numbers, scores, and output without times."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.glob(f"{out}*") if p.name.partition(".")[0] in (out, f"{out}-png")):
        for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
            name = str(file.relative_to(folder)).replace(out, "OUT", 1)
            if file.suffix in (".safetensors", ".npz", ".png") and "checkpoints" not in file.parts:
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            elif file.name == "metrics.jsonl":
                lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                found[name] = [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]
            elif file.suffix == ".html":
                found[name] = "a page"
    if verb == "evaluate":
        scores = json.loads((folder / f"{out}.json").read_text(encoding="utf-8"))
        found["scores"] = {name: scores[name] for name in ("fid", "inception_score", "precision", "recall", "protocol")}
    if verb in ("inspect", "replay"):
        found["answer"] = (folder / f"{out}.out").read_text(encoding="utf-8")
    return found


def stopped(folder: Path, stop: Stop, out: str) -> bool:
    """Start a process and send the signal; False if it had ended, or was about to."""
    began = time.monotonic()
    process = started(folder, stop.verb, out, stop if stop.inside else None)
    while process.is_alive() and not (
        (folder / f"{out}.sent").exists() if stop.inside else time.monotonic() - began > stop.after_s
    ):
        time.sleep(0.002)
    if not stop.inside and process.is_alive() and process.pid is not None:
        os.kill(process.pid, stop.signal)
    sent = time.monotonic()
    code = ended(process, BOUND_S)
    stop.took_s = time.monotonic() - sent
    if code is None:
        process.kill()
        stop.faults.append(f"went on for {BOUND_S:g} s")
    stop.code = code or 0
    if code == 0 and stop.took_s < ENDING_S:
        return False
    if not stop.faults and stop.code != 128 + stop.signal:
        stop.faults.append(f"exit code {stop.code}")
    said = folder / f"{out}.err"  # not there where it was stopped at once
    if said.exists() and "Traceback" in said.read_text(encoding="utf-8", errors="replace"):
        stop.faults.append("a traceback")
    return True


def random_signals(folder: Path, num: int, chance: random.Random) -> list[Stop]:
    """Send `num` signals to all verbs in turn, and print each outcome."""
    material(folder)
    SERVER.set_forkserver_preload(PRELOADED)
    ended(started(folder, "inspect", "first"), PATIENCE_S)  # the server imports before it forks
    seconds, wanted = {}, {}
    for verb in COMMANDS:
        began = time.monotonic()
        if ended(started(folder, verb, verb), PATIENCE_S):
            raise RuntimeError(f"{verb} ended badly:\n{(folder / f'{verb}.err').read_text(encoding='utf-8')}")
        seconds[verb], wanted[verb] = time.monotonic() - began, left_by(folder, verb, verb)
        print(f"{verb}: {seconds[verb]:.1f} s undisturbed", flush=True)
    stops: list[Stop] = []
    attempt = 0
    while len(stops) < num:
        verb = list(COMMANDS)[len(stops) % len(COMMANDS)]
        attempt += 1
        out, signum = f"{verb}x{attempt}", chance.choice((signal.SIGTERM, signal.SIGINT))
        stop = Stop(verb, signum, chance.random() < 0.5, chance.uniform(0.05, 0.9 * seconds[verb]))
        if not stopped(folder, stop, out):
            continue
        if ended(started(folder, verb, out), PATIENCE_S):
            stop.faults.append("the same command did not continue")
        else:
            left = left_by(folder, verb, out)
            stop.faults += [f"{name} differs" for name in wanted[verb] if left.get(name) != wanted[verb][name]]
        unfinished = [p.name for p in folder.rglob("*") if p.suffix in (".part", ".old", ".parts")]
        stop.faults += [f"left {', '.join(unfinished)}"] if unfinished else []
        stops.append(stop)
        where = "in a __del__" if stop.inside else "from outside"
        print(f"{verb}: {signum.name} {where} after {stop.after_s:.1f} s, ended {stop.took_s:.2f} s later with {stop.code}: "
              f"{'; '.join(stop.faults) or 'obeyed'}", flush=True)  # fmt: skip
    return stops


def summary(stops: list[Stop]) -> str:
    """One line about all signals."""
    inside = sum(stop.inside for stop in stops)
    obeyed = sum(not stop.faults for stop in stops)
    verbs, longest_s = len({stop.verb for stop in stops}), max(stop.took_s for stop in stops)
    return (
        f"{obeyed} of {len(stops)} signals at random moments of {verbs} verbs were obeyed, {inside} of them sent in a `__del__`: "
        f"the process ended with 128 + the signal's number, {longest_s:.1f} s later at most, and the same command ended equal to "
        "an undisturbed one"
    )
