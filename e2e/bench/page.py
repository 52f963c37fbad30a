"""Puts what was measured into docs/performance.md and the plots beside it: no figure there is written by hand.

    page.py BENCH.json [PARITY.json]      what bench-serve and test-parity left; copies stay in docs/performance
"""

import json
import math
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
BEGIN, END = "<!-- measured: make performance-page writes this -->", "<!-- /measured -->"
OURS, PEER = ("Strata", "#0969da"), ("llama.cpp", "#bf5700")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 64, 110, 36, 48
# What issue 4 asks for; a bound is the least, or the most where it begins with "≤".
WANTED = {
    "decode_ratio": "≥ 1.8", "decode_ratio_q4_1": "≥ 2.0", "prefill_ratio": "≥ 2.0", "prefill_ratio_q4_1": "≥ 4.5", "clients8_ratio": "≥ 2.5",
    "clients8_ratio_q4_1": "≥ 4", "best_ratio": "≥ 1.5", "prefix_ttft_ratio": "≤ 0.5", "bandwidth_share": "≥ 0.6", "vnni_share": "",
    "ready_seconds": "≤ 1", "rss_ratio": "≤ 1.0", "replicas_ratio": "≥ 0.85",
}


def short(value):
    """Three digits that count."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def ticks(top):
    step = 10 ** math.floor(math.log10(top))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if top / (step * part) <= 6)
    return [step * i for i in range(int(top / step) + 1)]


def plot(title, unit, points, key):
    """An SVG of both sides over the number of clients, which doubles from point to point."""
    values = {side: [(point["clients"], point[side][key]) for point in points] for side in ("ours", "peer")}
    top = 1.08 * max(value for line in values.values() for _, value in line)
    x = lambda clients: LEFT + math.log2(clients) / math.log2(points[-1]["clients"]) * (WIDTH - LEFT - RIGHT)
    y = lambda value: HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
    text = lambda at_x, at_y, words, anchor="middle", fill="#57606a": \
        f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{fill}">{words}</text>'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" role="img">',
             f"<title>{title}</title>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', text(LEFT, 20, f"{title}, {unit}", "start", "#1f2328")]
    for value in ticks(top):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#d0d7de"/>')
        parts.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for point in points:
        parts.append(text(x(point["clients"]), HEIGHT - BOTTOM + 18, point["clients"]))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "clients at once"))
    for side, (name, colour) in {"ours": OURS, "peer": PEER}.items():
        line = values[side]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="' + " ".join(f"{x(c):.1f},{y(v):.1f}" for c, v in line) + '"/>')
        parts.extend(f'<circle cx="{x(c):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for c, v in line)
        parts.append(text(x(line[-1][0]) + 8, y(line[-1][1]) + 4, name, "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


PLOTS = {"throughput": ("Throughput", "tokens a second in all", "tokens_per_second"),
         "first-token": ("Time to the first token, median", "seconds", "first_token_seconds"),
         "latency": ("Time of a whole request, median", "seconds", "request_seconds")}


def measured(bench, parity):
    machine, formats = bench["machine"], bench["formats"]
    best = lambda parts, key, pick: pick(value[key] for name, value in parts.items() if name != "ours")
    out = [f"Measured on {bench['date']}: {machine['processors']} processors ({machine['processor']}, {', '.join(machine['instructions'])}), "
           f"{machine['read_gigabytes_per_second']} GB/s read over 4 GiB, {machine['vnni_gigamacs_per_second']} GMAC/s of 8-bit products with VNNI, "
           f"load average {bench['load_average_before'][0]:.1f} at the start; llama-cpp-python {bench['peer']}'s llama.cpp.\n"]
    if bench["quick"]:
        out.append("These are one round's figures (`BENCH_QUICK=1`).\n")
    out.append(table(["figure", "measured", "wanted"], [[f"`{name}`", short(bench["summary"].get(name)), wanted] for name, wanted in WANTED.items()]))
    rows = []
    for name, one in formats.items():
        ours, peer = one["in_process"]["ours"], one["in_process"]["peer"]
        for words, key in {"decode": "decode", "decode at depth 512": "decode_depth_512", "prefill of 512": "prefill_512"}.items():
            rows.append([name.upper(), f"{words}, tok/s", short(ours[key]), short(peer[key]), short(ours[key] / peer[key])])
        http, first = one["http"], one["first_token"]
        for words, part, key, pick, unit in [("8 clients, tok/s", http, "tokens_per_second", max, 1), ("memory, MB", http, "resident_bytes", min, 1e6),
                                             ("first token, new prompt, ms", first, "cold_seconds", min, 1e-3),
                                             ("first token, known prompt, ms", first, "cached_seconds", min, 1e-3)]:
            mine, theirs = part["ours"][key] / unit, best(part, key, pick) / unit
            rows.append([name.upper(), words, short(mine), short(theirs), short(mine / theirs)])
        rows.append([name.upper(), "perplexity", short(one["perplexity"]["ours"]), short(one["perplexity"]["peer"]), ""])
        rows.append([name.upper(), "ready, s (file in memory, not in memory)", f"{short(one['ready']['warm'])}, {short(one['ready']['cold'])}",
                     short(one["ready"]["peer_warm"]), ""])
    out.append(table(["format", "", "Strata", "llama.cpp", "ratio"], rows))
    rows = [[name.upper(), short(one["ours"]["decode"]), short(one["peer"]["decode"]), short(one["ours"]["decode"] * one["ours"]["weight_bytes"] / 1e9)]
            if "ours" in one else [name.upper(), one["skipped"], "", ""] for name, one in bench["synth-1b"].items()]
    out.append(table(["synth-1b", "Strata, tok/s", "llama.cpp, tok/s", "weights read, GB/s"], rows))
    if bench.get("concurrency"):
        out.append("".join(f"![{title}](performance/{file}.svg)\n\n" for file, (title, _, _) in PLOTS.items()).rstrip() + "\n")
    if parity:
        rows = [[name.upper(), one["positions"], f"{one['ours']['kl']:.2e}", f"{one['peer']['kl']:.2e}", f"{one['ours']['top1']:.2%}", f"{one['peer']['top1']:.2%}",
                 f"{one['ours_float']['top1']:.2%}"] for name, one in parity["logits"].items()]
        out.append(table(["format", "positions", "KL", "llama.cpp's KL", "same token", "llama.cpp's", "F32 path's"], rows))
        texts, templates = parity["tokenizer"], parity["templates"]
        out.append(f"Of {texts['literal']['texts']:,} strings, {texts['literal']['other_ids']} get other ids than llama.cpp gives as plain text and "
                   f"{texts['special']['other_ids']} with special tokens; {texts['literal']['changed']} do not come back, {texts['literal']['split']} are cut inside a "
                   f"character when streamed, {texts['literal']['special']} become special tokens. Of {templates['renderings']} renderings of {templates['templates']} "
                   f"chat templates, {templates['different']} differ from Jinja2's.\n")
    return "\n".join(out)


def main():
    folder = DOCS / "performance"
    folder.mkdir(exist_ok=True)
    # Without arguments, what was measured last is written anew.
    for name, path in zip(["bench.json", "parity.json"], sys.argv[1:]):
        (folder / name).write_text(Path(path).read_text())
    bench = json.loads((folder / "bench.json").read_text())
    parity = json.loads((folder / "parity.json").read_text()) if (folder / "parity.json").exists() else None
    for file, (title, unit, key) in PLOTS.items() if bench.get("concurrency") else []:
        (folder / f"{file}.svg").write_text(plot(title, unit, bench["concurrency"], key))
    page = DOCS / "performance.md"
    text = page.read_text()
    head, tail = text[:text.index(BEGIN) + len(BEGIN)], text[text.index(END):]
    page.write_text(f"{head}\n{measured(bench, parity)}\n{tail}")


if __name__ == "__main__":
    main()
