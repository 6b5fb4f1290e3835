"""A board whose every state is known: the rules, by a slow player of them; the sets; the models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.testbeds.board_game import BEGIN, END, PAD, SPECIAL, BoardGame
from intaglio.evidence.testbeds.splits import BOUNDS, part_of

BED = BoardGame(
    games_read=40, games_run=40, games_pilot=30, width=16, depth=1, heads=2, inner=8, base_steps=1, steps=20, batch=4
)
Cell = tuple[int, int]


def wins(bed: BoardGame, discs: set[Cell]) -> bool:
    """Whether there is a line, cell by cell."""
    for (column, row), (dc, dr) in itertools.product(discs, ((1, 0), (0, 1), (1, 1), (1, -1))):
        if all((column + n * dc, row + n * dr) in discs for n in range(bed.line)):
            return True
    return False


def threatens(bed: BoardGame, discs: set[Cell], heights: list[int]) -> list[int]:
    """The columns in which a disc would win."""
    return [c for c in range(bed.columns) if heights[c] < bed.height and wins(bed, discs | {(c, heights[c])})]


def moves_of(game_T: torch.Tensor) -> list[int]:
    return [int(token) - len(SPECIAL) for token in game_T if token >= len(SPECIAL)]


@pytest.mark.parametrize("bed", [BED, BoardGame(columns=5, height=3, line=3), BoardGame(columns=5, height=4, line=4)])
def test_games_end_when_they_must_and_their_state_is_the_boards(bed: BoardGame) -> None:
    games = bed.games("train", "0", 40)
    true_NTK = bed.state(games.ids_NT.numpy())
    names = bed.properties
    assert len(set(names)) == len(names) == true_NTK.shape[-1]
    seen = dict.fromkeys(("line", "full"), 0)
    for game_T, true_TK in zip(games.ids_NT, true_NTK, strict=True):
        discs: list[set[Cell]] = [set(), set()]
        heights, moves = [0] * bed.columns, moves_of(game_T)
        for turn, column in enumerate(moves):
            assert not any(wins(bed, one) for one in discs)  # it goes on only while nobody has won
            assert heights[column] < bed.height
            discs[turn % 2].add((column, heights[column]))
            heights[column] += 1
            expected = {
                f"{player} on {chr(ord('a') + c)}{r + 1}": (c, r) in discs[who]
                for who, player in enumerate(("first", "second"))
                for c, r in itertools.product(range(bed.columns), range(bed.height))
            }
            for (who, player), line in itertools.product(enumerate(("first", "second")), bed.lines):
                name = "".join(f"{chr(ord('a') + c)}{r + 1}" for c, r in line)
                own = sum(cell in discs[who] for cell in line)
                free = sum(cell not in discs[0] | discs[1] for cell in line)
                expected[f"{player} lacks one of {name}"] = (own, free) == (bed.line - 1, 1)
            expected |= {f"{chr(ord('a') + c)} is full": heights[c] == bed.height for c in range(bed.columns)}
            expected["to move can win"] = bool(threatens(bed, discs[(turn + 1) % 2], heights))
            expected["other could win"] = bool(threatens(bed, discs[turn % 2], heights))
            assert dict(zip(names, true_TK[turn + 1].tolist(), strict=True)) == expected
        won = any(wins(bed, one) for one in discs)
        assert won or sum(heights) == bed.columns * bed.height
        seen["line" if won else "full"] += 1
        assert game_T.tolist()[: len(moves) + 2] == [BEGIN, *(m + len(SPECIAL) for m in moves), END]
        assert set(game_T.tolist()[len(moves) + 2 :]) <= {PAD}
    assert seen["line"]


def test_lines_are_those_that_win() -> None:
    for bed, count in ((BED, 24), (BoardGame(columns=5, height=4, line=4), 8 + 5 + 2 * 2)):
        assert len(bed.lines) == count
        assert all(wins(bed, set(line)) for line in bed.lines)
    assert len(BED.properties) == 32 + 48 + 4 + 2


def test_heedful_players_win_and_block() -> None:
    for skill, expected in ((1.0, 1.0), (0.0, None)):
        bed = BoardGame(skill=skill)
        heeded = chances = 0
        for game_T in bed.games("train", "0", 60).ids_NT:
            discs: list[set[Cell]] = [set(), set()]
            heights = [0] * bed.columns
            for turn, column in enumerate(moves_of(game_T)):
                own, other = (threatens(bed, discs[(turn + who) % 2], heights) for who in (0, 1))
                if own or other:
                    chances, heeded = chances + 1, heeded + (column in (own or other))
                discs[turn % 2].add((column, heights[column]))
                heights[column] += 1
        assert chances
        assert heeded == chances if expected else heeded < 0.6 * chances


def test_sets_share_no_game_and_follow_from_the_seed() -> None:
    found = {part: {tuple(moves_of(g)) for g in BED.games(part, "0", 60).ids_NT} for part in BOUNDS}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    letters = BED.vocabulary[len(SPECIAL) :]
    assert all(part_of("".join(letters[c] for c in game)) == part for part in BOUNDS for game in found[part])
    assert torch.equal(BED.games("train", "0", 20).ids_NT, BED.games("train", "0", 60).ids_NT[:20])
    assert not torch.equal(BED.games("train", "0", 20).ids_NT, BED.games("train", "1", 20).ids_NT)
    boards = [BED.boards("evaluation", base) for base in (0, 0, 1)]
    first, again, other = (each.games.ids_NT for each in boards)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert boards[0].properties_PK.shape == (int(boards[0].games.is_move_NT.sum()), len(BED.properties))
    assert [len(BED.boards(part, 0).games.ids_NT) for part in BOUNDS] == [40, 30, 30, 40]


def test_models_and_what_they_are_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("cache")))
    relu, gelu = (BED.new(0, activation).model for activation in ("relu", "gelu"))
    assert all(torch.equal(a, b) for a, b in zip(relu.parameters(), gelu.parameters(), strict=True))
    examples = BED.training(3)
    assert len(examples) == 80
    assert all(int(example["input_ids"][-1]) == END for example in examples[:50])
    first, again, other = (BED.base(seed, "relu") for seed in (3, 3, 4))
    assert first is not again
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    assert not torch.equal(next(first.model.parameters()), next(BED.new(3, "relu").model.parameters()))


def test_no_games_are_refused_and_an_empty_board_has_no_property() -> None:
    with pytest.raises(IntaglioError, match="0 games were requested"):
        BED.games("train", "0", 0)
    assert np.array_equal(BED.state(np.array([[BEGIN]]))[0, 0], [False] * len(BED.properties))
