"""Bad input, one row each: exit code 2, one line that says what to do, and not a byte changed anywhere."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from material import Cli

Prepare = Callable[[Cli, pytest.MonkeyPatch], None]
PRUNE = "prune --teacher teacher --out run"
INDICES = f"{PRUNE} --criterion indices"
RECOVER = "recover --teacher teacher --student student --steps 2 --set recover.training.ema_decay=0 --out run"
SAMPLE = "sample --model teacher --num-images 4 --num-steps 2 --out made/samples.npz"
RUN = "run --recipe good.toml --out run --set recover.training.steps=2 --set recover.training.ema_decay=0"
SIT = "sample --model sit --num-images 4 --out made/samples.npz"
MAR = "sample --model mar --num-images 4 --out made/samples.npz"
DYNAMIC = "dynamic --model teacher --set dynamic.training.steps=4 --set dynamic.finish_steps=1 --out run"
EVALUATE = "evaluate --reference digits --out made/evaluation.json"


@dataclass(frozen=True)
class Row:
    """A cause. arguments: the command. message: parts of the line on stderr. prepare: what must be so before."""

    id: str
    arguments: str
    message: tuple[str, ...]
    prepare: Prepare | None = None


def row(id: str, arguments: str, *message: str, prepare: Prepare | None = None) -> Row:
    return Row(id, arguments, message, prepare)


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def no_space(_cli: Cli, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _path: _Usage(2**30, 2**30, 0))


def full_disk(_cli: Cli, patch: pytest.MonkeyPatch) -> None:
    """Room was promised, but a file cannot be finished."""

    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def read_only(_cli: Cli, patch: pytest.MonkeyPatch) -> None:
    """What a folder without write permission answers (to anyone but root, who may always)."""
    patch.setattr(os, "access", lambda _path, mode, **_: not mode & os.W_OK)


def exhausted(_cli: Cli, patch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any) -> None:
        raise MemoryError("could not allocate 1 TiB")

    patch.setattr("tinyfusion.jobs.sampling_setup.draw_samples", draw)


def ran(command: str) -> Prepare:
    """The command was run before, and went well."""

    def prepare(cli: Cli, _patch: pytest.MonkeyPatch) -> None:
        assert cli(*shlex.split(command)).code == 0

    return prepare


ROWS = [
    # ------------------------------------------------------------------------------------------------ what was typed
    row("no-verb", "", "wants a verb", "prune, recover"),
    row("unknown-verb", "prun --out run", "unknown verb 'prun'", "did you mean 'prune'"),
    row("unknown-option", "prune --shceme 1:2 --out run", "no option --shceme", "did you mean '--scheme'"),
    row("option-without-value", "prune --teacher teacher --out", "--out wants a value: --out PATH; see"),
    row("option-before-option", "prune --teacher --out run", "--teacher wants a value: --teacher MODEL; see"),
    row("flag-with-value", f"{PRUNE} --compile=true", "--compile takes no value; see"),
    row("stray-word", f"{PRUNE} please", "prune does not take 'please'; see `tinyfusion prune --help`"),
    row("stray-letter", "report run -x --out page.html", "report does not take '-x'"),
    row("second-model", "inspect teacher student", "inspect does not take 'student'"),
    row("missing-out", "prune --teacher teacher", "prune needs --out"),
    row("missing-student", "recover --teacher teacher --out run", "recover needs --student"),
    row("missing-report-runs", "report --out page.html", "report needs RUNS"),
    row("value-no-number", f"{PRUNE} --steps many", "--steps wants a whole number; got 'many'"),
    row("value-unknown-choice", f"{PRUNE} --criterion guess", "--criterion is one of", "learned", "got 'guess'"),
    row("weights-unknown", f"{PRUNE} --weights best", "--weights is one of ema, raw; got 'best'"),
    row("seed-negative", f"{PRUNE} --seed -1", "seed must be at least 0", "got -1"),
    row("steps-zero", f"{PRUNE} --steps 0", "prune.training.steps must be at least 1; got 0"),
    row("device-unknown", f"{PRUNE} --device tpu", "device 'tpu' is not available", "use auto, cpu"),
    row("device-without-numbers", f"{PRUNE} --device meta", "device 'meta' cannot run models"),
    # -------------------------------------------------------------------------------------------------------- recipes
    row("recipe-unknown", "run --recipe digit --out run", "unknown recipe 'digit'", "did you mean 'digits'"),
    row("recipe-file-missing", "run --recipe mine.toml --out run", "mine.toml does not exist"),
    row("recipe-no-toml", "run --recipe broken.toml --out run", "broken.toml is not valid TOML", "line 1"),
    row("recipe-field-unknown", "run --recipe typo.toml --out run", "unknown field 'prune.shceme'", "'prune.scheme'"),
    row("recipe-field-kind", "run --recipe kind.toml --out run", "prune.scheme wants a text; got [1, 2]"),
    row("set-field-unknown", f"{PRUNE} --set prune.training.stpes=3", "unknown field 'prune.training.stpes'", "'prune.training.steps'"),
    row("set-field-elsewhere", f"{PRUNE} --set prune.step=3", "unknown field 'prune.step'", "'prune.training.steps'"),
    row("keep-and-learned", f"{PRUNE} --keep 0,1 --criterion learned", "--keep names the blocks to keep"),
    row("for-unknown", f"{PRUNE} --for comfy", "--for is one of diffusers, official; got 'comfy'"),
    row("for-no-class", "prune --teacher sit --keep 0 --for diffusers --out run", "cannot be made for diffusers: it is a SiT"),
    row("prune-without-teacher", "prune --scheme 1:2 --out run", "prune needs --teacher"),
    row("recover-without-teacher", "recover --student student --out run", "recover needs --teacher"),
    row("logits-kd-without-teacher", "recover --student student --method logits-kd --out run", "recover needs --teacher"),
    row("method-unknown", f"{RECOVER} --method kd", "--method is one of", "finetune, logits-kd, masked-kd, rep-kd", "got 'kd'"),
    row("set-field-renamed", f"{PRUNE} --set prune.training.learning_rate_end=0", "did you mean 'prune.training.learning_rate_end_share'"),
    row("set-section-unknown", f"{PRUNE} --set prun.scheme=1:2", "unknown field 'prun'", "did you mean 'prune'"),
    row("set-no-assignment", f"{PRUNE} --set prune.scheme", "--set wants section.field=value"),
    row("set-section-as-value", f"{PRUNE} --set prune=3", "prune is a section"),
    row("set-not-finite", f"{PRUNE} --set prune.training.learning_rate=inf", "learning_rate wants a finite number"),
    row("set-out-of-range", f"{PRUNE} --set prune.training.ema_decay=1.5", "ema_decay must be at least 0 and below 1"),
    row("set-pair-of-three", f"{PRUNE} --set prune.temperature=[4,2,1]", "prune.temperature wants 2 values"),
    # ---------------------------------------------------------------------------------------------- schemes, kept blocks
    row("scheme-misfit", f"{PRUNE} --scheme 1:3", "needs a depth divisible by 3; the model has 4 blocks", "try 1:2"),
    row("scheme-short", f"{PRUNE} --scheme 1:2x1", "covers 2 blocks; the model has 4"),
    row("scheme-spelling", f"{PRUNE} --scheme half", "scheme 'half' is not N:M", "such as 1:2"),
    row("scheme-keeps-too-many", f"{PRUNE} --scheme 3:2", "3:2 must keep at least 1 and at most 2 of 2 blocks"),
    row("scheme-keeps-none", f"{PRUNE} --scheme 0:2", "0:2 must keep at least 1"),
    row("keep-out-of-range", f"{INDICES} --keep 0,4", "--keep [4] out of range", "0 to 3"),
    row("keep-negative", f"{INDICES} --keep=-1,2", "prune.keep must be at least 0; got -1"),
    row("lora-alpha-negative", f"{PRUNE} --set prune.lora_alpha=-1", "prune.lora_alpha must be above 0; got -1.0"),
    row("keep-twice", f"{INDICES} --keep 0,2,2", "[2] named twice"),
    row("keep-empty", f"{INDICES}", "wants the blocks to keep: --keep 0,2,4"),
    row("keep-no-numbers", f"{INDICES} --keep first,last", "--keep wants whole numbers", "'first,last'"),
    # -------------------------------------------------------------------------------------------- criteria without training
    *(
        row(f"score-pairs-{batch}-in-{parts}", f"{PRUNE} --scheme 2:4 --set prune.distribution=subset --set prune.subset_estimator=score "
            f"--set prune.training.batch_size={batch} --set compute.gradient_accumulation_steps={parts}",
            f"a batch of {batch} in {parts} microbatches", f"set prune.training.batch_size to {sizes}, or")
        for batch, parts, sizes in ((7, 2, "4 or 8"), (7, 4, "8"), (6, 4, "8"))
    ),
    row("keep-and-criterion", f"{PRUNE} --criterion bi --keep 0,1", "leaving no choice", "leave out --criterion bi"),
    row("keep-and-num-keep", f"{PRUNE} --keep 0,1 --num-keep 2", "--keep names the blocks to keep, and so how many"),
    row("scheme-and-criterion", f"{PRUNE} --criterion bi --scheme 1:2", "--scheme is for criterion learned, not bi"),
    row("num-keep-and-learned", f"{PRUNE} --num-keep 2", "prune.num_keep 2 is for criteria without groups", "--scheme"),
    row("num-keep-zero", f"{PRUNE} --criterion bi --num-keep 0", "prune.num_keep must be at least 1; got 0"),
    row("num-keep-too-many", f"{PRUNE} --criterion random --num-keep 5", "list blocks has 4 blocks, so 1 to 4 of them can stay"),
    row("protect-out-of-range", f"{PRUNE} --criterion bi --protect 4", "--protect [4] out of range", "0 to 3"),
    row("protect-no-numbers", f"{PRUNE} --criterion bi --protect first", "--protect wants whole numbers", "'first'"),
    row("protect-too-many", f"{PRUNE} --criterion last --num-keep 1 --protect 0,1", "of which only 1 stay", "--num-keep 2"),
    row("protect-and-keep", f"{PRUNE} --keep 0,1 --protect 3", "leaves out the protected blocks [3]"),
    row("bk-sdm-number", f"{PRUNE} --criterion bk-sdm --num-keep 1", "rule keeps 2 of the 4 blocks", "leave out --num-keep"),
    row("bk-sdm-old-list", f"{PRUNE} --criterion bk-sdm --set prune.bk_sdm_list=old", "is a list for 28 blocks, and here are 4"),
    row("calibration-data", f"{PRUNE} --criterion bi --data nowhere", "unknown data set 'nowhere'"),
    row("calibration-none", f"{PRUNE} --criterion bi --set prune.calibration_images=0", "calibration_images must be at least 1"),
    # ---------------------------------------------------------------------------------------------------------- models
    row("model-missing", "inspect techer", "no model at techer"),
    row("model-folder-empty", "inspect no-pictures", "no-pictures holds no model", "model.json"),
    row("model-truncated", "inspect truncated.pt", "truncated.pt is not a model file, or it is truncated"),
    row("model-truncated-safetensors", "inspect truncated.safetensors", "no readable safetensors file", "truncated"),
    row("model-empty-file", "inspect empty.pt", "empty.pt is not a model file, or it is truncated"),
    row("model-is-text", "inspect text.pt", "text.pt is not a model file, or it is truncated"),
    row("model-is-picture", "inspect picture.pt", "picture.pt is not a model file, or it is truncated"),
    row("model-is-zip", "inspect archive.pt", "archive.pt is not a model file, or it is truncated"),
    row("model-is-list", "inspect list.pt", "list.pt holds a list, not a state dict"),
    row("model-without-tensors", "inspect number.pt", "number.pt is no state dict of tensors", "'step'"),
    row("model-malicious", "inspect malicious.pt --num-heads 2", "malicious.pt holds code", "(posix.system), which are never run"),
    row("model-malicious-bare", "inspect malicious-bare.pt --num-heads 2", "malicious-bare.pt is not a model file"),
    row("model-block-gap", "inspect gap.pt --num-heads 2", "block numbers have gaps: [1] missing"),
    row("model-tensors-missing", "inspect missing.pt --num-heads 2", "missing", "x_embedder.proj.bias"),
    row("model-tensor-unexpected", "inspect unexpected.pt --num-heads 2", "unexpected blocks.0.attn.extra"),
    row("model-width", "inspect width.pt --num-heads 2", "blocks.3.mlp.fc1.weight is (64, 16), wanted (128, 32)"),
    row("model-nan", "inspect nan.pt --num-heads 2", "blocks.0.mlp.fc1.bias is not finite"),
    row("model-heads-unknown", "inspect good.pt", "--num-heads"),
    row("model-heads-misfit", "inspect good.pt --num-heads 5", "32", "num_heads 5"),
    row("model-heads-contradict", "inspect teacher --num-heads 4", "teacher has 2 heads; --num-heads 4 contradicts it"),
    row("model-family-unknown", "inspect good.pt --num-heads 2 --family dti", "'dti'", "did you mean 'dit'"),
    row("folder-newer", "inspect newer", "format_version 99", "upgrade"),
    row("folder-family-unknown", "inspect other-family", "family 'ditt'", "did you mean 'dit'"),
    row("folder-json-torn", "inspect torn-json", "model.json is damaged: not valid JSON"),
    row("folder-without-tensors", "inspect no-tensors", "model.safetensors does not exist"),
    row("folder-hash", "inspect changed", "changed is damaged: its tensors do not give the hash"),
    row("folder-depth", "inspect wrong-depth", "unexpected blocks.3."),
    row("folder-sizes", "inspect odd-sizes", "odd-sizes/model.json is damaged", "num_heads 5"),
    # --------------------------------------------------------------------------------------------- teacher and student
    row("student-without-plan", f"{RECOVER} --student teacher".replace("--student student ", ""), "carries no plan", "--method finetune"),
    row("student-of-another", RECOVER.replace(" teacher", " other-teacher"), "give the teacher", "shares an ancestor"),
    row("teacher-other-depth", RECOVER.replace("--teacher teacher", "--teacher deeper"), "was pruned from the model"),
    row("teacher-missing", RECOVER.replace("--teacher teacher", "--teacher gone"), "no model at gone"),
    # ------------------------------------------------------------------------------------------------------------ data
    row("data-unknown", f"{PRUNE} --data digts", "unknown data set 'digts'", "digits"),
    row("data-missing", f"{PRUNE} --data gone.npz", "no images at gone.npz"),
    row("data-nan", f"{PRUNE} --data nan.npz", "nan.npz", "1 values that are not finite"),
    row("data-image-size", f"{PRUNE} --data large.npz", "(1, 16, 16), the model takes (1, 8, 8)"),
    row("data-image-size-of-model", "prune --teacher smaller-images --data digits --out run", "the model takes (1, 4, 4)"),
    row("data-classes", f"{PRUNE} --data many-classes.npz", "40 classes, the model knows 10"),
    row("data-classes-of-model", "prune --teacher five-classes --data digits --out run", "10 classes, the model knows 5"),
    row("data-unlabelled", f"{PRUNE} --data unlabelled.npz", "unlabelled.npz has no labels", "arr_1"),
    row("data-label-negative", f"{PRUNE} --data negative.npz", "the smallest is -1"),
    row("data-code", f"{PRUNE} --data pickled.npz", "pickled.npz cannot be read as an npz of plain arrays"),
    # -------------------------------------------------------------------------------------------------------- sampling
    row("labels-out-of-range", f"{SAMPLE} --labels 3,10", "--labels [10] out of range", "0 to 9"),
    row("labels-no-numbers", f"{SAMPLE} --labels cat", "--labels wants whole numbers", "'cat'"),
    row("num-steps-ddim", f"{SAMPLE} --sampler ddim --num-steps 300", "--num-steps 300 with --sampler ddim", "nearest", "250", "334"),
    row("num-steps-ddpm", f"{SAMPLE} --num-steps 1001", "--num-steps 1001 with --sampler ddpm", "1000"),
    row("guidance-below-one", f"{SAMPLE} --guidance 0.5", "sample.guidance must be at least 1; got 0.5"),
    row("num-images-zero", f"{SAMPLE} --num-images 0", "num_images must be at least 1; got 0"),
    row("samples-suffix", SAMPLE.replace(".npz", ".zip"), "--out of sample is an .npz file"),
    row("grid-suffix", f"{SAMPLE} --grid grid.jpg", "--grid is a .png file"),
    row("out-of-memory", SAMPLE, "out of memory: use a smaller batch", prepare=exhausted),
    row("run-few-images", f"{RUN} --set sample.num_images=3", "sample.num_images=3 has 3 images", "need at least 4"),
    row("run-few-references", f"{RUN} --set evaluate.references=few.npz", "reference few.npz has 2 images", "need at least 4"),
    row("run-image-size", f"{RUN} --set evaluate.references=large.npz", "large.npz"),
    row("run-data-of-recovery", f"{RUN} --set prune.criterion=indices --set prune.keep=[0,2] --set data.name=gone.npz",
        "no images at gone.npz"),
    # -------------------------------------------------------------------------------------- other families and processes
    row("dit-sampler", f"{SAMPLE} --sampler ode", "--sampler ode", "ddpm"),
    row("sit-sampler", f"{SIT} --sampler ddim", "--sampler ddim is not for models of family sit: they take ode, sde"),
    row("sit-steps", f"{SIT} --num-steps 5", "--num-steps 5 with sample.flow.method dopri5, which chooses its steps itself"),
    row("sit-method", f"{SIT} --set sample.flow.method=rk5", "unknown method 'rk5' of ode; there is euler"),
    row("sit-sde-method", f"{SIT} --sampler sde --set sample.flow.method=rk4", "'rk4' is not for sde: it takes euler, heun"),
    row("sit-one-point", f"{SIT} --num-steps 1 --set sample.flow.method=euler", "2 points in time at least", "got 1"),
    row("sit-tolerance", f"{SIT} --set sample.flow.atol=0", "sample.flow.atol must be above 0; got 0"),
    row("sit-clip", f"{SIT} --set sample.clip=true", "sample.clip is not for models of family sit"),
    row("sit-last-step", f"{SIT} --sampler sde --set sample.flow.last_step_size=0.9", "last_step_size must be above 0 and below 0.5"),
    row("sit-path", "train --data digits --set model.family=sit --set flow.path=cubic --out run", "flow.path", "'cubic'"),
    row("sit-times", "train --data digits --set model.family=sit --set flow.train_eps=0.6 --out run", "flow", "0.6"),
    row("sit-export", "export --model sit --to diffusers --out d", "sit cannot be exported to diffusers"),
    row("mar-sampler", f"{MAR} --sampler ddpm", "--sampler ddpm is not for models of family mar: they take masked alone"),
    row("mar-rounds", f"{MAR} --num-steps 17", "--num-steps 17: 16 tokens can be revealed in 1 to 16 rounds"),
    row("mar-no-rounds", f"{MAR} --num-steps 0", "num_steps"),
    row("mar-eta", f"{MAR} --set sample.eta=0.5", "sample.eta is not for sampler masked: it is for ddim"),
    row("mar-interval", f"{MAR} --set sample.guidance_interval=0.1,0.8", "guidance_interval is not for sampler masked"),
    row("mar-temperature", f"{MAR} --set sample.masked.temperature=-1", "sample.masked.temperature must be above 0; got -1"),
    row("mar-ratio", "train --data digits --set model.family=mar --set masked.mask_ratio_min=1 --out run",
        "mask_ratio_min must be at least 0 and below 1"),
    row("mar-clean", "prune --teacher mar --criterion bi --set prune.bi_inputs=clean --out run", "masked model"),
    row("mar-width", "prune --teacher mar --criterion width --out run", "mar", "width"),
    row("mar-export", "export --model mar --to diffusers --out d", "mar cannot be exported to diffusers"),
    row("foreign-size", "train --data digits --set model.family=dit --set model.sizes.x=4 --out run", "family dit has no x: leave it out"),
    row("no-family", "train --data digits --out run", "a new model needs a family: --set model.family=NAME, one of dit, sit"),
    row("family", "train --data digits --set model.family=dits --out run", "unknown family 'dits'", "did you mean 'dit'"),
    row("pixart-weights", "bench pixart", "pixart does not hold this pixart: missing net."),
    row("pixart-files", "inspect pixart", "pixart holds no tensors of blocks transformer_blocks"),
    row("prompts-classes", "sample --model digits --prompts no.safetensors --out x.npz", "prompts are for models of texts", "leave it out"),
    row("pixart-1024", "bench pixart-1024", "pixart-1024 has use_additional_conditions True"),
    row("pixart-file", "inspect pixart.pth", "the published state dict has no prompts", "give the folder of diffusers"),
    row("hub-name", f"{PRUNE} --data hub:imagenet", "'imagenet' is no data set of the hub: wanted ORG/NAME"),
    row("data-before-teacher", "prune --teacher dit-xl-2-256 --data gone.npz --out run", "no images at gone.npz: no such file"),
    row("teacher-family", f"{PRUNE} --set teacher_family=sit", "teacher is of family dit, not sit"),
    row("teacher-family-unknown", "prune --teacher good.pt --num-heads 2 --set teacher_family=sut --out run", "'sut'", "'sit'"),
    row("other-family", RECOVER.replace("--teacher teacher", "--teacher sit"), "is of family dit and the teacher sit of sit"),
    row("run-of-a-dynamic-recipe", "run --recipe digits-dynamic --out run", "is for the verb `dynamic`", "--model digits"),
    row("dynamic-family", DYNAMIC.replace("teacher", "mar"), "mar"),
    row("dynamic-target", f"{DYNAMIC} --target 0", "target", "got 0"),
    row("dynamic-nothing", f"{DYNAMIC} --set dynamic.width=false --set dynamic.tokens=false", "nothing would be decided"),
    row("dynamic-finish", f"{DYNAMIC} --set dynamic.finish_steps=4", "dynamic.finish_steps 4 are the last of 4 steps"),
    # ---------------------------------------------------------------------------------------------- evaluation and page
    row("samples-missing", f"{EVALUATE} --samples gone.npz", "no images at gone.npz"),
    row("samples-torn", f"{EVALUATE} --samples torn.npz", "torn.npz"),
    row("samples-foreign", f"{EVALUATE} --samples text.npz", "text.npz is not an npz"),
    row("samples-empty", f"{EVALUATE} --samples nothing.npz", "at least one image"),
    row("samples-few", f"{EVALUATE} --samples few.npz", "few.npz has 2 images"),
    row("samples-unnamed", f"{EVALUATE} --samples named.npz", "wanted images in arr_0"),
    row("samples-pickled", f"{EVALUATE} --samples pickled.npz", "pickled.npz cannot be read as an npz of plain arrays"),
    row("samples-folder-empty", f"{EVALUATE} --samples no-pictures", "no-pictures holds no pictures"),
    row("samples-size", f"{EVALUATE} --samples large.npz", "large.npz"),
    row("reference-unknown", f"{EVALUATE} --samples images.npz --reference imagenet", "imagenet", "digits"),
    row("report-no-run", "report thesis --out page.html", "thesis"),
    row("report-missing-run", "report gone --out page.html", "gone"),
    # ---------------------------------------------------------------------------------------------------------- outputs
    row("out-foreign-folder", PRUNE.replace("--out run", "--out thesis"), "thesis exists and is not a tinyfusion run"),
    row("out-foreign-overwrite", PRUNE.replace("--out run", "--out thesis --overwrite"), "is not a tinyfusion run"),
    row("out-is-file", PRUNE.replace("--out run", "--out notes.txt"), "notes.txt is a file; this verb writes a folder"),
    row("out-below-file", PRUNE.replace("--out run", "--out notes.txt/run"), "notes.txt is a file"),
    row("out-foreign-file", EVALUATE.replace("made/evaluation", "notes") + " --samples images.npz", "was not made by tinyfusion"),
    row("out-foreign-npz", SAMPLE.replace("made/samples", "images"), "images.npz exists and was not made by tinyfusion"),
    row("out-foreign-record", SAMPLE.replace("made/samples", "notes"), "notes.json exists and was not made by tinyfusion"),
    row("out-foreign-grid", f"{SAMPLE} --grid photo.png", "photo.png exists and does not belong to"),
    row("out-foreign-page", "report run --out notes.html", "notes.html exists and was not made by tinyfusion",
        prepare=ran(f"{INDICES} --keep 0,2")),
    row("report-folder-of-a-model", "report teacher --out page.html", "teacher is not a run folder"),
    row("out-is-folder", SAMPLE.replace("made/samples", "a"), "a.npz is a folder", prepare=lambda *_: Path("a.npz").mkdir()),
    row("out-other-recipe", f"{INDICES} --keep 1,3", "made with another recipe (prune.keep: [0, 2] there, [1, 3] now)",
        prepare=ran(f"{INDICES} --keep 0,2")),
    row("out-other-teacher", f"{INDICES} --keep 0,2".replace("--teacher teacher", "--teacher other-teacher"), "another recipe (teacher:",
        prepare=ran(f"{INDICES} --keep 0,2")),
    row("out-other-verb", RECOVER, "run was made by `prune`, not `recover`", prepare=ran(f"{INDICES} --keep 0,2")),
    row("out-other-samples", f"{SAMPLE} --seed 7", "another recipe (seed: 0 there, 7 now)", prepare=ran(SAMPLE)),
    row("out-read-only", PRUNE, "read-only for you", prepare=read_only),
    row("out-read-only-file", SAMPLE, "read-only for you", prepare=read_only),
    row("disk-small-prune", PRUNE, "no space: run needs about", prepare=no_space),
    row("disk-small-recover", RECOVER, "no space: run needs about", prepare=no_space),
    row("disk-small-train", "train --data digits --set model.family=dit --out run", "no space: run needs about", prepare=no_space),
    row("disk-small-sample", SAMPLE, "no space: made/samples.npz needs about", prepare=no_space),
    row("disk-full-prune", f"{INDICES} --keep 0,2", "no space left on the disk", prepare=full_disk),
    row("disk-full-sample", SAMPLE, "no space left on the disk", prepare=full_disk),
    row("disk-full-evaluate", f"{EVALUATE} --samples images.npz", "no space left on the disk", prepare=full_disk),
    row("disk-full-overwrite", f"{INDICES} --keep 1 --overwrite", "no space left on the disk",
        prepare=lambda cli, patch: (ran(f"{INDICES} --keep 0,2")(cli, patch), full_disk(cli, patch))[1]),
]  # fmt: skip


def tree_hash(folder: Path) -> str:
    """SHA-256 over the name, kind and bytes of everything in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def assert_one_error_line(code: int, err: str, message: tuple[str, ...]) -> None:
    lines = err.splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    for part in message:
        assert part in lines[0]


@pytest.mark.parametrize("cause", ROWS, ids=[r.id for r in ROWS])
def test_bad_input(cause: Row, cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cause.prepare:
        cause.prepare(cli, monkeypatch)
    before = tree_hash(work)
    outcome = cli(*shlex.split(cause.arguments))
    assert_one_error_line(outcome.code, outcome.err, cause.message)
    assert tree_hash(work) == before
    assert not (work / "code-has-run").exists()


def test_a_first_checkpoint_that_does_not_fit(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has said what it needs by then; its error is the last line."""

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.safetensors")

    monkeypatch.setattr("tinyfusion.training.checkpoints.write_tensors", write)
    before = tree_hash(work)
    outcome = cli(*shlex.split(RECOVER))
    last = "\n".join(outcome.err.splitlines()[-1:])
    assert_one_error_line(
        outcome.code, last, ("cannot write checkpoint run/checkpoints/step-0000002: no space left on the disk",)
    )
    assert outcome.err.count("error: ") == 1
    assert tree_hash(work) == before


def test_rows_are_distinct() -> None:
    assert len({r.id for r in ROWS}) == len(ROWS) >= 30
    assert len({(r.arguments, r.prepare) for r in ROWS}) == len(ROWS)


def test_malicious_file_would_have_run(work: Path) -> None:
    """The file is what it says: an ordinary unpickler runs its code."""
    subprocess.run([sys.executable, "-c", "import pickle; pickle.load(open('malicious-bare.pt', 'rb'))"], check=True)
    assert (work / "code-has-run").exists()


def test_console_entry_behaves_equally(work: Path) -> None:
    before = tree_hash(work)
    code = "import sys; from tinyfusion.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(f"{PRUNE} --scheme 1:3")], capture_output=True, text=True, check=False
    )
    assert_one_error_line(done.returncode, done.stderr, ("needs a depth divisible by 3",))
    assert done.stdout == ""
    assert tree_hash(work) == before


def test_debug_shows_the_traceback(cli: Cli, work: Path) -> None:
    outcome = cli(*shlex.split(f"{PRUNE} --scheme 1:3 --debug"))
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def test_our_own_bug_is_exit_code_1(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AssertionError("never happens")

    monkeypatch.setattr("tinyfusion.jobs.sampling_setup.draw_samples", broken)
    outcome = cli(*shlex.split(SAMPLE))
    assert outcome.code == 1
    assert "AssertionError: never happens" in outcome.err
    assert "report it" in outcome.err
