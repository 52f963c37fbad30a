"""How fast the serving engine is, beside a llama.cpp compiled for this machine: the same files, the same threads, in turns.

    serve.py PROGRAMS OUT.json              PROGRAMS: cargo's folder with strata-runtime, bed and examples/
    serve.py PROGRAMS OUT.json replicas     only two replicas beside one, which needs no peer

OUT gets everything that was measured; the last line on stdout is the summary, one JSON object. BENCH_QUICK=1 measures
fewer rounds (about 3 minutes instead of 15). Every figure of the peer is the better of flash attention on and off.
"""

import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import common
from common import alternate, median, random_prompt, say

QUICK = os.environ.get("BENCH_QUICK") == "1"
ROUNDS = 1 if QUICK else 3
SYNTH = ["q4_0", "q4_k_m"] if QUICK else ["q8_0", "q4_0", "q4_k_m", "q6_k"]
CLIENTS, PROMPT, ANSWER, CONTEXT = 8, 128, 64, 256
PREFIX, REST = 512, 16
REPLICA_ROUNDS = 3 if QUICK else 7
CONCURRENCY = [] if QUICK else [1, 2, 4, 8, 16, 32]
DEPTHS = {"0": "decode", "512": "decode_depth_512"}


def machine(programs):
    info = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)$", info, re.M)
    wanted = ["avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16"]
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    return json.loads(common.output(programs / "examples/machine")) | {
        "processor": model.group(1) if model else platform.processor(),
        "processors": os.cpu_count(),
        "instructions": [flag for flag in wanted if flags and flag in flags.group(1).split()],
    }


def our_speed(programs, model):
    return json.loads(common.output(programs / "examples/speed", model))


def peer_speed(peer, model, *what):
    """llama-bench's tokens a second of each of its tests: {"prefill": …, "decode": …}, the better of both attentions."""
    found = json.loads(common.output(peer / "llama-bench", "--model", model, "--threads", common.THREADS, "--flash-attn", "0,1",
                                     "--repetitions", 1, "--output", "json", *what, stderr=common.subprocess.DEVNULL))
    best = {}
    for test in found:
        name = "prefill" if test["n_gen"] == 0 else "decode"
        best[name] = max(best.get(name, 0), test["avg_ts"])
    return best


def in_process(programs, peer, model, prefill, tokens):
    """Medians of both sides: decode at both depths, prefill of 512 tokens where wanted."""

    def peer_round():
        first = peer_speed(peer, model, "--n-prompt", 512 if prefill else 0, "--n-gen", tokens)
        deep = peer_speed(peer, model, "--n-prompt", 0, "--n-gen", tokens, "--n-depth", 512) if prefill else {}
        return {"decode": first["decode"], "prefill_512": first.get("prefill"), "decode_depth_512": deep.get("decode")}

    rounds = alternate(ROUNDS, {"peer": peer_round, "ours": lambda: our_speed(programs, model)})
    keys = {"peer": ["decode", "decode_depth_512", "prefill_512"],
            "ours": ["decode", "decode_depth_512", "prefill_512", "decode_8_clients", "prefill_gigamacs_per_second"]}
    result = {side: {key: median([one[key] for one in rounds[side]]) for key in keys[side] if rounds[side][0][key] is not None}
              for side in rounds}
    result["ours"]["weight_bytes"] = rounds["ours"][0]["weight_bytes"]
    result["ours"]["isa"] = rounds["ours"][0]["isa"]
    return result


def started(servers):
    """All of `servers` running, as a context."""
    from contextlib import ExitStack

    stack = ExitStack()
    try:
        return stack, {name: stack.enter_context(server) for name, server in servers.items()}
    except BaseException:
        stack.close()
        raise


def sides(programs, peer, model, slots, context, *more):
    return {"ours": common.ours(programs, model, slots, context, *more)} | common.peers(peer, model, slots, context)


def http(programs, peer, model, generator):
    """8 clients at once, and what memory the servers take then."""
    stack, servers = started(sides(programs, peer, model, CLIENTS, CONTEXT))
    with stack:
        def part(server):
            return lambda: server.clients([random_prompt(generator, PROMPT) for _ in range(CLIENTS)], ANSWER)[0]

        rounds = alternate(ROUNDS, {name: part(server) for name, server in servers.items()})
        return {name: {"tokens_per_second": median(rounds[name]), "resident_bytes": server.resident_bytes()}
                for name, server in servers.items()}


def first_token(programs, peer, model, generator):
    """Seconds to the first token after a long new prompt, and after one whose beginning was asked before."""
    stack, servers = started(sides(programs, peer, model, 1, 1024, "--enable-prefix-caching"))
    with stack:
        def part(server):
            def run():
                prefix = random_prompt(generator, PREFIX)
                return [server.complete(prefix + random_prompt(generator, REST), 1, reuse=True)[0] for _ in range(2)]
            return run

        rounds = alternate(ROUNDS, {name: part(server) for name, server in servers.items()})
        return {name: {"cold_seconds": median([one[0] for one in rounds[name]]), "cached_seconds": median([one[1] for one in rounds[name]])}
                for name in servers}


def concurrency(programs, peer, model, generator):
    """Throughput and latencies at growing numbers of clients; of the peer, the attention that serves more at that number."""
    most = max(CONCURRENCY)
    stack, servers = started(sides(programs, peer, model, most, CONTEXT))
    curve = []
    with stack:
        for count in CONCURRENCY:
            point = {"clients": count}
            for name, server in servers.items():
                speed, answers = server.clients([random_prompt(generator, PROMPT) for _ in range(count)], ANSWER)
                side = "ours" if name == "ours" else "peer"
                if speed > point.get(side, {"tokens_per_second": 0})["tokens_per_second"]:
                    point[side] = {"tokens_per_second": speed, "first_token_seconds": median([first for first, _ in answers]),
                                   "request_seconds": median([seconds for _, seconds in answers])}
            curve.append(point)
    return curve


def replicas(programs, model, generator):
    """Tokens a second of one server with 8 clients, and of two servers on the same processors with 4 each, together."""
    from concurrent.futures import ThreadPoolExecutor

    def load(servers):
        prompts = [[random_prompt(generator, PROMPT) for _ in range(CLIENTS // len(servers))] for _ in servers]
        begin = time.monotonic()
        with ThreadPoolExecutor(len(servers)) as threads:
            list(threads.map(lambda server, prompts: server.clients(prompts, ANSWER), servers, prompts))
        return CLIENTS * ANSWER / (time.monotonic() - begin)

    stack, servers = started({name: common.ours(programs, model, CLIENTS, CONTEXT) for name in ["one", "another"]})
    with stack:
        both = list(servers.values())
        rounds = alternate(REPLICA_ROUNDS, {"one": lambda: load(both[:1]), "two": lambda: load(both)})
    result = {f"{name}_tokens_per_second": median(values) for name, values in rounds.items()}
    # Of each round by itself: what disturbs the machine disturbs both.
    return result | {"ratio": median([two / one for one, two in zip(rounds["one"], rounds["two"])])}


def forget(path):
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ready(programs, peer, model):
    """Seconds from the start of a server to the first good answer of its readiness, with the file in the page cache or not."""
    def start(server, cold):
        def run():
            if cold:
                forget(model)
            with server:
                return server.ready_seconds
        return run

    starts = {"warm": start(common.ours(programs, model, CLIENTS, CONTEXT), False), "cold": start(common.ours(programs, model, CLIENTS, CONTEXT), True),
              "peer_warm": start(common.peers(peer, model, CLIENTS, CONTEXT)["llama.cpp fa off"], False)}
    return {name: median(values) for name, values in alternate(ROUNDS, starts).items()}


def perplexities(programs, peer, files):
    """Of each format on both sides, over the same tokens."""
    text = (common.SAMPLES / "tinyshakespeare.txt").read_text()[-20_000:]
    (ids,) = common.tokenize(peer, files["q4_1"], [text])
    sequences = [ids[at:at + 512] for at in range(0, 1024 if QUICK else 4096, 512)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        common.write_sequences(Path(file.name), [ids for ids in sequences if len(ids) == 512])
        ask = lambda program, *words: json.loads(common.output(program, *words, file.name))["perplexity"]
        return {name: {"ours": ask(programs / "examples/logits", model), "peer": ask(peer / "peer", "logits", model)}
                for name, model in files.items()}


def summary(results):
    """The figures that the project promises; of the three formats always the worst."""
    formats, peer_best = results["formats"], lambda parts, key, best: best(value[key] for name, value in parts.items() if name != "ours")

    def ratio(part, keys):
        ratios = {name: min(part(one, key) for key in keys) for name, one in formats.items()}
        return min(ratios.values()), ratios["q4_1"]

    decode = ratio(lambda one, key: one["in_process"]["ours"][key] / one["in_process"]["peer"][key], DEPTHS.values())
    prefill = ratio(lambda one, key: one["in_process"]["ours"][key] / one["in_process"]["peer"][key], ["prefill_512"])
    clients = ratio(lambda one, key: one["http"]["ours"][key] / peer_best(one["http"], key, max), ["tokens_per_second"])
    prefix = max(one["first_token"]["ours"]["cached_seconds"] / peer_best(one["first_token"], "cached_seconds", min)
                 for one in formats.values())
    resident = max(one["http"]["ours"]["resident_bytes"] / peer_best(one["http"], "resident_bytes", min) for one in formats.values())

    def best(key):
        theirs = max(formats, key=lambda name: formats[name]["in_process"]["peer"][key])
        good = [name for name in formats if formats[name]["perplexity"]["ours"] <= formats[theirs]["perplexity"]["peer"]]
        return max((formats[name]["in_process"]["ours"][key] for name in good), default=0) / formats[theirs]["in_process"]["peer"][key]

    read, vnni = results["machine"]["read_gigabytes_per_second"], results["machine"]["vnni_gigamacs_per_second"]
    streamed = [formats["q8_0"]["in_process"]["ours"]] + [one["ours"] for one in results["synth-1b"].values() if "ours" in one]
    bandwidth = min(one["decode"] * one["weight_bytes"] / 1e9 / read for one in streamed)
    products = vnni and min(one["in_process"]["ours"]["prefill_gigamacs_per_second"] / vnni for one in formats.values())
    figures = {
        "decode_ratio": decode[0], "decode_ratio_q4_1": decode[1], "prefill_ratio": prefill[0], "prefill_ratio_q4_1": prefill[1],
        "clients8_ratio": clients[0], "clients8_ratio_q4_1": clients[1], "best_ratio": min(best(key) for key in DEPTHS.values()),
        "prefix_ttft_ratio": prefix, "bandwidth_share": bandwidth, "vnni_share": products,
        "ready_seconds": max(one["ready"]["warm"] for one in formats.values()), "rss_ratio": resident,
        "replicas_ratio": results["replicas"]["ratio"],
    }
    return {name: value if value is None else round(value, 3) for name, value in figures.items()}


def main():
    programs, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    if sys.argv[3:] == ["replicas"]:
        result = replicas(programs, common.shipped_model(programs), common.generator())
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))
        return
    peer = common.peer_programs()
    smollm, synth = common.models(programs, peer)
    generator, begin = common.generator(), time.monotonic()
    load = os.getloadavg()
    if load[0] > 0.5:
        say(f"the load average is {load[0]:.1f}: others compute here too, and the figures will be unsteady")
    results = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "quick": QUICK, "load_average_before": load, "peer": peer.parent.name.rsplit("-", 1)[0],
               "machine": machine(programs), "formats": {}, "synth-1b": {}}
    perplexity = perplexities(programs, peer, smollm)
    for name, model in smollm.items():
        say(f"{name}: in process")
        one = results["formats"][name] = {"perplexity": perplexity[name], "in_process": in_process(programs, peer, model, True, 64)}
        say(f"{name}: {CLIENTS} clients, first token, start")
        one["http"] = http(programs, peer, model, generator)
        one["first_token"] = first_token(programs, peer, model, generator)
        one["ready"] = ready(programs, peer, model)
    for name in SYNTH:
        say(f"synth-1b {name}: in process")
        try:
            results["synth-1b"][name] = in_process(programs, peer, synth[name], False, 32)
        except common.subprocess.CalledProcessError as error:
            # A type of numbers that the engine does not have is refused; what it has is measured.
            results["synth-1b"][name] = {"skipped": f"{Path(error.cmd[0]).name} ended with status {error.returncode}"}
            say(f"synth-1b {name}: skipped, see above")
    say("two replicas")
    results["replicas"] = replicas(programs, smollm["q4_1"], generator)
    if CONCURRENCY:
        say(f"1 to {max(CONCURRENCY)} clients")
        results["concurrency"] = concurrency(programs, peer, smollm["q4_1"], generator)
    results["summary"] = summary(results)
    results |= {"load_average_after": os.getloadavg(), "seconds": round(time.monotonic() - begin)}
    out.write_text(json.dumps(results, indent=1) + "\n")
    say(f"all figures are in {out}")
    print(json.dumps(results["summary"]))


if __name__ == "__main__":
    main()
