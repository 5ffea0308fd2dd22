"""A prefill engine's transfers begin with the first batch that writes their KV; what ends before that never does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, Prefill, Ticket
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.batch import Batch
from splitserve.engine.block_manager import BlockManager
from splitserve.kv_transfer.outlet import (
    AbortSend,
    BeginSend,
    DeclineSend,
    FinishSend,
    RenewSends,
    RunAndSend,
    SendOutlet,
    SendService,
)

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


class RunsAtOnce:
    """A model whose layers are all written when one is."""

    def run(self, batch: Batch, layers_written: Callable[[range], None]) -> None:
        layers_written(range(LAYOUT.num_layers))


class RecordingSender:
    """Notes what is ready of transfers that have begun and are not over."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self._active: set[str] = set()

    def begin(self, ticket: Ticket, pages: list[int]) -> None:
        self._active.add(ticket.transfer_id)

    def ready(self, written: Sequence[tuple[str, int]], layers: range, mark: object = None) -> None:
        self.told += [each for each in written if each[0] in self._active]

    def is_over(self, transfer_id: str) -> None:
        self._active.discard(transfer_id)

    def mark(self) -> None: ...

    def pump(self) -> list[object]:
        return []


def ticket(name: str) -> Ticket:
    return Ticket(f"{name}/1", 7, LAYOUT, 0, 20, 5.0, ())


def opened(*names: str, granted: bool = True) -> tuple[SendOutlet, RecordingRanks, BlockManager]:
    ranks, blocks = RecordingRanks(), BlockManager(8, 16)
    outlet = SendOutlet(ranks, blocks)  # type: ignore[arg-type]
    for name in names:
        message = Prefill(name, 1, list(range(20)), SamplingParams(), 9.0)
        assert outlet.open(message, ticket(name) if granted else None) is not None
    return outlet, ranks, blocks


def begun(command: object) -> list[str]:
    assert isinstance(command, RunAndSend)
    return [begin.ticket.transfer_id for begin in command.begin]


def test_a_transfer_begins_with_its_first_batch_and_but_once() -> None:
    outlet, ranks, _ = opened("a", "b")
    assert ranks.told == []
    assert begun(outlet.run_command(BATCH, [("b/1", 16)])) == ["b/1"]
    assert begun(outlet.run_command(BATCH, [("b/1", 20), ("a/1", 16)])) == ["a/1"]
    assert begun(outlet.run_command(BATCH, [("a/1", 20)])) == []


def test_reservations_are_kept_until_then() -> None:
    outlet, ranks, _ = opened("a", "b")
    waiting = ticket("c")
    outlet.run_command(BATCH, [("a/1", 16)])
    outlet.keep([waiting])
    assert ranks.told == [RenewSends((waiting, ticket("b")))]
    outlet.run_command(BATCH, [("b/1", 16)])
    outlet.keep([])
    assert len(ranks.told) == 1


def test_what_ends_before_is_declined_and_what_has_begun_is_aborted() -> None:
    outlet, ranks, blocks = opened("a", "b")
    outlet.run_command(BATCH, [("a/1", 16)])
    for name in ("a/1", "b/1"):
        outlet.abort(name, "cancelled")
    assert ranks.told == [AbortSend("a/1", "cancelled"), DeclineSend(ticket("b"), "cancelled")]
    assert blocks.free_pages == blocks.num_pages
    outlet.keep([])
    assert len(ranks.told) == 2


def test_a_ticket_that_comes_late_begins_what_is_written_already() -> None:
    outlet, ranks, _ = opened("a", "b", granted=False)
    outlet.keep([])
    outlet.send_to(ticket("a"))
    assert ranks.told == []
    assert begun(outlet.run_command(BATCH, [("a/1", 20), ("b/1", 20)])) == ["a/1"]
    outlet.finish("b/1", HandOff((5,)))
    assert ranks.told == []
    outlet.send_to(ticket("b"))
    begin, finish = ranks.told
    assert isinstance(begin, BeginSend)
    assert begin.ticket == ticket("b")
    assert finish == FinishSend("b/1", HandOff((5,)))


def test_a_rank_remembers_what_is_written_only_while_the_ticket_is_to_come() -> None:
    """Its own part may be over before the prompt is."""
    outlet, _, _ = opened("late", granted=False)
    outlet.open(Prefill("early", 1, list(range(20)), SamplingParams(), 9.0), ticket("early"))
    sender = RecordingSender()
    service = SendService(RunsAtOnce(), sender)  # type: ignore[arg-type]
    for stop in (16, 20):
        command = outlet.run_command(BATCH, [("early/1", stop), ("late/1", stop)])
        assert isinstance(command, RunAndSend)
        service.handlers[RunAndSend](command)
        sender.is_over("early/1")
    assert set(service._written) == {"late/1"}
    sender.told.clear()
    service.handlers[BeginSend](BeginSend(ticket("late"), [0], 0))
    assert sender.told == [("late/1", stop) for stop in (0, 16, 20)]
    assert not service._written


def test_what_ends_without_a_ticket_is_nobodys_concern_until_it_is_written() -> None:
    outlet, ranks, blocks = opened("a", "b", granted=False)
    outlet.run_command(BATCH, [("a/1", 20)])
    for name in ("a/1", "b/1"):
        outlet.abort(name, "cancelled")
    assert ranks.told == [AbortSend("a/1", "cancelled")]
    assert blocks.free_pages == blocks.num_pages
