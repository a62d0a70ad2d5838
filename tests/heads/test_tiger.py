from __future__ import annotations

from typing import Any, ClassVar

from llmrec.heads.tiger import TIGERHead
from tests.contracts.heads import GenerativeHeadContract

SMALL: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 64, "dropout": 0.0}


class TestTIGER(GenerativeHeadContract):
    head_class = TIGERHead
    options: ClassVar[dict[str, Any]] = {**SMALL, "beams": 12}


class TestCoFiRecDecoding(GenerativeHeadContract):
    head_class = TIGERHead
    options: ClassVar[dict[str, Any]] = {**SMALL, "beams": 12, "level_embeddings": True, "item_positions": True}
