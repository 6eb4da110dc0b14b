"""Compression of a layer's gradient: the projected widths and the seeded matrices.

A layer's gradient ``G`` (O x I) becomes ``P_o G P_i^T`` (k_o x k_i). Every kind is scaled so that
``E[P^T P] = I``: an inner product of two projected gradients is an unbiased estimate of the full
one.

Source: the two-sided random projection of LoGra, arXiv:2405.13954.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.layers import EXPERTS, TargetLayer
from gradproj.engine.matrix_file import Matrices, given_widths, read_matrices
from gradproj.engine.patterns import ALL, EXACT, EXCLUDES
from gradproj.engine.rank_totals import RankTotals
from gradproj.errors import ConfigError
from gradproj.flags import Flags, as_in, flag, flag_of, split_list
from gradproj.store.layout import LayerSlice

BASES = ("eigen", "random")
DEFAULT_RANK_TOTAL = 4096
"""Of the job: 64 x 64. A training run, whose rows are dense, keeps fewer."""
PROJECTION_VERSION = 1
"""Part of every matrix's key. Raise it if a change gives other numbers for the same seed."""


def _words(key: str, count: int) -> np.ndarray:
    """Return ``count`` uint64 words of a counter-based generator (Philox 4x64) keyed by ``key``.

    Only the raw stream is used: numpy guarantees it across versions, unlike its distributions.
    """
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(count)


def _normal(key: str, k: int, n: int) -> np.ndarray:
    """Return ``(k, n)`` float64 standard normals by the Box-Muller transform."""
    half = (k * n + 1) // 2
    # Uniform in (0, 1]: the logarithm of 0 is infinite.
    uniform = ((_words(key, 2 * half) >> np.uint64(11)) + 1).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: k * n].reshape(k, n)


def _rademacher(key: str, k: int, n: int) -> np.ndarray:
    words = _words(key, (k * n + 63) // 64).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=k * n, bitorder="little")
    return (bits.astype(np.float32) * 2 - 1).reshape(k, n) / np.sqrt(k)


def _orthonormal(key: str, k: int, n: int) -> np.ndarray:
    q, r = np.linalg.qr(_normal(key, k, n).T)
    # QR fixes a column only up to its sign. The sign of r's diagonal makes the law uniform (Haar).
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T * np.sqrt(n / k)


PROJECTIONS: dict[str, Callable[[str, int, int], np.ndarray]] = {
    "rademacher": _rademacher,
    "gaussian": lambda key, k, n: _normal(key, k, n) / np.sqrt(k),
    "orthonormal": _orthonormal,
}
"""Kind -> ``(key, k, n) -> (k, n)`` with ``E[P^T P] = I``. The tests run for every entry."""


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(Flags, title="projection"):
    """Compression settings. Recorded in the store; part of the run's identity."""

    layers: str = flag(
        "Layers to project: all, those of the model's blocks; or roles (attn, mlp, mixer, experts, "
        "router, lm_head) and parts of dotted names, as whole components; * in a component stands "
        "for any characters, and a - before a part leaves its layers out.",
        ALL,
        name="proj_layers",
        comma_separated=True,
        metavar="NAME",
    )
    rank_total: str | int = flag(
        "Largest number of values stored per layer, k_i * k_o; or by parts of layers' names, such "
        "as down_proj:16384,o_proj:4096,-q_proj, where a - leaves layers out.",
        256,
        name="proj_rank_total",
        comma_separated=True,
        metavar="N|NAME:N",
    )
    rank_min: int = flag(
        "Smallest projected width of a side (or the side's own width, if that is less).",
        8,
        name="proj_rank_min",
        minimum=1,
    )
    seed: int = flag("Seed of the projection matrices.", 42, name="proj_seed")
    kind: str = flag(
        "Distribution of the projection matrices.",
        "rademacher",
        name="proj_kind",
        choices=PROJECTIONS,
    )
    include_embeddings: bool = flag("Project the token embedding's gradient as well.", False)
    experts: str = flag(
        "A projection of fused experts as one layer with a random sign for each input and expert "
        "(joint), as a layer for each expert (separate), or left out, like routers (none).",
        "joint",
        choices=EXPERTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        text = str(self.rank_total).strip()
        RankTotals.parse(text, 1)  # raises
        if text.isdigit():  # recorded as a number, as by format 1
            object.__setattr__(self, "rank_total", int(text))
        if self.include_embeddings or any(not p.startswith(EXCLUDES) for p in self.patterns):
            return
        what = "names only layers to leave out" if self.patterns else "is empty"
        way = ",".join((ALL, *self.patterns))
        raise ConfigError(f"--proj_layers {what}; name layers, for example --proj_layers {way}")

    @property
    def rank_totals(self) -> RankTotals:
        """``rank_total``; layers that no pattern names have this class's default."""
        return RankTotals.parse(self.rank_total, int(type(self).rank_total))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of ``layers``, and of what ``rank_total`` leaves out."""
        return split_list(self.layers) + self.rank_totals.excluded

    def of_layers(self, layers: Sequence[LayerSlice]) -> Self:
        """Return the settings that take exactly these layers: those of a plan, or of a store."""
        return replace(self, layers=",".join(EXACT + layer.name for layer in layers))


@dataclass(frozen=True, kw_only=True)
class JobProjectionConfig(ProjectionConfig):
    """Compression settings of the job, which can take matrices of one's own."""

    rank_total: str | int = as_in(
        ProjectionConfig, "rank_total", default=DEFAULT_RANK_TOTAL, flag="proj_rank_total"
    )
    matrices: str = flag(
        "safetensors file of matrices to use in place of drawn ones: LAYER.p_i (k_i, n_i) and "
        "LAYER.p_o (k_o, n_o) for each layer.",
        "",
        path="FILE",
    )
    basis: str = flag(
        "Basis of a layer's values: eigen, the eigenvectors of token covariances that a pilot pass "
        "measures before the store is made, scaled to equal variance; or random, the matrices as "
        "they are drawn.",
        "eigen",
        choices=BASES,
    )
    bytes_per_document: str = flag(
        "Most bytes of a row, such as 5k or 25k, scales and padding too: chooses layers, widths "
        "and encoding by what was measured to answer best, in place of --proj_rank_total.",
        "",
        metavar="N",
    )
    pilot_tokens: int = flag(
        "Fewest target tokens of the pilot, from documents all over the corpus.",
        131072,
        minimum=1,
    )
    basis_from: str = flag(
        "Output of a job whose basis this store takes, without a pilot: so one store's rows can be "
        "the other's queries.",
        "",
        path="DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [
            f"--{flag_of(f)}"
            for f in fields(self)
            if f.name in ("rank_total", "rank_min", "seed", "kind")
            and getattr(self, f.name) not in (f.default, getattr(ProjectionConfig, f.name))
        ]
        if self.bytes_per_document and (changed or self.matrices):
            raise ConfigError(
                "--bytes_per_document chooses the widths of the rows: leave out "
                f"{', '.join(changed or ['--matrices'])}"
            )
        if self.basis_from and self.basis != "eigen":
            raise ConfigError(f"--basis_from {self.basis_from} needs --basis eigen")
        if self.matrices and changed:
            raise ConfigError(
                f"--matrices {self.matrices} holds the matrices and their widths: leave out "
                f"{', '.join(changed)}"
            )


def choose_ki_ko(n_i: int, n_o: int, rank_total: int = 256, rank_min: int = 8) -> tuple[int, int]:
    """Split a layer's budget of ``rank_total`` values between its two sides.

    Of all ``(k_i, k_o)`` with ``k_i * k_o <= rank_total``, choose the pair with the least ``(1 +
    2/k_i)(1 + 2/k_o)``, which is the relative second moment of an inner product's estimate under
    two-sided projection. Ties go to the least arithmetic, ``k_i n_i + k_o n_o``.

    Args:
        n_i: the layer's input width.
        n_o: the layer's output width.
        rank_total: most values kept, ``k_i * k_o``.
        rank_min: each side keeps at least ``min(rank_min, n)`` and at most ``n``.

    Returns:
        ``(k_i, k_o)``.

    Raises:
        ConfigError: the least widths alone exceed the budget.
    """
    arguments = {"n_i": n_i, "n_o": n_o, "rank_total": rank_total, "rank_min": rank_min}
    for name, value in arguments.items():
        if value < 1:
            raise ConfigError(f"choose_ki_ko: {name} must be at least 1, got {value}")
    least_i, least_o = min(rank_min, n_i), min(rank_min, n_o)
    if least_i * least_o > rank_total:
        raise ConfigError(
            f"--proj_rank_total {rank_total} cannot hold {least_i} x {least_o} values of a layer "
            f"{n_i} -> {n_o} with --proj_rank_min {rank_min}: give at least --proj_rank_total "
            f"{least_i * least_o}, or at most --proj_rank_min {int(rank_total**0.5)}"
        )
    widths = range(least_i, min(n_i, rank_total // least_o) + 1)
    candidates = [(k_i, min(n_o, rank_total // k_i)) for k_i in widths]
    return min(candidates, key=lambda k: ((1 + 2 / k[0]) * (1 + 2 / k[1]), k[0] * n_i + k[1] * n_o))


def projection_matrix(kind: str, seed: int, layer: str, side: str, k: int, n: int) -> Tensor:
    """Return the matrix of one side (``"i"``, ``"o"``) of a layer, ``(k, n)`` float32 on the CPU.

    It is a function of its arguments alone: other layers, ranks and torch's generators play no
    part.
    """
    key = f"gradproj/{PROJECTION_VERSION}/{seed}/{kind}/{layer}/{side}/{k}x{n}"
    return torch.from_numpy(np.ascontiguousarray(PROJECTIONS[kind](key, k, n), dtype=np.float32))


def draw_signs(seed: int, layer: str, n_experts: int, n_i: int) -> Tensor:
    """Return the signs that make one layer of all experts, ``(E, n_i)`` int8 on the CPU.

    Their inputs side by side, times the signs and added up, are a projection with ``E[P^T P] = I``
    of what E matrices side by side have as inputs.
    """
    key = f"gradproj/{PROJECTION_VERSION}/{seed}/signs/{layer}/{n_experts}x{n_i}"
    return torch.from_numpy(np.sign(_rademacher(key, n_experts, n_i)).astype(np.int8))


def place_widths(
    targets: Sequence[TargetLayer], config: ProjectionConfig, matrices: Matrices | None = None
) -> list[LayerSlice]:
    """Return every target layer's place in a row. Layers on the meta device are enough.

    ``matrices``, if given, set the widths. ``ConfigError`` if they do not fit the layers.
    """
    placed, start, totals = [], 0, config.rank_totals
    if matrices is None:
        totals.check_used(target.name for target in targets)
    for target in targets:
        n_i, n_o = target.widths
        if matrices is None:
            k_i, k_o = choose_ki_ko(n_i, n_o, totals.of(target.name), config.rank_min)
        else:
            k_i, k_o = given_widths(matrices, target.name, n_i, n_o)
        stop = start + k_i * k_o
        kind = target.rule.type_name
        placed.append(LayerSlice(target.name, kind, n_i, n_o, k_i, k_o, start, stop))
        start = stop
    return placed


def job_matrices(
    config: JobProjectionConfig, layers: Sequence[LayerSlice]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices of a new store's layers: those of ``--matrices``, or drawn ones."""
    if config.matrices:
        given = read_matrices(config.matrices)
        return {layer.name: given[layer.name] for layer in layers}
    return {layer.name: draw_matrices(config, layer) for layer in layers}


def draw_matrices(config: ProjectionConfig, layer: LayerSlice) -> tuple[Tensor, Tensor]:
    """Return ``(P_i (k_i, n_i), P_o (k_o, n_o))`` of a layer, float32 on the CPU."""
    key = config.kind, config.seed, layer.name
    p_i = projection_matrix(*key, "i", layer.k_i, layer.n_i)
    return p_i, projection_matrix(*key, "o", layer.k_o, layer.n_o)
