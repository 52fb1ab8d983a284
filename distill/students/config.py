"""Where a student starts: the configuration of ``start.py``."""

import dataclasses
from typing import Literal

from distill.errors import UserError, check_fields
from distill.students.layers import CHOICES


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where the student starts (``distill/students/start.py``)."""

    kind: Literal["random", "embeddings", "teacher", "low_rank", "lora"] = "random"
    choice: Literal[*CHOICES] = "spread"
    """Which of the teacher's layers are kept: evenly spread with both ends, every n-th, first and last, the first."""
    layers: tuple[int, ...] = ()
    """Layers to keep, counted from 0, one for each layer of the student; empty: by ``choice``."""
    rank: int = 8
    """Rank of the factors, for low_rank and lora."""
    alpha: float = 16.0
    """lora: factor of the correction, alpha/rank."""
    kernels: tuple[str, ...] = ()
    """Kernels with factors, of ``parameters.KERNELS``; empty: all of the layers."""
    weighted: bool = False
    """low_rank: weights rows of a kernel by the cost of an error in them on the calibration batches."""
    share_embeddings: bool = False
    """Shares embedding and head with the teacher: frozen, and held once in memory. The widths must be equal."""

    def __post_init__(self):
        check_fields(self, "student_start", self._read)
        if self.rank < 1 or not self.alpha > 0.0:
            raise UserError(f"student_start: rank={self.rank}, alpha={self.alpha}; expected rank ≥ 1 and alpha > 0.")

    def _read(self) -> dict[str, tuple[bool, str]]:
        cut, factors = (self.cut, "kind teacher, low_rank or lora"), (self.factors, "kind low_rank or lora")
        read = {"choice": cut, "layers": cut, "rank": factors, "kernels": factors}
        read |= {"alpha": (self.kind == "lora", "kind lora"), "weighted": (self.kind == "low_rank", "kind low_rank")}
        return read | {"share_embeddings": (self.kind != "lora", "another kind than lora, which shares all")}

    @property
    def cut(self) -> bool:
        """Whether the student is cut out of the teacher."""
        return self.kind in ("teacher", "low_rank", "lora")

    @property
    def factors(self) -> bool:
        """Whether kernels are, or are corrected by, products of two factors."""
        return self.kind in ("low_rank", "lora")

    @property
    def tables(self) -> bool:
        """Whether embedding and head are the teacher's."""
        return self.kind == "embeddings" or self.share_embeddings

    @property
    def plain(self) -> bool:
        """Whether what is learnt is all of a plain decoder's parameters."""
        return not (self.factors or self.share_embeddings)
