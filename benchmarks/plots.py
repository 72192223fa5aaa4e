"""Draw the pictures of the READMEs and of RESULTS.md from results.json: `python benchmarks/plots.py`.

Each picture is an SVG for light pages and one for dark pages, in benchmarks/plots.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
OURS, OTHERS = "#2a78d6", "#9a9890"
INKS = {"light": "#333333", "dark": "#dddddd"}
CACHE_BYTES = 4 * 28 * 4096  # keys and values of a token in half precision, in the 6B shape


def gpu_batch(axes: Axes, given: dict) -> None:
    """Tokens per second against sequences, with the time to read weights and cache as the limit."""
    points = given["points"]
    sequences = [point["sequences"] for point in points]
    reached = [point["tokens_per_second"] for point in points]
    limits = [
        point["sequences"]
        * given["bandwidth"]
        / (given["weights"] + point["sequences"] * point["context"] * CACHE_BYTES)
        for point in points
    ]
    axes.loglog(sequences, limits, "--", color=OTHERS, label="limit: reading weights and cache")
    axes.loglog(sequences, reached, "o-", color=OURS, label="chatglm-int8")
    for point in points:
        place = (point["sequences"], point["tokens_per_second"])
        axes.annotate(f"{point['tokens_per_second']:,}", place, xytext=(8, -6), textcoords="offset points")
    axes.set(
        title="Decoding on one H200", xlabel="sequences, and tokens of context", ylabel="tokens/s", xlim=(0.6, 400)
    )
    axes.set_xticks(sequences, [f"{point['sequences']}\n({point['context']})" for point in points])
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left")


def gpu_peers(axes: Axes, given: dict) -> None:
    """Tokens per second of one sequence, beside other ways."""
    speeds = given["tokens_per_second"]
    labels = [str(low) if low == high else f"{low} to {high}" for low, high in speeds.values()]
    _bars(axes, {name: high for name, (_, high) in speeds.items()}, labels)
    axes.set(title="One sequence on one H200", xlabel="tokens/s")


def cpu_linears(axes: Axes, given: dict) -> None:
    """INT8 weights read per second, over what a plain loop reads, beside PyTorch's kernel."""
    machines = given["share_of_bandwidth"]
    for offset, (name, color) in enumerate({"torch _weight_int8pack_mm": OTHERS, "chatglm-int8": OURS}.items()):
        places = [place + 0.38 * offset for place in range(len(machines))]
        values = [machine[name] for machine in machines.values()]
        bars = axes.barh(places, values, height=0.36, color=color, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks([place + 0.19 for place in range(len(machines))], machines)
    axes.axvline(1, linestyle="--", color=OTHERS, linewidth=1)
    axes.set(title="INT8 linears on CPUs, one row", xlabel="weights read, over reading memory", xlim=(0, 1.4))
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper center", bbox_to_anchor=(0.3, -0.2), ncols=2)


def lora_memory(axes: Axes, given: dict) -> None:
    """GPU memory of fine-tuning."""
    _bars(axes, given["gibibytes"])
    axes.set(title="LoRA on one H200", xlabel="GiB of GPU memory")


def _bars(axes: Axes, values: dict[str, float], labels: list[str] | None = None) -> None:
    """One bar for each value; the names of INT8 and of this package stand out."""
    colors = [OURS if name in ("chatglm-int8", "INT8") else OTHERS for name in values]
    axes.bar_label(axes.barh(list(values), list(values.values()), color=colors), labels, padding=3, fontsize=8)
    axes.margins(x=0.15)


PICTURES: dict[str, Callable[[Axes, dict], None]] = {
    function.__name__: function for function in (gpu_batch, gpu_peers, cpu_linears, lora_memory)
}


def draw(name: str, given: dict, theme: str, path: Path) -> None:
    """Draw a picture for the theme "light" or "dark"."""
    ink = INKS[theme]
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    fixed = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "figure.constrained_layout.use": True}
    with pyplot.rc_context({**colors, **fixed, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(5.2, 2.8))
        PICTURES[name](axes, given)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--output", type=Path, default=HERE / "plots")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        for theme in INKS:
            draw(name, results[name], theme, arguments.output / f"{name}_{theme}.svg")


if __name__ == "__main__":
    main()
