"""The push protocol keeps its promises in every interleaving, and the search catches protocols that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from protocol_model import (
    Buffers,
    Credits,
    Kind,
    Op,
    Protocol,
    Use,
    at_once,
    broadcast,
    free_buffer,
    one_shot,
    ring,
    rotation,
    two_shot,
    two_shot_ring,
)
from protocol_search import search

# An all-gather is a one-shot that does not add. two_shot(1): a message so short that rank 0 owns all of it.
SHORT = (one_shot(), two_shot(), two_shot(owners=1), two_shot(gather=False))
AT_ONCE = tuple(at_once(kind) for kind in SHORT)
MIXED = (one_shot(), at_once(one_shot()))
ONE_THREAD = Credits(apart=False)
ONTO_FULL = "a push lands on a full slot of rank"
WRONG_DATUM = "reads a datum of another launch or tile"


def all_kinds(ring_tiles: tuple[int, ...], two_shot_ring_tiles: tuple[int, ...]) -> tuple[Kind, ...]:
    return (*SHORT, *AT_ONCE, *(ring(t) for t in ring_tiles), *(two_shot_ring(t) for t in two_shot_ring_tiles))


def assert_holds(protocol: Protocol, reduced: bool, at_least: int) -> None:
    verdict = search(protocol, reduced)
    assert verdict.violation == "", "\n".join(verdict.trace)
    assert verdict.states >= at_least


# --- the protocol


def test_any_sequence_of_calls_of_two_ranks_with_every_step_apart() -> None:
    assert_holds(Protocol(2, all_kinds((1, 2), (1, 2))), reduced=False, at_least=50_000)


def test_any_sequence_of_calls_of_two_ranks() -> None:
    assert_holds(Protocol(2, all_kinds((1, 2, 3, 6), (1, 2, 3, 6))), reduced=True, at_least=6_000)


def test_any_sequence_of_calls_of_three_ranks() -> None:
    assert_holds(Protocol(3, all_kinds((1, 2), (1, 2))), reduced=True, at_least=140_000)


def test_any_sequence_of_one_shots_of_three_ranks_with_every_step_apart() -> None:
    assert_holds(Protocol(3, MIXED), reduced=False, at_least=90_000)


def test_any_sequence_of_one_shots_of_four_ranks() -> None:
    assert_holds(Protocol(4, MIXED), reduced=True, at_least=60_000)


def test_emptying_all_of_a_buffer_that_is_full_in_part_does_no_harm() -> None:
    assert_holds(Protocol(2, (one_shot(), at_once(two_shot())), empties="buffer"), reduced=False, at_least=25_000)
    assert_holds(Protocol(2, (*SHORT, *AT_ONCE), empties="buffer"), reduced=True, at_least=1_000)


def test_sequences_that_leave_nothing_full_keep_to_two_buffers() -> None:
    kinds = (*AT_ONCE, ring(2), two_shot_ring(2))
    assert_holds(Protocol(2, kinds, Buffers(count=2)), reduced=False, at_least=1_000)


@pytest.mark.parametrize("tiles", range(1, 7))
@pytest.mark.parametrize("kind", [ring, two_shot_ring])
def test_rings_of_two_ranks(kind: Callable[..., Kind], tiles: int) -> None:
    every_step_apart = kind is ring or tiles <= 3
    assert_holds(Protocol(2, (kind(tiles),)), reduced=not every_step_apart, at_least=30 * tiles)


@pytest.mark.parametrize(
    "kind",
    [ring(6, 4, ONE_THREAD), two_shot_ring(5, 4, ONE_THREAD), two_shot_ring(5, 4, ONE_THREAD, last_owners=1)],
    ids=["ring", "two_shot_ring", "short_last"],
)
def test_rings_of_three_ranks(kind: Kind) -> None:
    assert_holds(Protocol(3, (kind,)), reduced=True, at_least=6_500)


# --- how much of it is needed


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("defer", [0, 1, 2])
@pytest.mark.parametrize("buffers", [1, 2, 3, 4])
def test_emptying_d_launches_later_needs_d_plus_two_buffers(buffers: int, defer: int, reduced: bool) -> None:
    protocol = Protocol(2, SHORT, rotation(buffers), defer) if defer else Protocol(2, AT_ONCE, rotation(buffers))
    verdict = search(protocol, reduced)
    assert (verdict.violation == "") == (buffers >= defer + 2), verdict


def test_two_buffers_with_deferred_emptying_are_caught() -> None:
    verdict = search(Protocol(2, (one_shot(),), rotation(2)))
    assert ONTO_FULL in verdict.violation
    # Rank 0's third push comes while rank 1, in its second launch, has not yet emptied the first one's slot.
    assert sum("rank 0, one_shot: ends" in step for step in verdict.trace) == 2
    assert sum("rank 1, one_shot: ends" in step for step in verdict.trace) == 1


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5])
def test_a_ring_needs_twice_as_many_slots_as_a_credit_is_for(slots: int, every: int, reduced: bool) -> None:
    verdict = search(Protocol(2, (ring(6, slots, Credits(every)),)), reduced)
    assert (verdict.violation == "") == (slots > every and slots % every == 0), verdict


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_a_two_shot_ring_needs_a_slot_more(slots: int, every: int) -> None:
    verdict = search(Protocol(2, (two_shot_ring(6, slots, Credits(every)),)))
    assert (verdict.violation == "") == (slots > every + 1 and slots % every == 0), verdict


# --- what breaks the rule of buffers


def before_though_full(before: Use, last: Use) -> int:
    return before.buffer


def by_what_the_last_left(before: Use, last: Use) -> int:
    return free_buffer(Use(before.buffer, last.full), last)


def last_if_nothing_full(before: Use, last: Use) -> int:
    return free_buffer(before, last) if last.full else last.buffer


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("rule", [before_though_full, by_what_the_last_left, last_if_nothing_full])
def test_a_wrong_rule_of_buffers_is_caught(rule: Callable[[Use, Use], int], world: int, reduced: bool) -> None:
    assert ONTO_FULL in search(Protocol(world, MIXED, Buffers(following=rule)), reduced).violation


@pytest.mark.parametrize("reduced", [True, False])
def test_a_rule_that_looks_at_the_wrong_launch_is_caught_only_where_kinds_mix(reduced: bool) -> None:
    buffers = Buffers(following=by_what_the_last_left)
    assert_holds(Protocol(2, SHORT, buffers), reduced, at_least=300)
    assert_holds(Protocol(2, AT_ONCE, buffers), reduced, at_least=80)
    verdict = search(Protocol(2, MIXED, buffers), reduced)
    # Rank 0's third launch takes the first one's buffer, which rank 1 in its second one has not yet emptied.
    assert [step for step in verdict.trace if "ends" in step] == [
        "rank 0, one_shot: ends",
        "rank 1, one_shot: ends",
        "rank 0, one_shot_at_once: ends",
    ]


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kind", MIXED, ids=["left_full", "at_once"])
def test_a_second_launch_in_the_buffer_of_the_first_is_caught(kind: Kind, reduced: bool) -> None:
    verdict = search(Protocol(2, (kind,), Buffers(before=0)), reduced)
    assert ONTO_FULL in verdict.violation or WRONG_DATUM in verdict.violation


@pytest.mark.parametrize("reduced", [True, False])
def test_a_launch_that_leaves_its_buffer_full_on_some_ranks_only_is_caught(reduced: bool) -> None:
    kind = Kind("uneven", lambda rank, world: MIXED[rank].program(rank, world))
    assert ONTO_FULL in search(Protocol(2, (kind,)), reduced).violation
    assert_holds(Protocol(2, (kind,), rotation(3)), reduced, at_least=20)


# --- what breaks the rest


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_a_launch_whose_source_waits_for_nobody_is_caught(world: int, reduced: bool) -> None:
    assert ONTO_FULL in search(Protocol(world, (one_shot(), broadcast())), reduced).violation


@pytest.mark.parametrize("reduced", [True, False])
def test_a_reduce_scatter_that_leaves_a_rank_without_a_shard_is_caught(reduced: bool) -> None:
    kinds = (one_shot(), two_shot(owners=1, gather=False))
    assert ONTO_FULL in search(Protocol(2, kinds), reduced).violation


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("credits", [Credits(awaited=False), Credits(behind_resets=False)], ids=["none", "too_early"])
@pytest.mark.parametrize("kind", [ring, two_shot_ring])
def test_a_ring_without_its_credits_is_caught(kind: Callable[..., Kind], credits: Credits, reduced: bool) -> None:
    verdict = search(Protocol(2, (kind(6, credits=credits),)), reduced)
    assert ONTO_FULL in verdict.violation or WRONG_DATUM in verdict.violation


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("kinds", [(one_shot(), two_shot()), MIXED], ids=["fewer", "none"])
def test_emptying_as_many_slots_as_the_present_launch_has_is_caught(kinds: tuple[Kind, ...], reduced: bool) -> None:
    verdict = search(Protocol(2, kinds, empties="own"), reduced)
    assert "other slots are full at the end" in verdict.violation or WRONG_DATUM in verdict.violation


def test_a_launch_that_does_not_wait_for_the_one_before_is_caught() -> None:
    verdict = search(Protocol(2, (one_shot(),), boundary=False), reduced=False)
    assert ONTO_FULL in verdict.violation or WRONG_DATUM in verdict.violation


@pytest.mark.parametrize("reduced", [True, False])
def test_one_buffer_emptied_a_launch_later_gives_old_data(reduced: bool) -> None:
    assert WRONG_DATUM in search(Protocol(2, (one_shot(),), rotation(1)), reduced).violation


@pytest.mark.parametrize("reduced", [True, False])
def test_waiting_for_what_nobody_sends_is_a_deadlock(reduced: bool) -> None:
    kind = Kind("mute", lambda rank, world: [Op("poll", ((rank, 1 - rank, 0),))])
    assert search(Protocol(2, (one_shot(), kind)), reduced).violation.startswith("deadlock: ranks [")
