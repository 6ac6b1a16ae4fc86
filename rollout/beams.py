"""Beam search of many groups between two forward passes: the state of their beams, and the loops that change it.

All in one file: what is compiled is kept until the file of the loops changes, and depends on the order of the fields.
"""

from typing import NamedTuple, Self

import numpy as np

from rollout.compiled import compiled
from rollout.device_trie import DeviceTrie

NO_SCORE = float("-inf")


class TrieArrays(NamedTuple):
    """What the loops read of a trie of N nodes and E edges."""

    first_edge: np.ndarray
    """int64 [N + 1]"""
    edge_token: np.ndarray
    """int32 [E]"""
    edge_target: np.ndarray
    """int32 [E]: the child node, or -1 - item_class at end-of-sequence."""
    chain: np.ndarray
    """int32 [N]: how many further nodes the trie forces from each node on, the next one that branches included."""
    forced_to_end: np.ndarray
    """bool [N]: whether but one title lies below a node, so that all of its further tokens are forced."""

    @classmethod
    def of(cls, trie: DeviceTrie) -> Self:
        source = trie.source
        arrays = [values.view() for values in (source.first_edge, source.edge_token, source.edge_target, *trie.forced)]
        for array in arrays:
            array.flags.writeable = False  # as those of a mapped file are: one compilation serves all
        return cls(*arrays)


class Beams(NamedTuple):
    """P groups of G beams, changed in place. C: numbers that every beam carries along, see StochasticBeamSearch."""

    node: np.ndarray
    """int64 [P, G]: where it stands; -1 where none is running."""
    origin: np.ndarray
    """int64 [P, G]: the beam, at the frontier before, that it extends; -1 where none is running."""
    token: np.ndarray
    """int32 [P, G]: the token that led to its node."""
    score: np.ndarray
    """float [P, G]: what beams compete by."""
    carried: np.ndarray
    """float64 [P, G, C]"""
    depth: np.ndarray
    """int64 [P]: of the running beams of a group."""
    row: np.ndarray
    """int64 [P, G]: the first row of the frontier that is its own; -1 where none is."""
    length: np.ndarray
    """int64 [P, G]: nodes behind its own that it will come to, whatever they score."""
    ends: np.ndarray
    """bool [P, G]: whether its title ends behind these, before another beam of the group comes to a choice."""
    past_beam: np.ndarray
    """int64 [P, D, G]: the beam that each beam extended by the step at each depth."""
    past_edge: np.ndarray
    """int64 [P, D, G]: the edge of that step."""
    past_logprob: np.ndarray
    """float32 [P, D, G]: of that edge's token."""

    @classmethod
    def at_root(cls, groups: int, size: int, depths: int, carried: int = 0, dtype: type = np.float32) -> Self:
        """One beam of each group, at the root of a trie of `depths` depths."""
        shape, past = (groups, size), (groups, depths, size)
        beams = cls(
            node=np.full(shape, -1),
            origin=np.full(shape, -1),
            token=np.zeros(shape, np.int32),
            score=np.full(shape, NO_SCORE, dtype),
            carried=np.zeros((*shape, carried)),
            depth=np.zeros(groups, np.int64),
            row=np.full(shape, -1),
            length=np.zeros(shape, np.int64),
            ends=np.zeros(shape, bool),
            past_beam=np.zeros(past, np.int64),
            past_edge=np.zeros(past, np.int64),
            past_logprob=np.zeros(past, np.float32),
        )
        beams.node[:, 0] = beams.origin[:, 0] = beams.score[:, 0] = 0
        return beams


class Pool(NamedTuple):
    """The best finished titles of every group, best first: K of each, changed in place."""

    score: np.ndarray
    """float [P, K]; -inf where there is none."""
    item_class: np.ndarray
    """int32 [P, K]"""
    beam: np.ndarray
    """int64 [P, K]: the beam, at the depth where the title ended, that ended."""
    depth: np.ndarray
    """int64 [P, K]: tokens before end-of-sequence."""
    logprob: np.ndarray
    """float32 [P, K]: of end-of-sequence."""
    carried: np.ndarray
    """float64 [P, K, C]"""

    @classmethod
    def empty(cls, groups: int, size: int, carried: int = 0, dtype: type = np.float32) -> Self:
        shape = (groups, size)
        return cls(
            score=np.full(shape, NO_SCORE, dtype),
            item_class=np.full(shape, -1, np.int32),
            beam=np.zeros(shape, np.int64),
            depth=np.zeros(shape, np.int64),
            logprob=np.zeros(shape, np.float32),
            carried=np.zeros((*shape, carried)),
        )


@compiled
def look_ahead(
    trie: TrieArrays, beams: Beams, at_once: bool, free_chains: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What must be scored next: the fields of a Frontier.

    While no running beam of a group stands where the trie branches, the beams do not compete: none can drop out but by
    a full pool. So the nodes up to the next branch can be scored `at_once`, and hardly one of them in vain.
    free_chains: nodes that are forced to the end of a title need no scores.
    """
    groups, size = beams.node.shape
    count = np.zeros(groups * size, np.int64)
    rows = 0
    for group in range(groups):
        started = beams.depth[group] > 0
        choice = len(trie.chain)
        for node in beams.node[group]:
            if node >= 0 and not trie.forced_to_end[node]:
                choice = min(choice, trie.chain[node])
        for beam in range(size):
            node = beams.node[group, beam]
            beams.row[group, beam], beams.length[group, beam], beams.ends[group, beam] = -1, 0, False
            if node < 0:
                continue
            chain, to_end = trie.chain[node], trie.forced_to_end[node]
            if at_once and started:
                beams.length[group, beam] = min(chain, choice)
                beams.ends[group, beam] = to_end and chain < choice
            if not (free_chains and to_end and started):
                beams.row[group, beam] = rows
                count[group * size + beam] = beams.length[group, beam] + 1
                rows += beams.length[group, beam] + 1
    slot = np.flatnonzero(count)
    node, token, fanout = np.empty(rows, np.int64), np.empty(rows, np.int32), np.empty(rows, np.int64)
    row = 0
    for place in slot:
        at, by = beams.node[place // size, place % size], beams.token[place // size, place % size]
        for step in range(count[place]):
            if step > 0:
                edge = trie.first_edge[at]
                at, by = np.int64(trie.edge_target[edge]), trie.edge_token[edge]
            node[row], token[row], fanout[row] = at, by, trie.first_edge[at + 1] - trie.first_edge[at]
            row += 1
    return slot, count[slot], beams.origin.copy(), fanout, node, token


@compiled
def walk(trie: TrieArrays, beams: Beams, pool: Pool, logprob: np.ndarray) -> None:
    """All beams to the ends of their chains; what ends there goes into the pool.

    logprob: float32 [T, W], of the frontier's nodes; the first column is that of a node's only child.
    """
    groups, size = beams.node.shape
    for group in range(groups):
        furthest = 0
        for beam in range(size):
            node, row = beams.node[group, beam], beams.row[group, beam]
            for step in range(beams.length[group, beam]):
                edge, depth = trie.first_edge[node], beams.depth[group] + step
                gain = logprob[row + step, 0] if row >= 0 else np.float32(0)
                beams.past_beam[group, depth, beam] = beam
                beams.past_edge[group, depth, beam] = edge
                beams.past_logprob[group, depth, beam] = gain
                beams.score[group, beam] += gain
                node = np.int64(trie.edge_target[edge])
            beams.node[group, beam] = node
            furthest = max(furthest, beams.length[group, beam])
        for length in range(furthest + 1):  # shorter titles came first
            for beam in range(size):
                if beams.ends[group, beam] and beams.length[group, beam] == length:
                    row, depth = beams.row[group, beam], beams.depth[group] + length
                    gain = logprob[row + length, 0] if row >= 0 else np.float32(0)
                    item_class = -1 - trie.edge_target[trie.first_edge[beams.node[group, beam]]]
                    score, carried = beams.score[group, beam] + gain, beams.carried[group, beam]
                    _enter(pool, group, score, item_class, beam, depth, gain, carried)
                    beams.node[group, beam] = -1
        beams.depth[group] += furthest  # beams that go on have walked as far as any


@compiled
def compete(
    trie: TrieArrays,
    beams: Beams,
    pool: Pool,
    keep: int,
    score: np.ndarray,
    edge: np.ndarray,
    logprob: np.ndarray,
    carried: np.ndarray,
) -> None:
    """One token for every group, of which the best `keep` continuations of all its beams are looked at.

    score [R, W], edge int64 [R, W], logprob float32 [R, W], carried float64 [R, W, C]: the children of the last node
    of every beam of the frontier, whether it still runs or not. A beam without a row there has one child, for nothing.
    """
    groups, size = beams.node.shape
    row, rows, width = np.full(size, -1), 0, score.shape[1]
    best_score, best = np.empty(keep, score.dtype), np.empty(keep, np.int64)
    for group in range(groups):
        found = 0
        for beam in range(size):
            row[beam] = -1
            if beams.row[group, beam] >= 0:
                row[beam], rows = rows, rows + 1
            if beams.node[group, beam] < 0:
                continue
            for column in range(width if row[beam] >= 0 else 1):
                value = score[row[beam], column] if row[beam] >= 0 else beams.score[group, beam]
                if value > NO_SCORE and (found < keep or value > best_score[keep - 1]):
                    found = min(found + 1, keep)
                    place = found - 1
                    while place > 0 and best_score[place - 1] < value:
                        best_score[place], best[place] = best_score[place - 1], best[place - 1]
                        place -= 1
                    best_score[place], best[place] = value, beam * width + column
        _take(trie, beams, pool, group, best_score[:found], best[:found], row, edge, logprob, carried)


@compiled
def _take(
    trie: TrieArrays,
    beams: Beams,
    pool: Pool,
    group: int,
    score: np.ndarray,
    best: np.ndarray,
    row: np.ndarray,
    edge: np.ndarray,
    logprob: np.ndarray,
    carried: np.ndarray,
) -> None:
    """Of the best continuations, int64 beam * W + column, those that end go into the pool, and the others run on."""
    size, depth, found = beams.node.shape[1], beams.depth[group], len(score)
    edges, gains = np.empty(found, np.int64), np.empty(found, np.float32)
    along = np.zeros((found, carried.shape[2]))
    for rank in range(found):
        beam, column = best[rank] // edge.shape[1], best[rank] % edge.shape[1]
        if row[beam] < 0:
            edges[rank], gains[rank] = trie.first_edge[beams.node[group, beam]], 0
        else:
            edges[rank], gains[rank] = edge[row[beam], column], logprob[row[beam], column]
            for number in range(carried.shape[2]):
                along[rank, number] = carried[row[beam], column, number]
    for rank in range(min(found, size)):
        target = trie.edge_target[edges[rank]]
        if target < 0:
            beam = best[rank] // edge.shape[1]
            _enter(pool, group, score[rank], -1 - target, beam, depth, gains[rank], along[rank])
    running = 0
    for rank in range(found):
        target = trie.edge_target[edges[rank]]
        if running == size or score[rank] <= pool.score[group, -1]:  # scores only fall
            break
        if target >= 0:
            beam = best[rank] // edge.shape[1]
            beams.node[group, running] = target
            beams.origin[group, running] = beams.past_beam[group, depth, running] = beam
            beams.token[group, running] = trie.edge_token[edges[rank]]
            beams.score[group, running] = score[rank]
            beams.past_edge[group, depth, running] = edges[rank]
            beams.past_logprob[group, depth, running] = gains[rank]
            for number in range(carried.shape[2]):
                beams.carried[group, running, number] = along[rank, number]
            running += 1
    for beam in range(running, size):
        beams.node[group, beam] = beams.origin[group, beam] = -1
    beams.depth[group] += 1


@compiled
def finish_free(trie: TrieArrays, beams: Beams, pool: Pool) -> None:
    """Groups whose running beams are all forced to the ends of their titles walk there, for nothing."""
    nothing = np.zeros((0, 1), np.float32)
    groups, size = beams.node.shape
    for group in range(groups):
        free = True
        for node in beams.node[group]:
            free = free and (node < 0 or trie.forced_to_end[node])
        for beam in range(size):
            node = beams.node[group, beam]
            beams.row[group, beam], beams.length[group, beam], beams.ends[group, beam] = -1, 0, False
            if free and node >= 0:
                beams.length[group, beam], beams.ends[group, beam] = trie.chain[node], True
    walk(trie, beams, pool, nothing)


@compiled
def trace(trie: TrieArrays, beams: Beams, pool: Pool, eos_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int32, and their log-probabilities, float32, of every title in the pool: [P, K, D]."""
    groups, depths, _ = beams.past_edge.shape
    shape = (groups, pool.score.shape[1], depths)
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for group in range(groups):
        for rank in range(shape[1]):
            beam, depth = pool.beam[group, rank], pool.depth[group, rank]
            tokens[group, rank, depth], logprobs[group, rank, depth] = eos_token, pool.logprob[group, rank]
            for step in range(depth - 1, -1, -1):
                tokens[group, rank, step] = trie.edge_token[beams.past_edge[group, step, beam]]
                logprobs[group, rank, step] = beams.past_logprob[group, step, beam]
                beam = beams.past_beam[group, step, beam]
    return tokens, logprobs


@compiled
def _enter(
    pool: Pool,
    group: int,
    score: float | np.floating,
    item_class: int,
    beam: int,
    depth: int,
    logprob: float | np.floating,
    carried: np.ndarray,
) -> None:
    """A title into the pool, behind those that score as much; the worst drops out."""
    place = pool.score.shape[1]
    while place > 0 and pool.score[group, place - 1] < score:
        place -= 1
    if place < pool.score.shape[1]:
        _insert(pool.score[group], place, score)
        _insert(pool.item_class[group], place, item_class)
        _insert(pool.beam[group], place, beam)
        _insert(pool.depth[group], place, depth)
        _insert(pool.logprob[group], place, logprob)
        for number in range(len(carried)):
            _insert(pool.carried[group, :, number], place, carried[number])


@compiled
def _insert(values: np.ndarray, place: int, value: float | np.floating) -> None:
    for later in range(len(values) - 1, place, -1):
        values[later] = values[later - 1]
    values[place] = value
