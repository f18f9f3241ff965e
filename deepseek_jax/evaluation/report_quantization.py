"""The picture of what FP8 does to a run's tensors, from the records of `tools.quantization_stats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_PANELS = {"relative_error": "Relative error", "underflow": "Underflow"}


def quantization_maps(document: Mapping[str, Any]) -> tuple[Figure, str]:
    """Relative error and share of underflow by layer and role, of each layer's tensors the largest, and a caption.

    `document`: `tensors`, records with `layer`, `role`, `tile` and these numbers in the order in which layers follow
    each other; `step`, and `own_fp8`, whether the run trains so.
    """
    tensors = document["tensors"]
    caption = (
        f"One batch at step {document.get('step')}. Of each layer's tensors the one that fares worst. Underflow: "
        "values that are not zero and become zero. Clipped beyond the largest number: "
        f"{max(tensor['clipped'] for tensor in tensors):.2%} at most."
    )
    if not document.get("own_fp8", True):
        caption += " This run does not train in FP8: it is what DeepSeek-V3's would do to its tensors."
    layers = list(dict.fromkeys(tensor["layer"] for tensor in tensors))
    roles = list(dict.fromkeys((tensor["role"], tensor["tile"]) for tensor in tensors))
    figure = Figure(figsize=(11, 1.9 + 0.28 * len(layers)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), _PANELS.items(), strict=True):
        values = np.full((len(layers), len(roles)), np.nan)
        for tensor in tensors:
            place = layers.index(tensor["layer"]), roles.index((tensor["role"], tensor["tile"]))
            values[place] = np.fmax(values[place], 100 * tensor[name])
        top = max(np.nanmax(values), 1e-3)
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * top, aspect="auto")
        if len(layers) <= 24:
            for row, column in np.argwhere(np.isfinite(values)):
                axes.text(column, row, f"{values[row, column]:.2g}", ha="center", va="center", fontsize=8)
        axes.set_title(f"{title}, %")
        axes.set_xticks(range(len(roles)), [f"{role}\n{tile}" for role, tile in roles], rotation=60, fontsize=8)
        shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 24)).round().astype(int))
        axes.set_yticks(shown, [layers[i] for i in shown])
        axes.grid(False)
    return figure, caption
