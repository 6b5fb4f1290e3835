"""Games of three in a row, discs dropped into columns, as strings of moves: text whose state is known at every token.

A game is `<s>`, a letter a move (the column that a disc is dropped into) and `</s>`: `<s> c c b d a ... </s>`. It ends
with a line of one player's discs or a full board, so that who predicts it must know the board. A player who can win
does so with probability `skill`; so does one who can only stop the other from winning, and all else is at random among
the columns that are not full.

Games are sealed by the hash of their moves: a game of the evaluation was never trained on.

What can be asked of a position, in this order (`properties`): whether each cell has a disc of the first player, and of
the second; whether each line lacks but one disc of the first player, its last cell being empty, and of the second;
whether each column is full; whether who is to move can win at once, and whether the other could.

    world = BoardGame()
    checkpoint = world.new(seed, "relu")
    train(checkpoint, world.training(seed).examples(), **world.recipe(seed))
    boards = world.boards("evaluation", seed)          # games, and what is true behind each of their moves

Dimension letters: N games, T tokens of the longest, L moves, U = 2 numbers, C columns, S cells, W lines that win, P
positions, K properties.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intaglio.checkpoint import Checkpoint, load
from intaglio.environment import torch_threads, versions
from intaglio.errors import IntaglioError
from intaglio.evidence.worlds.made import code_of, made
from intaglio.evidence.worlds.sealing import Bounds, Part, check_count, check_part, generator, part_of
from intaglio.methods.base import Progress, no_progress
from intaglio.trainer import CausalLM, train

BOUNDS: Bounds = {"train": (0, 600), "validation": (600, 700), "pilot": (700, 800), "evaluation": (800, 1000)}
"""Which remainders of a game's hash are in which set."""
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BEGIN, END = range(len(SPECIAL))
CHUNK = 512
"""Games that are drawn at a time, from a stream of their own."""
_DECIDES = (
    *("columns", "height", "line", "skill", "width", "depth", "heads", "inner"),
    *("base_steps", "batch", "learning_rate"),
)
"""The settings that the first training's model follows from."""


@dataclass(frozen=True, eq=False)
class Games:
    """Some games.

    Args:
        ids_NT: tokens, padded on the right.
    """

    ids_NT: Tensor

    @property
    def real_NT(self) -> Tensor:
        """Where a token is no padding, bool [N, T]."""
        return self.ids_NT != PAD

    @property
    def played_NT(self) -> Tensor:
        """Where a token is a move, bool [N, T]."""
        return self.ids_NT >= len(SPECIAL)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.ids_NT.numpy().tobytes()).hexdigest()

    def examples(self) -> list[dict[str, Any]]:
        """As `intaglio.trainer.train` takes them."""
        lengths_N = self.real_NT.sum(1).tolist()
        return [{"input_ids": ids_T[:length]} for ids_T, length in zip(self.ids_NT, lengths_N, strict=True)]


@dataclass(frozen=True, eq=False)
class Boards:
    """Games, and what is true behind each of their moves.

    Args:
        games: the games.
        true_PK: bool, the properties behind every move, game by game.
    """

    games: Games
    true_PK: Tensor


@dataclass(frozen=True)
class BoardGame:
    """The world: the board, how it is played, a model's size and how it is trained.

    Args:
        columns: C. Default 4.
        height: H, discs that a column holds. Default 4.
        line: discs that win. Default 3.
        skill: probability of winning, and of blocking, where that can be done. Default 0.9.
        width: of the model. Default 64.
        depth: layers. Default 2.
        heads: of attention. Default 4.
        inner: units of its MLPs. Default 128.
        base_steps: of the training that every arm begins with. Default 400.
        steps: of the training that follows. Default 1200.
        batch: games of a step. Default 128.
        learning_rate: of the first training, at its highest. Default 3e-3.
        games_read: training games on which neurons and their cuts are chosen. Default 512.
        games_run: that a run is measured on. Default 512.
        games_pilot: of the pilot, and of validation. Default 512.

    Raises:
        IntaglioError: a number is out of range.
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

    def __post_init__(self) -> None:
        if not 2 <= self.columns <= 26 or self.height < 1 or self.columns * (self.height + 1) > 62:
            raise IntaglioError(f"a board of {self.columns} columns of {self.height} does not fit 62 bits")
        if not 2 <= self.line <= max(self.columns, self.height):
            raise IntaglioError(f"line is {self.line}; from 2 to the longer side of the board is accepted")
        if not 0 <= self.skill <= 1:
            raise IntaglioError(f"skill is {self.skill}; it is a probability")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """How each token is spelled, by id: specials, then a letter a column."""
        return SPECIAL + tuple(chr(ord("a") + column) for column in range(self.columns))

    @property
    def properties(self) -> tuple[str, ...]:
        """What can be asked of a position, in the order of `Boards.true_PK`."""
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
        found = []
        for column, row in product(range(self.columns), range(self.height)):
            for right, up in ((1, 0), (0, 1), (1, 1), (1, -1)):
                line = [(column + n * right, row + n * up) for n in range(self.line)]
                if all(0 <= c < self.columns and 0 <= r < self.height for c, r in line):
                    found.append(line)
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest game T."""
        return self.columns * self.height + 2

    @property
    def objective(self) -> CausalLM:
        """Next-token prediction, a game a row."""
        return CausalLM(length=self.longest, pack=False)

    @property
    def cells(self) -> int:
        """How many of the properties, from the first on, are discs: the board itself."""
        return 2 * self.columns * self.height

    def new(self, seed: int, activation: str, inner: int | None = None) -> Checkpoint:
        """A model of the world's size, of GPT-2's architecture, with random weights.

        Args:
            seed: of the weights.
            activation: of its MLPs, as transformers spells it.
            inner: units of them. Default: the world's.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "gpt2",
            vocab_size=len(self.vocabulary),
            n_positions=self.longest,
            n_embd=self.width,
            n_layer=self.depth,
            n_head=self.heads,
            n_inner=inner or self.inner,
            activation_function=activation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
        return Checkpoint(model, None, source="board game")

    def recipe(self, seed: int, steps: int | None = None) -> dict[str, Any]:
        """How models of this world are trained: keyword arguments of `intaglio.trainer.train`.

        Args:
            seed: of the order of the games.
            steps: Default: the world's.
        """
        return {
            "steps": steps or self.steps,
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
            "final_share": 0.1,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "seed": seed % 2**32,
            "objective": self.objective,
        }

    def base(self, seed: int, activation: str, progress: Progress = no_progress) -> Checkpoint:
        """The dense model that all arms with an activation begin with.

        It is trained once and then found in the user's cache. Models of both activations begin with the same weights
        and see the same games.

        Args:
            seed: of weights and games.
            activation: of its MLPs.
            progress: called after each step of a training.
        """
        settings, found = asdict(self), versions()
        decided = {
            "seed": seed,
            "activation": activation,
            "settings": {name: settings[name] for name in _DECIDES},
            "code": _code(),
            "versions": {package: found[package] for package in ("torch", "transformers", "numpy")},
        }

        def make(target: Path, scratch: Path) -> None:
            checkpoint = self.new(seed % 2**32, activation)
            games = self.games("train", f"base:{seed}", self.base_steps * self.batch)
            recipe = self.recipe(seed, self.base_steps)
            with torch_threads(1):  # two of two processes that share two cores wait for each other
                train(checkpoint, games.examples(), directory=scratch, progress=progress, **recipe)
            checkpoint.write_files(target)

        return load(made("board_game", decided, make))

    def training(self, seed: int) -> Games:
        """The games of the training that follows, `steps * batch` of them.

        Args:
            seed: decides them.
        """
        return self.games("train", f"{seed}", self.steps * self.batch)

    def boards(self, part: Part, seed: int) -> Boards:
        """As many games of a set as it is read with, and what is true in them.

        Args:
            part: which set.
            seed: decides them; those of `train` are drawn apart from the games that are trained on.
        """
        counts = {"train": self.games_read, "evaluation": self.games_run}
        found = self.games(part, f"boards:{seed}", counts.get(part, self.games_pilot))
        return Boards(found, torch.from_numpy(self.state(found.ids_NT.numpy()))[found.played_NT])

    def games(self, part: Part, key: str, count: int) -> Games:
        """Games of a set.

        Args:
            part: which set.
            key: decides the games.
            count: N; fewer are the first ones of more.

        Raises:
            IntaglioError: there is no such set, or fewer than one game is asked for.
        """
        check_part(part, BOUNDS)
        check_count("games", count)
        letters = np.array(self.vocabulary[len(SPECIAL) :])
        found: list[np.ndarray] = []
        chunk = 0
        while len(found) < count:
            uniform_NLU = generator(f"board game:{part}:{key}:{chunk}").random((CHUNK, self.longest - 2, 2))
            for moves_L, length in zip(*self.play(uniform_NLU), strict=True):
                if part_of("".join(letters[moves_L[:length]]), BOUNDS) == part:
                    found.append(moves_L[:length])
            chunk += 1
        ids_NT = np.full((count, self.longest), PAD, dtype=np.int64)
        ids_NT[:, 0] = BEGIN
        for ids_T, moves_L in zip(ids_NT, found, strict=False):
            ids_T[1 : 1 + len(moves_L)] = len(SPECIAL) + moves_L
            ids_T[1 + len(moves_L)] = END
        return Games(torch.from_numpy(ids_NT))

    def play(self, uniform_NLU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Games played to their end: columns [N, L], of which the first `lengths` [N] count.

        Args:
            uniform_NLU: two numbers a move, from 0 to 1: whether the player is heedful, and which column of those.
        """
        games = len(uniform_NLU)
        own_N, other_N = np.zeros((2, games), dtype=np.int64)
        height_NC = np.zeros((games, self.columns), dtype=np.int64)
        moves_NL = np.zeros(uniform_NLU.shape[:2], dtype=np.int64)
        lengths_N = np.zeros(games, dtype=np.int64)
        going_N = np.ones(games, dtype=bool)
        for move in range(uniform_NLU.shape[1]):
            free_NC, wanted_NC = self._wanted(own_N, other_N, height_NC)
            heeds_N = uniform_NLU[:, move, 0] < self.skill
            heedful_N = heeds_N & wanted_NC.any(1)
            chosen_N = _pick(np.where(heedful_N[:, None], wanted_NC, free_NC), uniform_NLU[:, move, 1])
            disc_N = self._disc(chosen_N, height_NC[np.arange(games), chosen_N])
            moves_NL[going_N, move] = chosen_N[going_N]
            lengths_N += going_N
            own_N, won_N = own_N | disc_N, self._won(own_N | disc_N)
            height_NC[np.arange(games), chosen_N] += free_NC.any(1)
            going_N &= ~won_N & (height_NC < self.height).any(1)
            own_N, other_N = other_N, own_N
            if not going_N.any():
                break
        return moves_NL, lengths_N

    def state(self, ids_NT: np.ndarray) -> np.ndarray:
        """What is true behind every token: properties, bool [N, T, K].

        Args:
            ids_NT: games.
        """
        rows = np.arange(len(ids_NT))
        true_NTK = np.zeros((*ids_NT.shape, len(self.properties)), dtype=bool)
        height_NC = np.zeros((len(ids_NT), self.columns), dtype=np.int64)
        discs_2N = np.zeros((2, len(ids_NT)), dtype=np.int64)
        bits_S = self._disc(*np.divmod(np.arange(self.columns * self.height), self.height))
        cells_WL2 = np.array(self.lines)
        lines_WLS = self._disc(cells_WL2[..., 0], cells_WL2[..., 1])[..., None] == bits_S
        lines_SW = lines_WLS.any(1).T.astype(np.int64)
        for t in range(ids_NT.shape[1]):
            moved_N = ids_NT[:, t] >= len(SPECIAL)
            column_N = np.where(moved_N, ids_NT[:, t] - len(SPECIAL), 0)
            # The first move is at place 1, and players take turns.
            discs_2N[(t - 1) % 2] |= np.where(moved_N, self._disc(column_N, height_NC[rows, column_N]), 0)
            height_NC[rows, column_N] += moved_N
            free_NC = height_NC < self.height
            # Who is to move, and the other.
            threats = [self._winning(discs_2N[(t + who) % 2], height_NC) & free_NC for who in (0, 1)]
            board_2NS = (discs_2N[:, :, None] & bits_S) != 0
            threats_N2 = np.stack([threat_NC.any(1) for threat_NC in threats], axis=1)
            held_2NW = board_2NS.astype(np.int64) @ lines_SW
            lacks_2NW = (held_2NW == self.line - 1) & (held_2NW[::-1] == 0)
            true_NTK[:, t] = np.concatenate([*board_2NS, *lacks_2NW, ~free_NC, threats_N2], axis=1)
        return true_NTK

    def nats(self, games: Games) -> float:
        """What the next token costs who knows the board and how it is played: the mean over all tokens but the first.

        Args:
            games: N of them.
        """
        ids_NT = games.ids_NT.numpy()
        lost, told = 0.0, 0
        rows = np.arange(len(ids_NT))
        height_NC = np.zeros((len(ids_NT), self.columns), dtype=np.int64)
        discs_2N = np.zeros((2, len(ids_NT)), dtype=np.int64)
        for t in range(1, ids_NT.shape[1]):
            moved_N = ids_NT[:, t] >= len(SPECIAL)
            column_N = np.where(moved_N, ids_NT[:, t] - len(SPECIAL), 0)
            own_N, other_N = discs_2N[(t - 1) % 2], discs_2N[t % 2]
            chance_N = self._chance(own_N, other_N, height_NC, column_N)
            lost -= float(np.log(chance_N[moved_N]).sum())
            told += int((ids_NT[:, t] != PAD).sum())  # that a game has ended is known
            own_N |= np.where(moved_N, self._disc(column_N, height_NC[rows, column_N]), 0)
            height_NC[rows, column_N] += moved_N
        return lost / told

    def _chance(
        self, own_N: np.ndarray, other_N: np.ndarray, height_NC: np.ndarray, column_N: np.ndarray
    ) -> np.ndarray:
        """The probability of a move [N]."""
        free_NC, wanted_NC = self._wanted(own_N, other_N, height_NC)
        rows, wanted_N, free_N = np.arange(len(own_N)), wanted_NC.sum(1), np.maximum(free_NC.sum(1), 1)
        heeded_N = wanted_NC[rows, column_N] / np.maximum(wanted_N, 1)
        at_random_N = free_NC[rows, column_N] / free_N
        return np.where(wanted_N > 0, self.skill * heeded_N + (1 - self.skill) * at_random_N, at_random_N)

    def _wanted(self, own_N: np.ndarray, other_N: np.ndarray, height_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns that are not full, and those that a heedful player chooses from, bool [N, C]."""
        free_NC = height_NC < self.height
        wins_NC, blocks_NC = (self._winning(board_N, height_NC) & free_NC for board_N in (own_N, other_N))
        return free_NC, np.where(wins_NC.any(1, keepdims=True), wins_NC, blocks_NC)

    def _disc(self, column: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The bit of a cell; a column has one bit more than it holds, always 0, so that lines end there."""
        return np.left_shift(np.int64(1), column * (self.height + 1) + row)

    def _won(self, board: np.ndarray) -> np.ndarray:
        """Whether there is a line on the board of one player."""
        found = np.zeros(board.shape, dtype=bool)
        for step in (1, self.height, self.height + 1, self.height + 2):
            line = board.copy()
            for place in range(1, self.line):
                line &= board >> (place * step)
            found |= line != 0
        return found

    def _winning(self, board_N: np.ndarray, height_NC: np.ndarray) -> np.ndarray:
        """Whether a disc in each column would win, bool [N, C]."""
        return self._won(board_N[:, None] | self._disc(np.arange(self.columns), height_NC))


def _pick(among_NC: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
    """One of the columns that are marked, each as likely as the others [N]; 0 where none is."""
    count_N = among_NC.sum(1)
    wanted_N = np.minimum((uniform_N * count_N).astype(np.int64), np.maximum(count_N - 1, 0)) + 1
    chosen: np.ndarray = (np.cumsum(among_NC, axis=1) >= wanted_N[:, None]).argmax(1)
    return chosen


@lru_cache(maxsize=1)
def _code() -> dict[str, str]:
    """The code that decides the first training's model."""
    return code_of("intaglio.trainer", "intaglio.evidence.worlds.board_game")
