"""The run's report: loss and learning rate as one PNG, and one HTML file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.trainers.dialect import KeyFate
from adapterhub.trainers.watch import METRICS, read_metrics

if TYPE_CHECKING:
    from adapterhub.trainers.fit import Fitted
    from adapterhub.trainers.prepare import Prepared

_METHODS = {
    None: "supervised", "dpo": "DPO, on pairs", "ipo": "IPO, on pairs", "kto": "KTO, on judged answers",
    "orpo": "ORPO, on pairs", "simpo": "SimPO, on pairs",
}  # fmt: skip
PNG, HTML = "curves.png", "report.html"
_BLUE, _ORANGE, _GREEN, _GREY = "#2563eb", "#ea580c", "#059669", "#64748b"


def write_report(
    folder: Path,
    *,
    prepared: Prepared,
    fitted: Fitted,
    fates: Sequence[KeyFate],
    environment: Mapping[str, str],
) -> None:
    """Write ``curves.png`` and ``report.html`` from ``metrics.jsonl``."""
    metrics = read_metrics(folder / METRICS)
    title = str(prepared.config.name or folder.name)
    best = prepared.config.load_best_model_at_end
    (folder / PNG).write_bytes(draw(metrics, title=title, form="png", best=best))
    svg = draw(metrics, title=None, form="svg", best=best).decode()
    page = _page(title, svg[svg.index("<svg") :], prepared, fitted, fates, environment)
    (folder / HTML).write_text(page, encoding="utf-8")


def draw(metrics: Sequence[Mapping[str, Any]], *, title: str | None, form: str, best: bool = False) -> bytes:
    """The curves as ``png`` or ``svg`` bytes; the number stands at the last evaluation, or at the ``best`` one."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [line for line in metrics if line.get("loss") is not None]
    evals = [line for line in metrics if line.get("eval_loss") is not None]
    margins = any("reward_margin" in line for line in metrics)
    x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    style = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "adapterhub", "font.family": "DejaVu Sans"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 7.2 if margins else 5.6), layout="constrained")
        top, *middle, bottom = figure.subplots(2 + margins, 1, sharex=True, height_ratios=(3, *[1.5] * margins, 1))
        for axes in middle:
            _draw_margins(axes, metrics)
        top.plot(x, losses, color=_BLUE, linewidth=1, alpha=0.35 if len(x) > 8 else 1, label="training loss")
        if len(x) > 8:
            top.plot(x, smooth(losses), color=_BLUE, linewidth=2, label="training loss, smoothed")
        if evals:
            at, values = [line["step"] for line in evals], [line["eval_loss"] for line in evals]
            top.plot(at, values, color=_ORANGE, marker="o", markersize=6, linewidth=1.5, label="evaluation loss")
            shown = values.index(min(values)) if best else -1
            top.annotate(
                f"{values[shown]:.3f}", (at[shown], values[shown]), xytext=(-4, 9), textcoords="offset points",
                ha="right", color=_ORANGE, weight="bold",
            )  # fmt: skip
        top.set_ylabel("loss" if margins else "loss (nats per token)")
        if not losses or min(losses) >= 0:  # a mixture of losses for pairs may be below
            top.set_ylim(bottom=0)
        top.legend(frameon=False, loc="upper right")
        bottom.plot(x, [line["learning_rate"] for line in steps], color=_GREEN, linewidth=1.5)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, *middle, bottom):
            axes.grid(visible=True, color="#e2e8f0", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#94a3b8")
            axes.tick_params(colors=_GREY)
        if title:
            figure.suptitle(title, weight="bold", x=0.02, ha="left")
        buffer = io.BytesIO()
        if form == "svg":
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        else:
            figure.dpi = 160
            FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_margins(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    for key, colour, label in (("reward_margin", _BLUE, "training"), ("eval_reward_margin", _ORANGE, "evaluation")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        marker = "o" if key.startswith("eval_") else None
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.5, label=label)
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.set_ylabel("reward margin")
    axes.legend(frameon=False, loc="upper left")


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean without the pull of its start (Adam's bias correction, arXiv:1412.6980)."""
    weight = max(0.0, min(0.85, 1 - 8 / len(values)))  # over about seven steps, fewer where there are few
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**i))
    return smoothed


def _page(
    title: str,
    svg: str,
    prepared: Prepared,
    fitted: Fitted,
    fates: Sequence[KeyFate],
    environment: Mapping[str, str],
) -> str:
    config, train = prepared.config, prepared.train
    rows = train.rows
    rewards = [
        (name, f"{fitted.evaluation[key]:{form}}")
        for key, name, form in (
            ("eval_reward_margin", "reward margin, evaluation", ".3f"),
            ("eval_reward_accuracy", "chosen before rejected", ".1%"),
        )
        if key in fitted.evaluation
    ]
    cards = [
        (
            "evaluation loss" + (", best" if config.load_best_model_at_end else ""),
            f"{fitted.eval_loss:.4f}" if fitted.eval_loss is not None else "no data",
        ),
        *rewards,
        ("training loss, mean", f"{fitted.train_loss:.4f}"),
        ("steps", f"{fitted.steps:,}"),
        ("seconds", f"{fitted.seconds:,.1f}"),
        ("tokens per second", f"{fitted.tokens / max(fitted.seconds, 1e-9):,.0f}"),
        ("trained parameters", f"{prepared.lora_parameters:,}"),
    ]
    targets = config.lora_target_modules
    facts = [
        ("base", f"{prepared.base.name} ({prepared.base.fingerprint.parameters:,} parameters)"),
        ("method", _METHODS[config.rl]),
        ("adapter", ("DoRA" if config.peft_use_dora else "LoRA")
         + f", rank {config.lora_r}, alpha {config.lora_alpha:g}, on "
         + ("all linear layers" if targets == "all-linear" else _joined(targets))),
        ("training rows", f"{rows:,} with {train.tokens:,} tokens, {train.trained_tokens:,} trained on"
         + (f"; {len(train.dropped)} dropped as too long" if train.dropped else "")
         + (f"; {train.truncated} cut" if train.truncated else "")),
        ("evaluation rows", f"{prepared.evaluation.rows:,}" if prepared.evaluation else "none"),
        ("data", ", ".join(f"{f.path.name} ({f.format}, sha256 {f.sha256[:12]})" for f in prepared.train.files)),
        ("seed", str(config.seed)),
        ("environment", ", ".join(f"{k} {v}" for k, v in environment.items())),
    ]  # fmt: skip
    return _TEMPLATE.format(
        title=escape(title),
        description=escape(config.description or "LoRA training run"),
        cards="".join(f"<div class=card><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in cards),
        svg=svg,
        advice="".join(f"<p class=advice>{escape(text)}</p>" for text in prepared.advice),
        facts=_table(facts),
        fates=_fates(fates),
        config=escape(config.to_yaml()),
    )


def _fates(fates: Sequence[KeyFate]) -> str:
    cells = (
        f"<tr><td><code>{escape(f.key)}</code></td><td><span class='fate {f.kind.split()[0]}'>{escape(f.kind)}</span>"
        f"</td><td>{escape(f.note)}</td><td class=where>{escape(f.where)}</td></tr>"
        for f in fates
    )
    return "".join(cells)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)


def _joined(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · training report</title>
<style>
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #0f172a; background: #f8fafc;
  margin: 0; padding: 2.5rem 1.25rem; }}
main {{ max-width: 60rem; margin: 0 auto; }}
h1 {{ font-size: 1.7rem; margin: 0; letter-spacing: -.01em; }}
h2 {{ font-size: 1.05rem; margin: 2.2rem 0 .7rem; }}
.sub {{ color: #64748b; margin: .2rem 0 1.6rem; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem; }}
.card, .panel {{ background: #fff; border: 1px solid #e2e8f0; border-radius: .6rem; }}
.card {{ padding: .8rem 1rem; display: flex; flex-direction: column; }}
.card b {{ font-size: 1.3rem; font-variant-numeric: tabular-nums; }}
.card span {{ color: #64748b; font-size: .82rem; }}
.panel {{ padding: 1rem; margin-top: 1rem; overflow-x: auto; }}
.panel svg {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; vertical-align: top; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid #f1f5f9; }}
tr:last-child td, tr:last-child th {{ border-bottom: 0; }}
th {{ font-weight: 500; color: #64748b; white-space: nowrap; width: 9.5rem; }}
code, pre {{ font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
pre {{ margin: 0; }}
.fate {{ font-size: .78rem; padding: .1rem .5rem; border-radius: 1rem; white-space: nowrap; }}
.honoured {{ background: #dcfce7; color: #166534; }}
.approximated {{ background: #fef3c7; color: #92400e; }}
.without {{ background: #e2e8f0; color: #475569; }}
.where {{ color: #94a3b8; font-size: .8rem; white-space: nowrap; }}
.advice {{ background: #fffbeb; border: 1px solid #fde68a; border-radius: .6rem; padding: .6rem 1rem;
  margin: 1rem 0 0; }}
</style></head><body><main>
<h1>{title}</h1><p class="sub">{description}</p>
<div class="cards">{cards}</div>
{advice}
<div class="panel">{svg}</div>
<h2>What was trained</h2><div class="panel"><table>{facts}</table></div>
<h2>What became of each key</h2><div class="panel"><table>{fates}</table></div>
<h2>The config, every default filled in</h2><div class="panel"><pre>{config}</pre></div>
</main></body></html>
"""
