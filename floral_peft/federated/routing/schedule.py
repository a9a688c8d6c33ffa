"""The constants of the posterior router, in units that hold for any number of rounds and clients a round.

Time is counted in participations: a client that takes part in a share p of the rounds has taken part p·t times, on
average, after t of them.
"""

from __future__ import annotations

import math


#: In a run of fewer participations everything is sooner.
WHOLE = 60.0
#: γ: how much of a client's logits is left at its next participation. Old evidence is of adaptors that have moved.
CLIENT_MEMORY = 0.2
#: After so many participations the server's sums U and N have lost all but 1/e of what was in them.
SERVER_MEMORY = 2.0
#: How strongly the adaptors' users are kept even in the first round.
BALANCE = 3.0
#: Over so many participations that fades away,
BALANCED = 20.0
#: and meanwhile a client's losses count as those of so many examples at most: the balance must be able to move it.
EARLY_EXAMPLES = 10
#: After so many participations adaptors are looked at for the first time, whether any of them can go, and then again
#: after so many.
PRUNED_FROM = 15.0
PRUNED_EVERY = 1.2
#: After so many (of a run of fewer than [`WHOLE`] rounds, the same share) one adaptor for all may turn out to be the
#: better choice, by so many standard errors.
POOLED_FROM = 15.0
POOLED_CAUTION = 2.0
#: Before the search ends, all stay while more than this share of the clients change theirs at a visit.
UNSETTLED = 0.1
#: In deciding which of them can go, differences between adaptors are taken to be larger by so many standard errors.
CAUTION = 1.0
#: The adaptors' learning rate in units of the base's, unless that is more than the next one: who gives a high rate has
#: chosen it as high as the base bears.
ADAPTOR_RATE = 6.0
FASTEST = 2.5
#: The longest gradient of any weight or adaptor, as matrices, in the search and after it; and the longest step of an
#: adaptor, where a high rate would make a longer one of that; shorter ones where the base's rate is above 1. After the
#: search the base's gradient may be so many times as long.
STEP_NORM = 1.0
FOUND_STEP_NORM = 2.0
STEP_LENGTH = 1.0
FOUND_BASE = 3.0
#: The damping of preconditioned steps, the paper's: they are bounded anyway.
DAMPING = 1e-5
#: By SGD a client trains no adaptor of which it would use less than this share of what it uses of its best one.
LEAST_SHARE = 0.01
#: The logit of the adaptor that is dealt out to a client for its first visit.
ASSIGNED = 20.0
#: Until the search ends, a client trains without one in so many of its examples, so many at most: by them the
#: server tells duplicates.
HELD_OUT_SHARE = 10
HELD_OUT_EXAMPLES = 10
#: Clients look for theirs among so many times as many adaptors as there are to be, but not among more than half as
#: many as there are clients, if those are more than enough; of so large a rank at least,
SEARCH_ADAPTORS = 4
ENOUGH_ADAPTORS = 16
SEARCH_RANK = 16
#: until after so many participations, once few change theirs at a visit and no more are left than may stay, or when
#: half of the run is over (or from the middle of that time on, once it is clear that those that may stay are enough):
#: then only those stay that may, compressed.
SEARCHED = 30.0
#: For so many participations after that none goes: compressed adaptors are alike until they have learned again. (Of a
#: run of fewer than [`WHOLE`] rounds, in which a round cannot count for more, it is the same share.)
RECOVERED = 10.0
#: Losses are looked at on so many of a client's examples at most; in a round on no fewer than these, and on no fewer
#: than those while they count for [`EARLY_EXAMPLES`] at most.
EVIDENCE_EXAMPLES = 256
EVIDENCE_LEAST = 32
EVIDENCE_EARLY = 16
#: By SGD clients of more examples than that look at what they hold out after so many participations only (of a run of
#: fewer than [`WHOLE`] rounds, the same share): most of what the server was told until then has faded when adaptors
#: are first looked at. (By AdamW a client's examples flatter its adaptor from the first visit on.)
HELD_OUT_FROM = 10.0
#: By SGD, if that costs more than a third of what training costs, a client looks in every second round only, unless it
#: comes fewer than [`WHOLE`] times. (By AdamW a client knows its examples by heart after a visit or two, and
#: should not stay where it is for another.)
LOOKED_EVERY = 2


def pace(sampled: float, rounds: int) -> float:
    """How much time passes in a round: a participation of the average client, or the 60th part of a shorter run.

    A run that gives a client fewer than [`WHOLE`] participations goes through the same stages, in the same shares of
    its rounds. Adaptors take rounds to part, however many clients are in each: none counts for more than one.

    Args:
        sampled: The share of the clients that take part in a round.
        rounds: The rounds of the run.
    """
    return max(sampled, min(1.0, WHOLE / rounds))


def adaptor_rate(base_rate: float) -> float:
    """The adaptors' learning rate by SGD while clients search.

    Args:
        base_rate: The base's.
    """
    return max(base_rate, min(ADAPTOR_RATE * base_rate, FASTEST))


def server_decay(pace: float) -> float:
    """δ: what a round leaves of the server's sums.

    Args:
        pace: See [`pace`].
    """
    return math.exp(-pace / SERVER_MEMORY)


def searched_rounds(pace: float, rounds: int) -> tuple[float, float]:
    """After how many rounds the search may end, and after how many it ends anyway.

    Args:
        pace: See [`pace`].
        rounds: The rounds of the run.
    """
    return min(SEARCHED / pace, rounds / 2), rounds / 2


def recovered_rounds(pace: float, rounds: int) -> float:
    """For how many rounds after the search no adaptor goes.

    Args:
        pace: See [`pace`].
        rounds: The rounds of the run.
    """
    return _share(RECOVERED, pace, rounds)


def pooled_from(pace: float, rounds: int) -> float:
    """From which round on all adaptors may become one.

    Args:
        pace: See [`pace`].
        rounds: The rounds of the run.
    """
    return _share(POOLED_FROM, pace, rounds)


def held_out_from(pace: float, rounds: int) -> float:
    """From which round on clients look at what they hold out.

    Args:
        pace: See [`pace`].
        rounds: The rounds of the run.
    """
    return _share(HELD_OUT_FROM, pace, rounds)


def _share(participations: float, pace: float, rounds: int) -> float:
    """So many participations in rounds; of a run that has fewer than [`WHOLE`], the same share of it."""
    return participations / pace * min(1.0, rounds * pace / WHOLE)


def pruning_due(round: int, pace: float) -> bool:
    """Whether adaptors are looked at after a round.

    Args:
        round: The round, from 1.
        pace: See [`pace`].
    """
    events = [math.floor((t * pace - PRUNED_FROM) / PRUNED_EVERY + 1e-9) for t in (round - 1, round)]
    return 0 <= events[1] > events[0]


def evidence_examples(trained: int, adaptors: int, least: int = EVIDENCE_LEAST) -> int:
    """On how many of its examples a client looks at the losses of the pure models before it trains.

    An example's loss is a pass forward for each adaptor, and a step of training about three passes: to look costs a
    third of what it costs to train, unless that is too little to look at.

    Args:
        trained: How many examples it trains on in a round, each as often as it comes.
        adaptors: C.
        least: On how many at least.
    """
    return min(max(least, trained // adaptors), EVIDENCE_EXAMPLES)
