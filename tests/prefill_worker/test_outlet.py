"""A prefill engine's transfers begin with the first batch that writes their KV; what ends before that never does."""

from __future__ import annotations

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import Prefill, Ticket
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.batch import Batch
from splitserve.engine.block_manager import BlockManager
from splitserve.prefill_worker.outlet import AbortSend, BeginSend, DeclineSend, RenewSends, RunAndSend, SendOutlet

LAYOUT = KvLayout(1, 2, 2, 1, 8, 16, "float32")
BATCH = Batch.of([])


class RecordingRanks:
    """One rank that notes what it is told."""

    size = 1

    def __init__(self) -> None:
        self.told: list[object] = []

    def execute(self, command: object) -> None:
        self.told.append(command)

    def poll(self) -> list[tuple[int, object]]:
        return []


def prefill(name: str) -> Prefill:
    ticket = Ticket(name, 7, LAYOUT, 0, 20, 5.0, ())
    tokens = list(range(20))
    return Prefill(name, 1, tokens, SamplingParams(), first_sample=0, output_tokens=0, ticket=ticket, deadline_s=9.0)


def opened(*names: str) -> tuple[SendOutlet, RecordingRanks, BlockManager]:
    ranks, blocks = RecordingRanks(), BlockManager(8, 16)
    outlet = SendOutlet(ranks, blocks)  # type: ignore[arg-type]
    for name in names:
        assert outlet.open(prefill(name)) is not None
    return outlet, ranks, blocks


def begun(command: object) -> list[str]:
    assert isinstance(command, RunAndSend)
    return [begin.ticket.transfer_id for begin in command.begin]


def test_a_transfer_begins_with_its_first_batch_and_but_once() -> None:
    outlet, ranks, _ = opened("a", "b")
    assert ranks.told == []
    assert begun(outlet.run_command(BATCH, [("b", 16)])) == ["b"]
    assert begun(outlet.run_command(BATCH, [("b", 20), ("a", 16)])) == ["a"]
    assert begun(outlet.run_command(BATCH, [("a", 20)])) == []


def test_reservations_are_kept_until_then() -> None:
    outlet, ranks, _ = opened("a", "b")
    waiting = prefill("c").ticket
    outlet.run_command(BATCH, [("a", 16)])
    outlet.keep([waiting])
    assert ranks.told == [RenewSends((waiting, prefill("b").ticket))]
    outlet.run_command(BATCH, [("b", 16)])
    outlet.keep([])
    assert len(ranks.told) == 1


def test_what_ends_before_is_declined_and_what_has_begun_is_aborted() -> None:
    outlet, ranks, blocks = opened("a", "b")
    outlet.run_command(BATCH, [("a", 16)])
    for name in ("a", "b"):
        outlet.abort(name, "cancelled")
    assert ranks.told == [AbortSend("a", "cancelled"), DeclineSend(prefill("b").ticket, "cancelled")]
    assert blocks.free_pages == blocks.num_pages
    outlet.keep([])
    assert begun(outlet.run_command(BATCH, [("b", 20)])) == []
    assert not any(isinstance(command, BeginSend | RenewSends) for command in ranks.told)
