"""Games of three in a row, discs dropped into columns, as strings of moves whose board is known at every token.

A game is `<s>`, a letter a move (the column that a disc is dropped into) and `</s>`. It ends with a line of one
player's discs or a full board. A player who can win does so with probability `skill`, and so does one who can only stop
the other from winning; all else is random among the columns that are not full. Games are split by the hash of their
moves.

Properties of a position, in this order (`BoardGame.properties`): whether each cell has a disc of the first player, and
of the second; whether each line lacks one disc of the first player, its last cell being empty, and of the second;
whether each column is full; whether the player to move can win at once, and whether the other could.

Dimension letters: N games, T tokens of the longest, L moves, U = 2 numbers, C columns, S cells, W lines that win, P
positions, K properties.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from intaglio.checkpoint import Checkpoint
from intaglio.evidence.testbeds.cached_models import copied, pretraining_recipe, trained_model
from intaglio.evidence.testbeds.splits import Part, Sized, check_count, check_part, generator, part_of
from intaglio.trainer import CausalLM

SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BEGIN, END = range(len(SPECIAL))
CHUNK = 512
"""Games drawn from a random stream of their own."""
_MEASURED = ("steps", "games_read", "games_run", "games_pilot")
"""Settings that the base model does not depend on."""


@dataclass(frozen=True, eq=False)
class Games:
    """Games."""

    ids_NT: Tensor

    @property
    def mask_NT(self) -> Tensor:
        """Mask of the tokens that are no padding, bool [N, T]."""
        return self.ids_NT != PAD

    @property
    def is_move_NT(self) -> Tensor:
        """Mask of the tokens that are moves, bool [N, T]."""
        return self.ids_NT >= len(SPECIAL)

    def examples(self) -> list[dict[str, Any]]:
        """Return the games as `intaglio.trainer.train` takes them."""
        lengths_N = self.mask_NT.sum(1).tolist()
        return [{"input_ids": ids_T[:length]} for ids_T, length in zip(self.ids_NT, lengths_N, strict=True)]


@dataclass(frozen=True, eq=False)
class Boards:
    """Games and the properties after every move, bool, game by game."""

    games: Games
    properties_PK: Tensor


@dataclass(frozen=True)
class BoardGame(Sized):
    """The board, how it is played, the size of a small GPT-2 and its training.

    `height` discs fill a column and `line` discs win; `games_read` training games choose neurons and thresholds.
    """

    columns: int = 4
    height: int = 4
    line: int = 3
    skill: float = 0.9
    width: int = 64
    depth: int = 2
    heads: int = 4
    inner: int = 128
    base_steps: int = 400
    steps: int = 1200
    batch: int = 128
    learning_rate: float = 3e-3
    games_read: int = 512
    games_run: int = 512
    games_pilot: int = 512
    MINIATURE: ClassVar = {"width": 16, "depth": 1, "heads": 2, "inner": 16, "base_steps": 2, "steps": 4, "batch": 8,
                           "games_read": 32, "games_run": 32, "games_pilot": 32}  # fmt: skip

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens by id: specials, then a letter a column."""
        return SPECIAL + tuple(chr(ord("a") + column) for column in range(self.columns))

    @property
    def properties(self) -> tuple[str, ...]:
        """Names of the properties, in the order of `Boards.properties_PK`."""
        letters = self.vocabulary[len(SPECIAL) :]
        cells = [f"{letter}{row + 1}" for letter in letters for row in range(self.height)]
        lines = ["".join(cells[c * self.height + r] for c, r in line) for line in self.lines]
        of_players = [
            f"{player} {what} {place}"
            for what, places in (("on", cells), ("lacks one of", lines))
            for player in ("first", "second")
            for place in places
        ]
        return (*of_players, *(f"{letter} is full" for letter in letters), "to move can win", "other could win")

    @property
    def lines(self) -> list[list[tuple[int, int]]]:
        """The lines that win, each as its cells `(column, row)`."""
        lines = []
        for column, row in product(range(self.columns), range(self.height)):
            for right, up in ((1, 0), (0, 1), (1, 1), (1, -1)):
                line = [(column + n * right, row + n * up) for n in range(self.line)]
                if all(0 <= c < self.columns and 0 <= r < self.height for c, r in line):
                    lines.append(line)
        return lines

    @property
    def longest(self) -> int:
        """Tokens of the longest game T."""
        return self.columns * self.height + 2

    @property
    def cells(self) -> int:
        """Number of properties, from the first on, that are discs: the board itself."""
        return 2 * self.columns * self.height

    def new(self, seed: int, activation: str, inner: int | None = None) -> Checkpoint:
        """Return an untrained GPT-2 with an activation (transformers' name) and `inner` units (default: the bed's)."""
        config = AutoConfig.for_model(
            "gpt2", vocab_size=len(self.vocabulary), n_positions=self.longest, n_embd=self.width, n_layer=self.depth,
            n_head=self.heads, n_inner=inner or self.inner, activation_function=activation, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**32)
            model = AutoModelForCausalLM.from_config(config).eval()
        return Checkpoint(model, None, source="board game")

    def recipe(self, seed: int, steps: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `intaglio.trainer.train`: next-token prediction, a game a row."""
        recipe = pretraining_recipe(steps or self.steps, self.batch, self.learning_rate, seed)
        return recipe | {"objective": CausalLM(length=self.longest, pack=False)}

    def base(self, seed: int, activation: str) -> Checkpoint:
        """Return the dense model that all arms with an activation start from, a new object each time.

        Models of all activations start from the same weights and see the same games.
        """
        trained = trained_model(
            "board_game",
            {"seed": seed, "activation": activation, "settings": {**asdict(self), **dict.fromkeys(_MEASURED)}},
            lambda: self.new(seed, activation),
            lambda: self.games("train", f"base:{seed}", self.base_steps * self.batch).examples(),
            self.recipe(seed, self.base_steps),
        )
        return copied(trained)

    def training(self, seed: int) -> list[dict[str, Any]]:
        """Return the games of the training that follows, `steps * batch` of them."""
        return self.games("train", f"{seed}", self.steps * self.batch).examples()

    def boards(self, part: Part, seed: int) -> Boards:
        """Return games of a set with their properties; those of `train` differ from the games trained on."""
        counts = {"train": self.games_read, "evaluation": self.games_run}
        games = self.games(part, f"boards:{seed}", counts.get(part, self.games_pilot))
        return Boards(games, torch.from_numpy(self.state(games.ids_NT.numpy()))[games.is_move_NT])

    def games(self, part: Part, key: str, count: int) -> Games:
        """Return `count` games of a set; fewer are the first of more."""
        check_part(part)
        check_count("games", count)
        letters = np.array(self.vocabulary[len(SPECIAL) :])
        games: list[np.ndarray] = []
        chunk = 0
        while len(games) < count:
            uniform_NLU = generator(f"board game:{part}:{key}:{chunk}").random((CHUNK, self.longest - 2, 2))
            for moves_L, length in zip(*self.play(uniform_NLU), strict=True):
                if part_of("".join(letters[moves_L[:length]])) == part:
                    games.append(moves_L[:length])
            chunk += 1
        ids_NT = np.full((count, self.longest), PAD, dtype=np.int64)
        ids_NT[:, 0] = BEGIN
        for ids_T, moves_L in zip(ids_NT, games, strict=False):
            ids_T[1 : 1 + len(moves_L)] = len(SPECIAL) + moves_L
            ids_T[1 + len(moves_L)] = END
        return Games(torch.from_numpy(ids_NT))

    def play(self, uniform_NLU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Play games to their end; return the columns [N, L], of which the first `lengths` [N] count.

        `uniform_NLU` has two numbers a move, from 0 to 1: whether the player takes a win or block, and which column.
        """
        games = len(uniform_NLU)
        own_N, other_N = np.zeros((2, games), dtype=np.int64)
        height_NC = np.zeros((games, self.columns), dtype=np.int64)
        moves_NL = np.zeros(uniform_NLU.shape[:2], dtype=np.int64)
        lengths_N = np.zeros(games, dtype=np.int64)
        active_N = np.ones(games, dtype=bool)
        rows = np.arange(games)
        for move in range(uniform_NLU.shape[1]):
            free_NC = height_NC < self.height
            wins_NC, blocks_NC = (self._winning(board_N, height_NC) & free_NC for board_N in (own_N, other_N))
            best_NC = np.where(wins_NC.any(1, keepdims=True), wins_NC, blocks_NC)
            skilled_N = (uniform_NLU[:, move, 0] < self.skill) & best_NC.any(1)
            chosen_N = _pick(np.where(skilled_N[:, None], best_NC, free_NC), uniform_NLU[:, move, 1])
            own_N = own_N | self._disc(chosen_N, height_NC[rows, chosen_N])
            moves_NL[active_N, move] = chosen_N[active_N]
            lengths_N += active_N
            height_NC[rows, chosen_N] += free_NC.any(1)
            active_N &= ~self._won(own_N) & (height_NC < self.height).any(1)
            own_N, other_N = other_N, own_N
            if not active_N.any():
                break
        return moves_NL, lengths_N

    def state(self, ids_NT: np.ndarray) -> np.ndarray:
        """Return the properties after every token of games, bool [N, T, K]."""
        rows = np.arange(len(ids_NT))
        properties_NTK = np.zeros((*ids_NT.shape, len(self.properties)), dtype=bool)
        height_NC = np.zeros((len(ids_NT), self.columns), dtype=np.int64)
        discs_2N = np.zeros((2, len(ids_NT)), dtype=np.int64)
        bits_S = self._disc(*np.divmod(np.arange(self.columns * self.height), self.height))
        cells_WL2 = np.array(self.lines)
        lines_WLS = self._disc(cells_WL2[..., 0], cells_WL2[..., 1])[..., None] == bits_S
        lines_SW = lines_WLS.any(1).T.astype(np.int64)
        for t in range(ids_NT.shape[1]):
            moved_N = ids_NT[:, t] >= len(SPECIAL)
            column_N = np.where(moved_N, ids_NT[:, t] - len(SPECIAL), 0)
            # The first move is at position 1, and players take turns.
            discs_2N[(t - 1) % 2] |= np.where(moved_N, self._disc(column_N, height_NC[rows, column_N]), 0)
            height_NC[rows, column_N] += moved_N
            free_NC = height_NC < self.height
            # The player to move, and the other.
            threats = [self._winning(discs_2N[(t + player) % 2], height_NC) & free_NC for player in (0, 1)]
            board_2NS = (discs_2N[:, :, None] & bits_S) != 0
            threats_N2 = np.stack([threat_NC.any(1) for threat_NC in threats], axis=1)
            held_2NW = board_2NS.astype(np.int64) @ lines_SW
            lacks_2NW = (held_2NW == self.line - 1) & (held_2NW[::-1] == 0)
            properties_NTK[:, t] = np.concatenate([*board_2NS, *lacks_2NW, ~free_NC, threats_N2], axis=1)
        return properties_NTK

    def _disc(self, column: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the bit of a cell; a column has one bit more than it holds, always 0, so that lines end there."""
        return np.left_shift(np.int64(1), column * (self.height + 1) + row)

    def _won(self, board: np.ndarray) -> np.ndarray:
        """Whether there is a line on the board of one player."""
        won = np.zeros(board.shape, dtype=bool)
        for step in (1, self.height, self.height + 1, self.height + 2):
            line = board.copy()
            for n in range(1, self.line):
                line &= board >> (n * step)
            won |= line != 0
        return won

    def _winning(self, board_N: np.ndarray, height_NC: np.ndarray) -> np.ndarray:
        """Whether a disc in each column would win, bool [N, C]."""
        return self._won(board_N[:, None] | self._disc(np.arange(self.columns), height_NC))


def _pick(allowed_NC: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
    """One of the allowed columns, each equally likely [N]; 0 where none is."""
    count_N = allowed_NC.sum(1)
    rank_N = np.minimum((uniform_N * count_N).astype(np.int64), np.maximum(count_N - 1, 0)) + 1
    chosen: np.ndarray = (np.cumsum(allowed_NC, axis=1) >= rank_N[:, None]).argmax(1)
    return chosen
