"""CUDA without a GPU: mixed devices and unordered streams are detected, and the package has neither.

Needs a CUDA build of torch, but no device. `benchmarks/cuda_rehearsal.py` runs every configuration; here is one of each kind.
"""

from __future__ import annotations

import pytest
import torch

import cuda_rehearsal
from fake_cuda import Order, Stream, fake_cuda
from tinyfusion.core.device import SideStream

built = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch is built without CUDA, whose fake tensors this needs"
)
CUDA = torch.device("cuda")
CHOSEN = (
    "dit train float32", "sit train accumulated", "mar learn score full", "dit learn bfloat16 lora",
    "pixart recover masked-kd", "module-2-streams learn marginals lora", "module-1-stream recover rep-kd", "sit dynamic complete",
    "mar criterion bi", "dit sample decoded", "pixart bench bfloat16", "encode encode moments", "evaluate evaluate inception",
)  # fmt: skip


def on_side(order: Order) -> tuple[SideStream, torch.Tensor, object]:
    side = SideStream(CUDA)
    with side.running():
        made = torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    return side, made, side.ready()


@built
def test_mixed_devices_are_detected() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=CUDA) + torch.zeros(3)


@built
def test_a_read_on_another_stream_waits_for_the_mark() -> None:
    with fake_cuda() as order:
        side, made, ready = on_side(order)
        assert isinstance(side.stream, Stream) and order.current is order.main
        with pytest.raises(RuntimeError, match="reads on another stream"):
            made + 1
        side.receive(ready, [])  # type: ignore[arg-type]
        made + 1
        with side.running():
            later = made * 2
        with pytest.raises(RuntimeError, match="reads on another stream"):
            later + 1


@built
def test_the_host_waits_for_copies_in_the_background() -> None:
    with fake_cuda():
        copied = torch.zeros(3, device=CUDA).to("cpu", non_blocking=True)
        with pytest.raises(RuntimeError, match="reads on the host"):
            copied.numpy()
        torch.cuda.synchronize()
        assert copied.numpy().shape == (3,)
        assert torch.zeros(3, device=CUDA).to("cpu").numpy().shape == (3,)


@built
def test_a_loop_that_does_not_receive_its_batches_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, "receive", lambda self, ready, batches: None)
    outcome = cuda_rehearsal.outcome(cuda_rehearsal.rehearsals()["dit train float32"])
    assert outcome is not None and "reads on another stream" in outcome


@built
@pytest.mark.parametrize("name", CHOSEN)
def test_a_configuration_of_every_kind(name: str) -> None:
    assert cuda_rehearsal.outcome(cuda_rehearsal.rehearsals()[name]) is None


def test_without_cuda_the_rehearsal_says_why_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr("sys.argv", ["cuda_rehearsal.py"])
    assert cuda_rehearsal.main() == 0
    assert capsys.readouterr().out.startswith("skipped: torch ")
