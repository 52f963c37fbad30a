"""Puts what `make bench-autoscale` found into docs/autoscaling-benchmark.md and the plots beside it: no figure there is written by hand.

    autoscale.py RESULT.json      what bench-autoscale left; a copy stays in docs/autoscaling
"""

import json
import sys

from page import DOCS, short, table, ticks

BEGIN, END = "<!-- measured: make bench-autoscale writes this -->", "<!-- /measured -->"
FOLDER = DOCS / "autoscaling"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 300, 56, 160, 36, 44
COLOURS = {"Strata": "#0969da", "fixed fleet": "#57606a", "HPA on KV use": "#bf5700", "KEDA on waiting": "#8250df",
           "KEDA on all requests": "#bf3989", "llm-d saturation 1": "#1a7f37", "llm-d saturation 2": "#9a6700", "present known": "#0e7490", "foresight": "#1f2328"}
WANTED = 0.99


def text(x, y, words, anchor="middle", fill="#57606a"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def frame(title, unit, body):
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" role="img">',
            f"<title>{title}</title>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', text(LEFT, 20, f"{title}, {unit}", "start", "#1f2328")]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def axes(top, y):
    for value in ticks(top):
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#d0d7de"/>'
        yield text(LEFT - 8, y(value) + 4, f"{value:g}", "end")


def chosen(scenario):
    """Of each family the cheapest that attains the objective, or the one that comes closest to it."""
    families = {}
    for result in scenario["results"]:
        families.setdefault(result["family"], []).append(result)
    pick = lambda results: min((r for r in results if r["attainment"] >= WANTED), key=lambda r: r["gpu_hours"], default=None) or \
        max(results, key=lambda r: (r["attainment"], -r["gpu_hours"]))
    return [pick(results) for results in families.values()]


def over_time(scenario, families, title):
    """Ready servers over time, and the requests behind them."""
    lines = [r for r in chosen(scenario) if r["family"] in families and r["windows"]]
    top = 1.1 * max(window[4] for line in lines for window in line["windows"])
    end = scenario["seconds"]
    x = lambda at: LEFT + at / end * (WIDTH - LEFT - RIGHT)
    y = lambda value: HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
    body = list(axes(top, y))
    loads = lines[0]["windows"]
    most = max(window[1] for window in loads)
    area = " ".join(f"{x(at):.1f},{y(requests / most * top * 0.9):.1f}" for at, requests, *_ in loads)
    body.append(f'<polygon fill="#eaeef2" points="{x(0):.1f},{y(0):.1f} {area} {x(loads[-1][0]):.1f},{y(0):.1f}"/>')
    for index, line in enumerate(lines):
        colour = COLOURS[line["family"]]
        points, before = [], None
        for at, _, _, _, ready in line["windows"]:
            if before is not None:
                points.append(f"{x(at):.1f},{y(before):.1f}")
            points.append(f"{x(at):.1f},{y(ready):.1f}")
            before = ready
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(points)}"/>')
        body.append(text(WIDTH - RIGHT + 8, TOP + 16 + 18 * index, f"{line['family']} {line['setting']}", "start", colour))
    body.append(text(WIDTH - RIGHT + 8, TOP + 16 + 18 * len(lines), "shaded: requests", "start"))
    unit, step = ("hour", 3600) if end > 7200 else ("minute", 60)
    for value in ticks(end / step):
        body.append(text(x(value * step), HEIGHT - BOTTOM + 18, f"{value:g}"))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, unit))
    return frame(title, "servers", body)


def against(scenario, title):
    """Each setting: what it costs, and how often the objective is kept."""
    results = [r for r in scenario["results"] if r["attainment"] >= 0.7]
    most = 1.05 * max(r["gpu_hours"] for r in results)
    x = lambda value: LEFT + value / most * (WIDTH - LEFT - RIGHT)
    y = lambda value: HEIGHT - BOTTOM - (value - 0.7) / 0.31 * (HEIGHT - TOP - BOTTOM)
    body = []
    for value in (0.7, 0.8, 0.9, 0.99):
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="{"#57606a" if value == WANTED else "#d0d7de"}"/>')
        body.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for result in results:
        radius = 6 if result["family"] == "Strata" else 3.5
        body.append(f'<circle cx="{x(result["gpu_hours"]):.1f}" cy="{y(result["attainment"]):.1f}" r="{radius}" fill="{COLOURS[result["family"]]}" fill-opacity="0.8"/>')
    for index, (family, colour) in enumerate(COLOURS.items()):
        body.append(text(WIDTH - RIGHT + 8, TOP + 16 + 18 * index, family, "start", colour))
    for value in ticks(most):
        body.append(text(x(value), HEIGHT - BOTTOM + 18, f"{value:g}"))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "accelerator-hours"))
    return frame(title, "share of minutes within the objective", body)


def measured(result):
    out = []
    for scenario in result["scenarios"]:
        summary = scenario["summary"]
        hours = f"{scenario['seconds'] / 3600:.1f}".removesuffix(".0")
        out.append(f"### {scenario['name'].capitalize()}\n\n{scenario['requests']:,} requests in {hours} h. The cheapest other that attains 0.99: "
                   f"{summary['best_peer'] or 'none'}.\n")
        rows = []
        for line in chosen(scenario):
            hours, ours = line["gpu_hours"], next(r for r in scenario["results"] if r["family"] == "Strata")["gpu_hours"]
            rows.append([line["family"], line["setting"], f"{line['attainment']:.4f}", "yes" if line["attainment"] >= WANTED else "no",
                         f"{hours:,.1f}", f"{ours / hours:.2f}", line["changes"], line["flaps"], short(line["first_token_p95"])])
        out.append(table(["policy", "its best setting", "minutes within", "attains", "GPU-hours", "ours to it", "changes", "flaps", "first token p95, s"], rows))
        name = scenario["name"]
        out.append(f"![Servers over the {name}](autoscaling/{name}.svg)\n\n![What each setting costs and keeps](autoscaling/{name}-settings.svg)\n")
    span = lambda key: [pick(draw[key] for draw in result["draws"]) for pick in (min, max)]
    (least, most), (cheap, dear) = span("attainment"), span("gpu_hours")
    out.append(f"On {len(result['draws'])} other draws of the day ours keeps {least:.4f} to {most:.4f} of the minutes, for {cheap:.1f} to {dear:.1f} "
               f"GPU-hours, with {sum(draw['flaps'] for draw in result['draws'])} flaps in all.\n")
    calibration = result["calibration"]
    worst = lambda key: max(abs(row[key][1] / row[key][0] - 1) for row in calibration["h100"])
    out.append(f"### The model beside what was measured\n\nH100: time between tokens within {worst('between_tokens'):.0%}, tokens a second within "
               f"{worst('throughput'):.0%}.\n")
    pair = lambda row, key: f"{short(row[key][0])} / {short(row[key][1])}"
    out.append(table(["tokens in, out", "clients", "between tokens, ms (measured / model)", "tokens a second", "first token, ms"],
                     [[f"{row['prompt']}, {row['output']}", row["clients"], pair(row, "between_tokens"), pair(row, "throughput"), pair(row, "first_token")]
                      for row in calibration["h100"]]))
    out.append("Our engine on 2 processors:\n")
    out.append(table(["clients", "tokens a second (measured / model)"], [[row["clients"], pair(row, "throughput")] for row in calibration["strata"]]))
    return "\n".join(out)


def main():
    result = json.loads(open(sys.argv[1]).read())
    FOLDER.mkdir(exist_ok=True)
    for scenario in result["scenarios"]:
        name = scenario["name"]
        families = ["Strata", "fixed fleet", "HPA on KV use", "llm-d saturation 1", "foresight"] if name == "hour" else ["Strata", "foresight"]
        (FOLDER / f"{name}.svg").write_text(over_time(scenario, families, f"Ready servers over the {name}"))
        (FOLDER / f"{name}-settings.svg").write_text(against(scenario, f"The {name}: every setting"))
    kept = {**result, "scenarios": [{**scenario, "results": [{key: value for key, value in line.items() if key != "windows"} for line in scenario["results"]]}
                                    for scenario in result["scenarios"]]}
    (FOLDER / "benchmark.json").write_text(json.dumps(kept, indent=1) + "\n")
    page = DOCS / "autoscaling-benchmark.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{measured(result)}\n{END}{after}")


main()
