"""Fields of --set that the opened models do not read are said, and the command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from material import Cli
from test_bad_input import PRUNE, RECOVER, RUN, SAMPLE
from test_verbs import done

COMMANDS = {
    f"{PRUNE} --criterion uniform --set prune.budgets=blocks=3": "prune.budgets is for transformers",
    f"{SAMPLE} --set sample.flow.method=euler": "sample.flow.method is for flows",
    f"{RECOVER} --set masked.mask_ratio_min=0.5": "masked.mask_ratio_min is for masked models",
    f"{RUN} --set sample.flow.method=euler": "sample.flow.method is for flows",
    "bench teacher --set sample.masked.head_steps=2": "sample.masked.head_steps is for masked models",
    "explain teacher --out run --set flow.shift=2": "flow.shift is for models whose process is a flow",
    f"{PRUNE} --criterion uniform --set recover.alpha_kd=0.5": "recover.alpha_kd is not read by `prune`",
}


@pytest.mark.parametrize(("command", "remark"), COMMANDS.items(), ids=list(COMMANDS))
def test_what_is_not_read_is_said(cli: Cli, work: Path, command: str, remark: str) -> None:
    said = [line for line in done(cli, f"{command} --dry-run").err.splitlines() if remark in line]
    assert len(said) == 1 and said[0].endswith("; it is left out")
