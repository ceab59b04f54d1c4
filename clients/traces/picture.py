"""A trace as a picture: which experts each layer uses, how they come again, and what caches would hit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertd.clients.traces.statistics import reuse, uses
from expertd.protocol.errors import TraceWriteFailed
from expertd.protocol.traces import Trace


def draw(trace: Trace, rates: Sequence[dict[str, float]], path: Path) -> None:
    """Draw ``trace`` and its ``hit_rates`` into ``path`` (.png, .svg or .pdf).

    Raises:
        TraceWriteFailed: matplotlib is not installed, the ending is unknown, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise TraceWriteFailed("a picture needs matplotlib: pip install 'expertd[pictures]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    info = trace.info
    share = uses(trace) / trace.experts[:, 0].size * info.experts
    figure, (heat, again, caches) = pyplot.subplots(
        1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(2.2, 1, 1.4)
    )
    image = heat.imshow(-np.sort(-share, axis=1), aspect="auto", cmap="magma", vmin=0)
    figure.colorbar(image, ax=heat, label="uses, 1 = the average expert")
    heat.set(title="How uneven each layer is", xlabel="experts, the most used first", ylabel="layer")
    again.plot(100 * reuse(trace), range(info.layers), "o-", color="#b5367a")
    again.invert_yaxis()
    again.set(title="Experts of the token before", xlabel="used again, %", ylabel="layer", xlim=(0, 100))
    for name, label, color in (("belady", "the optimum (Belady)", "#51127c"), ("lru", "LRU", "#fb8761")):
        caches.plot(
            [100 * rate["fraction"] for rate in rates], [100 * rate[name] for rate in rates], "o-",
            label=label, color=color,
        )  # fmt: skip
    caches.set(title="Hits of one pool", xlabel="cached share of all experts, %", ylabel="hits, %", ylim=(0, 100))
    caches.grid(alpha=0.3)
    caches.legend()
    figure.suptitle(f"{info.model or path.stem}: {info.tokens:,} tokens, {info.layers} layers x {info.experts} experts")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise TraceWriteFailed(f"the picture {path} could not be written ({error})") from error
    finally:
        pyplot.close(figure)
