"""Classes of diffusers whose calls do not hold their images along axis 0, or whose texts have lengths of their own.

For training on recorded calls (`data/recorded_batches.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tinyfusion.data.recorded_batches import RowLayout

LAYOUTS: Mapping[str, RowLayout] = {
    "HiDreamImageTransformer2DModel": RowLayout(
        axes={"encoder_hidden_states_llama3": 1}
    ),  # (layers, images, tokens, channels)
    "QwenImageTransformer2DModel": RowLayout(texts={"encoder_hidden_states": "encoder_hidden_states_mask"}),
    "ErnieImageTransformer2DModel": RowLayout(texts={"text_bth": None}),  # text_lens says which tokens are real
}
