"""A board whose every state is known: the rules, by a slow player of them; the sets; the models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.board_game import BEGIN, BOUNDS, END, PAD, SPECIAL, BoardGame, Games
from intaglio.evidence.worlds.sealing import part_of

WORLD = BoardGame(
    games_read=40, games_run=40, games_pilot=30, width=16, depth=1, heads=2, inner=8, base_steps=1, steps=20, batch=4
)
Cell = tuple[int, int]


def wins(world: BoardGame, discs: set[Cell]) -> bool:
    """Whether there is a line, cell by cell."""
    for (column, row), (dc, dr) in itertools.product(discs, ((1, 0), (0, 1), (1, 1), (1, -1))):
        if all((column + n * dc, row + n * dr) in discs for n in range(world.line)):
            return True
    return False


def threatens(world: BoardGame, discs: set[Cell], heights: list[int]) -> list[int]:
    """The columns in which a disc would win."""
    return [c for c in range(world.columns) if heights[c] < world.height and wins(world, discs | {(c, heights[c])})]


def moves_of(game_T: torch.Tensor) -> list[int]:
    return [int(token) - len(SPECIAL) for token in game_T if token >= len(SPECIAL)]


@pytest.mark.parametrize(
    "world", [WORLD, BoardGame(columns=5, height=3, line=3), BoardGame(columns=5, height=4, line=4)]
)
def test_games_end_when_they_must_and_their_state_is_the_boards(world: BoardGame) -> None:
    games = world.games("train", "0", 40)
    true_NTK = world.state(games.ids_NT.numpy())
    names = world.properties
    assert len(set(names)) == len(names) == true_NTK.shape[-1]
    seen = dict.fromkeys(("line", "full"), 0)
    for game_T, true_TK in zip(games.ids_NT, true_NTK, strict=True):
        discs: list[set[Cell]] = [set(), set()]
        heights, moves = [0] * world.columns, moves_of(game_T)
        for turn, column in enumerate(moves):
            assert not any(wins(world, one) for one in discs)  # it goes on only while nobody has won
            assert heights[column] < world.height
            discs[turn % 2].add((column, heights[column]))
            heights[column] += 1
            expected = {
                f"{player} on {chr(ord('a') + c)}{r + 1}": (c, r) in discs[who]
                for who, player in enumerate(("first", "second"))
                for c, r in itertools.product(range(world.columns), range(world.height))
            }
            for (who, player), line in itertools.product(enumerate(("first", "second")), world.lines):
                name = "".join(f"{chr(ord('a') + c)}{r + 1}" for c, r in line)
                own = sum(cell in discs[who] for cell in line)
                free = sum(cell not in discs[0] | discs[1] for cell in line)
                expected[f"{player} lacks one of {name}"] = (own, free) == (world.line - 1, 1)
            expected |= {f"{chr(ord('a') + c)} is full": heights[c] == world.height for c in range(world.columns)}
            expected["to move can win"] = bool(threatens(world, discs[(turn + 1) % 2], heights))
            expected["other could win"] = bool(threatens(world, discs[turn % 2], heights))
            assert dict(zip(names, true_TK[turn + 1].tolist(), strict=True)) == expected
        won = any(wins(world, one) for one in discs)
        assert won or sum(heights) == world.columns * world.height
        seen["line" if won else "full"] += 1
        assert game_T.tolist()[: len(moves) + 2] == [BEGIN, *(m + len(SPECIAL) for m in moves), END]
        assert set(game_T.tolist()[len(moves) + 2 :]) <= {PAD}
    assert seen["line"]


def test_lines_are_those_that_win() -> None:
    for world, count in ((WORLD, 24), (BoardGame(columns=5, height=4, line=4), 8 + 5 + 2 * 2)):
        assert len(world.lines) == count
        assert all(wins(world, set(line)) for line in world.lines)
    assert len(WORLD.properties) == 32 + 48 + 4 + 2


def test_heedful_players_win_and_block() -> None:
    for skill, expected in ((1.0, 1.0), (0.0, None)):
        world = BoardGame(skill=skill)
        heeded = chances = 0
        for game_T in world.games("train", "0", 60).ids_NT:
            discs: list[set[Cell]] = [set(), set()]
            heights = [0] * world.columns
            for turn, column in enumerate(moves_of(game_T)):
                own, other = (threatens(world, discs[(turn + who) % 2], heights) for who in (0, 1))
                if own or other:
                    chances, heeded = chances + 1, heeded + (column in (own or other))
                discs[turn % 2].add((column, heights[column]))
                heights[column] += 1
        assert chances
        assert heeded == chances if expected else heeded < 0.6 * chances


def test_what_a_game_costs_who_knows_it() -> None:
    # Two columns of one, two discs in a row win: the first move is free, the second player cannot win.
    tiny = BoardGame(columns=2, height=1, line=2, skill=0.5)
    games = Games(torch.tensor([[BEGIN, 3, 4, END]]))
    assert tiny.nats(games) == pytest.approx(math.log(2) / 3)
    # By the very chances that games are drawn with, no text costs less: so many games come near the entropy.
    few, many = (WORLD.nats(WORLD.games("train", key, 400)) for key in ("a", "b"))
    assert few == pytest.approx(many, rel=0.1)
    assert 0 < many < math.log(WORLD.columns)


def test_sets_share_no_game_and_follow_from_the_seed() -> None:
    found = {part: {tuple(moves_of(g)) for g in WORLD.games(part, "0", 60).ids_NT} for part in BOUNDS}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    letters = WORLD.vocabulary[len(SPECIAL) :]
    assert all(part_of("".join(letters[c] for c in game), BOUNDS) == part for part in BOUNDS for game in found[part])
    assert torch.equal(WORLD.games("train", "0", 20).ids_NT, WORLD.games("train", "0", 60).ids_NT[:20])
    assert WORLD.games("train", "0", 20).digest != WORLD.games("train", "1", 20).digest
    boards = [WORLD.boards("evaluation", base) for base in (0, 0, 1)]
    assert boards[0].games.digest == boards[1].games.digest != boards[2].games.digest
    assert boards[0].true_PK.shape == (int(boards[0].games.played_NT.sum()), len(WORLD.properties))
    assert [len(WORLD.boards(part, 0).games.ids_NT) for part in BOUNDS] == [40, 30, 30, 40]


def test_models_and_what_they_are_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("INTAGLIO_HOME", str(tmp_path_factory.mktemp("cache")))
    relu, gelu = (WORLD.new(0, activation).model for activation in ("relu", "gelu"))
    assert all(torch.equal(a, b) for a, b in zip(relu.parameters(), gelu.parameters(), strict=True))
    examples = WORLD.training(3).examples()
    assert len(examples) == 80
    assert all(int(example["input_ids"][-1]) == END for example in examples[:50])
    first, again, other = (WORLD.base(seed, "relu") for seed in (3, 3, 4))
    assert first is not again
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    assert not torch.equal(next(first.model.parameters()), next(WORLD.new(3, "relu").model.parameters()))


def test_worlds_that_cannot_be() -> None:
    for fields, words in (
        ({"columns": 1}, "a board of 1 columns of 4"),
        ({"columns": 8, "height": 8}, "does not fit 62 bits"),
        ({"line": 5}, "line is 5; from 2 to the longer side"),
        ({"skill": 1.5}, "skill is 1.5"),
    ):
        with pytest.raises(IntaglioError, match=words):
            BoardGame(**fields)  # type: ignore[arg-type]
    with pytest.raises(IntaglioError, match="0 games were asked for"):
        WORLD.games("train", "0", 0)
    assert np.array_equal(WORLD.state(np.array([[BEGIN]]))[0, 0], [False] * len(WORLD.properties))
