"""`sdkd serve` under load: images per second merged and one at a time, latency, overhead, memory, faults.

    python tools/bench_serve.py                                    # all pieces, on the demo's teacher
    python tools/bench_serve.py --pieces load,overhead --target onnxruntime

A server as its command starts it, and clients in another process on the same machine, whose work counts against it.
load: in rounds, the same requests of mixed prompts, sizes and seeds one after the other, and by --clients at once;
every image is compared with what `sdkd generate` draws of the same seed. overhead: one client, in turn with the call of
the pipeline in this process and in another one. memory: --images of few steps. faults: what goes wrong for one client
while others ask. Writes benchmarks/<machine>/<result>.json and .md. Run it on a quiet machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_kit.demo_models import drawn_captions
from bench_kit.results import ROOT, check_known, command_of, faster, head, keep, machine, parse, ratio_cell
from bench_kit.serving import Answer, Server, by_clients, mixed_requests, others, serving

from sdkd.core.console import markdown_table

SIZES = ((64, 64), (128, 64), (64, 128))  # width, height
WARM_UP = 5
PAUSE_S = 0.2  # threads of engines go on looking for work for a while, and would take the other process's time
OVERHEAD = ("pipeline_call", "process_alone", "request")
FEW = 2  # steps where many images count, and not what they show


def bundle_of(target: str, batch: int, work: Path) -> Path:
    """The demo's teacher with engines of 64 to 128 pixels and batches up to `batch`, built where missing."""
    from sdkd.core.console import progress
    from sdkd.core.profiles import Range, ShapeRanges
    from sdkd.models.resolve import resolve
    from sdkd.targets.plan import plan_for_model
    from sdkd.targets.registry import slot_precision
    from sdkd.workflow import prepare

    side = Range(64, 64, 128)
    ranges = ShapeRanges(Range(1, batch, batch), side, side, Range.fixed(77))
    with progress("engines") as shown:
        plan = plan_for_model(target, slot_precision(target))
        made = prepare(resolve("demo"), plan, work / f"batch-{batch}", ranges=ranges, progress=shown)
    return made.bundle


class Reference:
    """What `sdkd generate` draws, by the same calls, one image at a time."""

    def __init__(self, bundle: Path, target: str) -> None:
        from engines.generate.loading import load

        self.bundle = bundle
        self.pipe, _ = load(str(bundle), target)
        self._drawn: dict[int, Any] = {}

    def draw(self, wanted: Mapping[str, Any]) -> Any:
        """The image of a request, as numbers."""
        import numpy as np

        from engines.generate.drawing import Request, draw
        from sdkd.core.console import quiet
        from sdkd.models.generation import USUAL

        size = wanted["height"], wanted["width"]
        request = Request(
            (wanted["prompt"],), None, *size, wanted["steps"], USUAL.guidance_scale, wanted["seed"], 1
        )  # fmt: skip
        return np.asarray(draw(self.pipe, request, [0], quiet)[0], dtype=np.int16)

    def differences(self, wishes: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> dict[str, Any]:
        """How far the images are from these: identical ones, and the largest difference of a value of 0 to 255."""
        import numpy as np

        for wanted in wishes:
            if wanted["seed"] not in self._drawn:
                self._drawn[wanted["seed"]] = self.draw(wanted)
        gaps = [
            int(np.abs(answer.pixels - self._drawn[wanted["seed"]]).max())
            for wanted, answer in zip(wishes, answers, strict=True)
            if answer.status == 200
        ]
        return {"images": len(gaps), "identical": gaps.count(0), "largest_difference": max(gaps)}


def load(server: Server, reference: Reference, asked: Any) -> dict[str, Any]:
    """The same requests one after the other and by many clients, in rounds."""
    wishes = mixed_requests(asked.requests, asked.steps, SIZES, drawn_captions(50))
    parts = [wishes[start :: asked.rounds] for start in range(asked.rounds)]
    by_clients(server, wishes[:20], 20)
    alone: list[Answer] = []
    together: list[Answer] = []
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for part in parts:
        for name, clients, kept in (("alone", 1, alone), ("together", asked.clients, together)):
            start = time.perf_counter()
            kept += by_clients(server, part, clients)
            seconds[name].append(time.perf_counter() - start)
            print(f"load: {len(part)} requests, {clients} at once: {seconds[name][-1]:.1f} s", flush=True)
    ordered = [wanted for part in parts for wanted in part]
    latencies = sorted(answer.seconds for answer in together)
    batches = [answer.body["images"][0]["timing"]["batch"] for answer in together if answer.status == 200]
    return {
        "requests": len(together), "clients": asked.clients, "steps": asked.steps,
        "failed": sum(answer.status != 200 for answer in (*alone, *together)),
        "seconds": seconds, "images_per_second": {name: len(wishes) / sum(values) for name, values in seconds.items()},
        "faster": faster([[one] for one in seconds["alone"]], [[one] for one in seconds["together"]]),
        "latency_s": {f"p{part}": latencies[len(latencies) * part // 100] for part in (50, 95, 99)},
        "latency_samples_s": [round(answer.seconds, 4) for answer in together],
        "batch_mean": statistics.mean(batches), "batch_max": max(batches),
        "alone_to_generate": reference.differences(ordered, alone),
        "together_to_generate": reference.differences(ordered, together),
    }  # fmt: skip


@contextlib.contextmanager
def drawing_alone(bundle: Path, target: str) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """What draws with the server's own process of an engine set, asked without a server."""
    from engines.generate.drawing import Picture, Settings
    from sdkd.core import processes
    from sdkd.models.generation import USUAL
    from sdkd.models.resolve import resolve
    from sdkd.serve.painter import Batch
    from sdkd.serve.worker import work
    from sdkd.serve.workers import PRELOAD

    process, line = processes.start_connected(work, (resolve(str(bundle)), target), "alone", PRELOAD, daemon=True)

    def draw(wanted: Mapping[str, Any]) -> object:
        settings = Settings(wanted["height"], wanted["width"], wanted["steps"], USUAL.guidance_scale)
        processes.say(line, ("draw", 1, Batch(settings, (Picture(wanted["prompt"], None, wanted["seed"]),), None, ())))
        while (said := line.recv())[0] == "step":
            pass
        if said[0] != "drawn":
            raise SystemExit(f"the process alone did not draw: {said}")
        return said

    if (said := line.recv())[0] != "opened":
        raise SystemExit(f"the process alone did not begin: {said}")
    try:
        yield draw
    finally:
        processes.say(line, None)
        process.join()


def overhead(server: Server, reference: Reference, asked: Any) -> dict[str, Any]:
    """One client, in turn with the call of the pipeline in this process and in one like the server's without a server.

    Two processes that draw the same differ in their times, by chance of where things lie in memory: that control says
    how much of a difference is not the server's. What of a request is not drawing is told by its own stages.
    """
    wanted = {"prompt": "a red circle", "seed": 1, "width": 64, "height": 64, "steps": 25}
    samples: dict[str, list[float]] = {name: [] for name in (*OVERHEAD, "beside_drawing")}
    with drawing_alone(reference.bundle, asked.target) as alone:
        orders = list(itertools.permutations(OVERHEAD))
        ways = dict(zip(OVERHEAD, (reference.draw, alone, server.ask), strict=True))
        for turn in range(WARM_UP + asked.pairs):
            found: dict[str, float] = {}
            for name in orders[turn % len(orders)]:
                time.sleep(PAUSE_S)
                start = time.perf_counter()
                answer = ways[name](wanted)
                found[name] = time.perf_counter() - start
                if isinstance(answer, Answer):
                    timing = answer.body["images"][0]["timing"]
                    drawing = timing["text_s"] + timing["steps_s"] + timing["decode_s"]
                    found["beside_drawing"] = found[name] - drawing
            if turn >= WARM_UP:
                for name, value in found.items():
                    samples[name].append(value)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    call, process, request = ([[one] for one in samples[name]] for name in OVERHEAD)
    return {
        "medians_s": medians,
        "request_to_call": faster(request, call),
        "request_to_process": faster(request, process),
        "process_to_call": faster(process, call),
        "share": medians["beside_drawing"] / medians["request"],
        "samples_s": samples,
    }


def memory(server: Server, reference: Reference, asked: Any) -> dict[str, Any]:
    """What the processes hold while many images are drawn."""
    wishes = mixed_requests(asked.images, FEW, SIZES, drawn_captions(50))
    part, rows = max(1, asked.images // 20), []
    failed = 0
    for start in range(0, len(wishes), part):
        failed += sum(answer.status != 200 for answer in by_clients(server, wishes[start : start + part], 8))
        rows.append({"images": min(start + part, len(wishes)), **server.memory()})
        print(f"memory: {rows[-1]}", flush=True)
    return {"steps": FEW, "failed": failed, "rows": rows}


def faults(server: Server, reference: Reference, asked: Any) -> dict[str, Any]:
    """Each fault while four clients go on asking: what was asked by them, and what they got."""
    wishes = mixed_requests(40, asked.steps, SIZES[:1], drawn_captions(50))
    found = {}
    for name, happen in FAULTS.items():
        with others(server, wishes, 4) as end:
            time.sleep(1.0)
            said = happen(server)
            time.sleep(1.0)
            answers = end()
        taken = [answer for answer in answers if answer.status != 429]
        right = [answer for answer in taken if answer.status == 200]
        found[name] = {
            "what": (happen.__doc__ or "").strip(), "said": said, "taken": len(taken), "answered": len(right),
            "refused": len(answers) - len(taken),
            "failed": [answer.body["detail"] for answer in taken if answer.status != 200],
            "longest_s": max(answer.seconds for answer in answers),
        }  # fmt: skip
        print(f"faults: {name}: {found[name]['answered']} of {found[name]['taken']} answered; {said}", flush=True)
    return found


def client_gone(server: Server) -> str:
    """A client leaves in the middle of 150 steps: they end at the next one."""
    before = _metric(server, 'outcome="cancelled"')
    connection = _sent(server, b'{"prompt": "a red circle", "width": 64, "height": 64, "steps": 150}')
    time.sleep(1.0)
    connection.close()
    start = time.perf_counter()
    while _metric(server, 'outcome="cancelled"') == before and time.perf_counter() < start + 30:
        time.sleep(0.01)
    return f"cancelled {1000 * (time.perf_counter() - start):.0f} ms after it left"


def worker_killed(server: Server) -> str:
    """The process that draws is killed by SIGKILL: the images of its call are drawn again, each by itself."""
    (worker,) = server.workers()
    before = _metric(server, "sdkd_loads_total")
    worker.kill()
    start = time.perf_counter()
    while _metric(server, "sdkd_loads_total") == before and time.perf_counter() < start + 60:
        time.sleep(0.02)
    return f"another one had the model open after {time.perf_counter() - start:.1f} s"


def queue_full(server: Server) -> str:
    """100 clients more ask at once, and 64 images may wait: others are told so at once."""
    wishes = mixed_requests(100, FEW, SIZES[:1], ["a red circle"])
    answers = by_clients(server, wishes, 100)
    refused = [answer for answer in answers if answer.status == 429]
    longest = max((answer.seconds for answer in refused), default=0.0)
    drawn = sum(answer.status == 200 for answer in answers)
    return f"{len(refused)} of these refused with 429, within {1000 * longest:.0f} ms; {drawn} drawn"


def slow_reader(server: Server) -> str:
    """A client asks for a stream and reads nothing of it."""
    body = b'{"prompt": "a red circle", "width": 128, "height": 128, "steps": 50, "stream": true}'
    connection = _sent(server, body, small=True)
    time.sleep(2.0)
    connection.close()
    return "left after 2 s"


def garbage(server: Server) -> str:
    """10 MB of garbage as a request, and as what is no HTTP at all."""
    data = os.urandom(10_000_000)
    connection = _sent(server, data)
    status = connection.recv(64).decode(errors="replace").split("\r\n")[0]
    connection.close()
    raw = socket.create_connection(("127.0.0.1", server.port))
    with raw:
        try:
            raw.sendall(data)
            answer = raw.recv(64).decode(errors="replace").split("\r\n")[0]
        except ConnectionError:
            answer = "closed"
    return f"answered {status}; {answer or 'closed'}"


def idle_connections(server: Server) -> str:
    """1,000 connections that ask nothing."""
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    time.sleep(2.0)
    for one in connections:
        one.close()
    return "held for 2 s"


def _sent(server: Server, body: bytes, small: bool = False) -> socket.socket:
    """A connection on which a request was sent and nothing read."""
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", server.port))
    head = (
        f"POST /api/images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode())
    connection.sendall(body)
    return connection


def _metric(server: Server, mark: str) -> float:
    lines = server.get("/metrics").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if mark in line and "_total{" in line)


FAULTS: dict[str, Callable[[Server], str]] = {
    "client gone": client_gone,
    "worker killed": worker_killed,
    "queue full": queue_full,
    "slow reader": slow_reader,
    "garbage": garbage,
    "idle connections": idle_connections,
}
PIECES: dict[str, Callable[[Server, Reference, Any], dict[str, Any]]] = {
    "load": load,
    "overhead": overhead,
    "memory": memory,
    "faults": faults,
}


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """The page."""
    pieces = found["pieces"]
    lines = [
        f"# `sdkd serve` on {found['machine']}",
        "",
        f"{found['date']}, commit {found['commit']}; {found['about']}",
    ]
    for name, words in WORDS.items():
        if name in pieces:
            lines += ["", *words(pieces[name])]
    return lines


def load_lines(found: Mapping[str, Any]) -> list[str]:
    """Load in words."""
    rate, late = found["images_per_second"], found["latency_s"]
    return [
        "## Load", "",
        f"{found['requests']} requests, {found['steps']} steps, 64x64, 128x64 and 64x128 px; {found['failed']} failed.",
        "",
        *markdown_table(
            ("asked", "images/s", "faster (95 %)", "to `sdkd generate`", "largest difference of 255"),
            [
                ["one at a time", f"{rate['alone']:.2f}", "–", *_like(found["alone_to_generate"])],
                [f"{found['clients']} clients", f"{rate['together']:.2f}", ratio_cell(found["faster"]),
                 *_like(found["together_to_generate"])],
            ],
        ),
        "",
        f"Images of one call: {found['batch_mean']:.2f} on average, {found['batch_max']} at most. Latency of "
        f"{found['clients']} clients: p50 {late['p50']:.2f} s, p95 {late['p95']:.2f} s, p99 {late['p99']:.2f} s.",
    ]  # fmt: skip


def _like(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['identical']} of {found['images']} identical", str(found["largest_difference"])


def overhead_lines(found: Mapping[str, Any]) -> list[str]:
    """Overhead in words."""
    *medians, beside = (1000 * value for value in found["medians_s"].values())
    ratios = ("–", "–"), (found["process_to_call"], "–"), (found["request_to_call"], found["request_to_process"])
    cells = [[one if isinstance(one, str) else ratio_cell(one) for one in row] for row in ratios]
    names = "the pipeline's call in the client's process", "a process like the server's, without a server", "a request"
    rows = [[name, f"{ms:.1f}", *row] for name, ms, row in zip(names, medians, cells, strict=True)]
    return [
        "## Overhead, one client",
        "",
        f"Of a request, {beside:.1f} ms ({found['share']:.1%}) is not drawing: HTTP, queue, the way to the process, "
        f"PNG. Medians of {len(found['samples_s']['request'])} in turn:",
        "",
        *markdown_table(("what", "ms", "as long as the call (95 %)", "as that process"), rows),
    ]


def memory_lines(found: Mapping[str, Any]) -> list[str]:
    """Memory in words."""
    rows = found["rows"]
    cells = [[f"{row['images']:,}", *(f"{row[name] / 1e6:.0f}" for name in ("server", "workers"))] for row in rows]
    shown = [cells[0], *cells[1:-1:3], cells[-1]]
    heads = ("images", "server, MB", "process that draws, MB")
    return [
        "## Memory",
        "",
        f"{found['steps']} steps; {found['failed']} failed.",
        "",
        *markdown_table(heads, shown, left=0),
    ]


def fault_lines(found: Mapping[str, Any]) -> list[str]:
    """Faults in words."""
    cells = [
        [name, row["what"], row["said"], f"{row['answered']} of {row['taken']}", f"{row['longest_s']:.1f}"]
        for name, row in found.items()
    ]
    heads = ("fault", "what", "what came of it", "others answered", "their longest, s")
    return ["## Faults, while four other clients ask", "", *markdown_table(heads, cells, left=4)]


WORDS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "load": load_lines,
    "overhead": overhead_lines,
    "memory": memory_lines,
    "faults": fault_lines,
}


def main() -> None:
    """Measure and write."""
    options = {
        "pieces": ",".join(PIECES), "target": "openvino", "batch": 8, "requests": 400, "clients": 20, "rounds": 4,
        "steps": 10, "pairs": 60, "images": 2000, "result": "serve",
    }  # fmt: skip
    asked = parse(__doc__, **options, work=Path("artifacts/bench-serve"))
    check_known("piece", names := asked.pieces.split(","), PIECES)
    os.chdir(ROOT)  # paths in the results are relative to it
    bundle = bundle_of(asked.target, asked.batch, asked.work)
    pieces: dict[str, Any] = {}
    with serving([f"demo={bundle}"], asked.work / "serve.log", "--target", asked.target) as server:
        reference = Reference(bundle, asked.target)
        for name in names:
            pieces[name] = PIECES[name](server, reference, asked)
    about = f"the demo's teacher on `{asked.target}`, engines for up to {asked.batch} images"
    result = head(command_of("bench_serve.py", asked, *options), about=about, pieces=pieces)
    keep(asked.output / machine() / f"{asked.result}.json", result, lines_of(result))


if __name__ == "__main__":
    main()
