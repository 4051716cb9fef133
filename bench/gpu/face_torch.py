#!/usr/bin/env python3
"""torch.distributed over NCCL with libfusco preloaded and without, ranks as processes that share one GPU,
or with --own-gpus on a GPU each.

    bench/gpu/face_torch.py --library build/plugin/nccl/libfusco.so.1 [--ranks 2 4] [--parts check time kill] [--own-gpus]

check: every operation with and without libfusco, outputs compared bit by bit, and FUSCO's counters above zero with it.
time:  all_to_all_single of 1, 16 and 128 MB a rank, both ways.
kill:  with libfusco the last rank is killed while the others wait for it; they must end within 30 s.

For each number of ranks the ranks are started once without libfusco and once with it, and at the end once more to be
killed. About a minute for 2 and 4 ranks; --budget ends it after 90 s whatever happens. --mode: lazy (torch makes communicators when they are used), eager (one at
the start, groups by split), nonblocking (eager, and torch polls until they are made); default: lazy for 2 ranks, else
eager. In nonblocking mode torch's own all_to_all_single fails on NCCL (it takes "in progress" for an error), as do
captured calls, which are NCCL's: the runs without libfusco are eager then, and nothing is captured.

NCCL takes several ranks on a GPU when each has a host id of its own; it then uses sockets. So without --own-gpus the times
tell whether libfusco chooses the path that is there, and nothing about NCCL. Ends with 1 when anything is wrong.
"""
import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

MB = 1 << 20


def digest(tensors):
    import torch
    torch.cuda.synchronize()
    words = hashlib.sha256()
    for tensor in tensors:
        words.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return words.hexdigest()[:16]


class Checks:
    """Each returns tensors that must be the same whoever carries."""

    def __init__(self, rank, ranks):
        import torch
        import torch.distributed as dist
        self.torch, self.dist, self.rank, self.ranks = torch, dist, rank, ranks

    def fill(self, count, salt, dtype=None):
        generator = self.torch.Generator(device="cuda").manual_seed(1000 * salt + self.rank)
        return self.torch.randint(-1000, 1000, (count,), generator=generator, device="cuda").to(
            dtype or self.torch.bfloat16)

    def equal(self):
        outputs = []
        for round, count in enumerate((1, 1000, 4099, 1 << 20, 6 * MB)):
            given = self.fill(count * self.ranks, round)
            out = self.torch.full_like(given, 7)
            self.dist.all_to_all_single(out, given)
            outputs.append(out)
        return outputs

    def unequal(self):
        outputs = []
        for round in range(10):
            import random
            draw = random.Random(round)
            counts = [[draw.choice((0, 1, 17, 1000, 70001, 300000)) for _ in range(self.ranks)]
                      for _ in range(self.ranks)]
            sends, receives = counts[self.rank], [row[self.rank] for row in counts]
            given = self.fill(sum(sends), round, self.torch.float16)
            out = self.torch.full((sum(receives),), 7, device="cuda", dtype=self.torch.float16)
            self.dist.all_to_all_single(out, given, receives, sends)
            outputs.append(out)
        return outputs

    def lists(self):
        given = [self.fill(1000 + 77 * peer + 13 * self.rank, peer) for peer in range(self.ranks)]
        out = [self.torch.zeros(1000 + 77 * self.rank + 13 * peer, device="cuda", dtype=self.torch.bfloat16)
               for peer in range(self.ranks)]
        self.dist.all_to_all(out, given)
        return out

    def pairs(self):
        outputs = []
        for round, count in enumerate((5, 100000, 3 * MB)):
            given, out = self.fill(count, round), self.torch.zeros(count, device="cuda", dtype=self.torch.bfloat16)
            peer = self.rank ^ 1
            if self.rank % 2 == 0:
                self.dist.isend(given, peer).wait()
                self.dist.irecv(out, peer).wait()
            else:
                self.dist.irecv(out, peer).wait()
                self.dist.isend(given, peer).wait()
            outputs.append(out)
        return outputs

    def batches(self):
        outputs = []
        for round, count in enumerate((3, 70001, 2 * MB)):
            given, out = self.fill(count, round), self.torch.zeros(count, device="cuda", dtype=self.torch.bfloat16)
            operations = [self.dist.P2POp(self.dist.isend, given, (self.rank + 1) % self.ranks),
                          self.dist.P2POp(self.dist.irecv, out, (self.rank - 1) % self.ranks)]
            for request in self.dist.batch_isend_irecv(operations):
                request.wait()
            outputs.append(out)
        return outputs

    def between(self):
        """All-reduces, which NCCL carries, between all-to-alls, and work on the stream between all of them."""
        value = self.fill(self.ranks * 10007, 3, self.torch.float32)
        for _ in range(5):
            out = self.torch.empty_like(value)
            self.dist.all_to_all_single(out, value)
            self.dist.all_reduce(out)
            value = (out * 3 + self.rank) % 1009
        return [value]

    def streams(self):
        """Outputs that are read and inputs that are written on the stream right behind the call."""
        given, outputs = self.fill(self.ranks * MB, 1), []
        for round in range(20):
            out = self.torch.full_like(given, 7)
            given.mul_(0).add_(round + self.rank)
            self.dist.all_to_all_single(out, given)
            given.zero_()
            outputs.append(out.view(-1)[:: 4097].clone())
        return outputs

    def graph(self):
        given = self.fill(self.ranks * 5000, 1)
        out = self.torch.zeros_like(given)
        self.dist.all_to_all_single(out, given)
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            self.dist.all_to_all_single(out, given)
        outputs = []
        for round in range(3):
            given.copy_(self.fill(self.ranks * 5000, 10 + round))
            graph.replay()
            outputs.append(out.clone())
        return outputs

    def group(self):
        members = self.dist.new_group(list(range(self.ranks)))
        given = self.fill(self.ranks * 999, 5)
        out = self.torch.zeros_like(given)
        self.dist.all_to_all_single(out, given, group=members)
        self.dist.destroy_process_group(members)
        return [out]


CHECKS = ("equal", "unequal", "lists", "pairs", "batches", "between", "streams", "group", "graph")


def times(rank, ranks, sizes, seconds):
    import torch
    import torch.distributed as dist
    found = {}
    for size in sizes:
        given = torch.ones(size // ranks * ranks, device="cuda", dtype=torch.uint8)
        out = torch.empty_like(given)
        for _ in range(2):
            dist.all_to_all_single(out, given)
        torch.cuda.synchronize()
        samples = []
        until = time.monotonic() + seconds
        go = torch.ones(1, device="cuda")
        while len(samples) < 50:
            dist.all_reduce(go)
            torch.cuda.synchronize()
            start = time.perf_counter()
            dist.all_to_all_single(out, given)
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
            more = torch.tensor([1.0 if time.monotonic() < until or len(samples) < 3 else 0.0], device="cuda")
            dist.all_reduce(more, op=dist.ReduceOp.MIN)
            if more.item() == 0:
                break
        found[size] = sorted(samples)[len(samples) // 2]
    return found


def start_torch(options):
    import datetime
    import torch
    import torch.distributed as dist
    device = options.rank if options.own_gpus else 0
    torch.cuda.set_device(device)
    eager = {} if options.mode == "lazy" else {"device_id": torch.device("cuda", device)}
    dist.init_process_group("nccl", rank=options.rank, world_size=options.ranks[0],
                            timeout=datetime.timedelta(seconds=20), init_method=f"file://{options.meeting}", **eager)
    return torch, dist


def run_rank(options):
    """Prints what it has found as one line of JSON after each part, so that a part that fails leaves the others."""
    torch, dist = start_torch(options)
    rank, ranks = options.rank, options.ranks[0]
    report = {"rank": rank}

    def tell():
        print(json.dumps(report), flush=True)

    if "check" in options.parts:
        checks = Checks(rank, ranks)
        for name in options.checks:
            try:
                report[name] = digest(getattr(checks, name)())
            except Exception as error:  # told, and the other ranks are not kept waiting
                report[name] = f"failed: {error}"
                tell()
                os._exit(1)
        tell()
    if "time" in options.parts:
        report["times"] = times(rank, ranks, [int(float(size) * MB) for size in options.sizes], options.seconds)
        tell()
    if "kill" not in options.parts:
        dist.destroy_process_group()
        return
    given = torch.ones(ranks * MB, device="cuda")
    out = torch.empty_like(given)
    dist.all_to_all_single(out, given)
    torch.cuda.synchronize()
    report["killed_at"] = time.time()
    tell()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_to_all_single(out, given)
    torch.cuda.synchronize()
    report["survived"] = True
    tell()


class Run:
    """All ranks once: their last reports, what they printed, how they ended, and when."""

    def __init__(self, options, ranks, parts, library, seconds):
        mode = options.mode or ("lazy" if ranks == 2 else "eager")
        environment = dict(os.environ, NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", FUSCO_STATS="1",
                           TORCH_NCCL_DUMP_ON_TIMEOUT="0")
        if mode == "nonblocking":
            mode = "eager"
            if library:
                environment["TORCH_NCCL_USE_COMM_NONBLOCKING"] = "1"
        if library:
            environment["LD_PRELOAD"] = library
        with tempfile.TemporaryDirectory() as folder:
            processes, outputs = [], []
            for rank in range(ranks):
                command = [sys.executable, os.path.abspath(__file__), "--rank", str(rank), "--ranks", str(ranks),
                           "--parts", *parts, "--mode", mode, "--meeting", os.path.join(folder, "meeting"),
                           "--seconds", str(options.seconds), "--sizes", *map(str, options.sizes), "--checks",
                           *options.checks, *(["--own-gpus"] if options.own_gpus else [])]
                ids = {} if options.own_gpus else {"NCCL_HOSTID": f"host{rank}"}
                outputs.append(open(os.path.join(folder, f"{rank}.txt"), "w+"))
                processes.append(subprocess.Popen(command, env=dict(environment, **ids),
                                                  stdout=outputs[-1], stderr=outputs[-1]))
            end = time.monotonic() + seconds
            self.ended = [None] * ranks
            while None in self.ended and time.monotonic() < end:
                time.sleep(0.05)
                for rank, process in enumerate(processes):
                    if self.ended[rank] is None and process.poll() is not None:
                        self.ended[rank] = time.time()
            self.late = [rank for rank in range(ranks) if self.ended[rank] is None]
            for rank in self.late:
                processes[rank].kill()
                processes[rank].wait()
            self.codes = [process.returncode for process in processes]
            self.texts = []
            for output in outputs:
                output.seek(0)
                self.texts.append(output.read())
                output.close()
        self.reports = []
        for text in self.texts:
            lines = [line for line in text.splitlines() if line.startswith("{")]
            self.reports.append(json.loads(lines[-1]) if lines else {})
        self.carried = [sum(int(n) for n in re.findall(r": carried (\d+) calls", text)) for text in self.texts]

    def show(self, title):
        for rank, text in enumerate(self.texts):
            print(f"--- {title}, rank {rank}, ended with {self.codes[rank]}\n{text[-2000:]}", flush=True)


def check(options, plain, ours, row):
    wrong = []
    for name in options.checks:
        expected = [report.get(name, "nothing") for report in plain.reports]
        got = [report.get(name, "nothing") for report in ours.reports]
        if expected != got or any(word.startswith(("failed", "nothing")) for word in got):
            wrong.append(f"{name} (NCCL {expected}, with libfusco {got})")
    row(f"{len(options.checks)} operations: " + ("the same bits" if not wrong else "WRONG: " + "; ".join(wrong)), not wrong)


def measure(options, plain, ours, row):
    for size in options.sizes:
        key = str(int(float(size) * MB))
        try:
            before = max(report["times"][key] for report in plain.reports)
            after = max(report["times"][key] for report in ours.reports)
        except KeyError:
            row(f"all_to_all_single {size:>4} MB: WRONG: no time", False)
            continue
        row(f"all_to_all_single {size:>4} MB: NCCL {before * 1e3:8.3f} ms, libfusco {after * 1e3:8.3f} ms, "
            f"{before / after:6.1f} times", True)


def kill(ours, row):
    killed = ours.reports[-1].get("killed_at")
    others = ours.ended[:-1]
    good = (killed is not None and None not in others and max(others) - killed < 30 and
            ours.codes[-1] == -signal.SIGKILL and all(code != 0 for code in ours.codes[:-1]) and
            not any("survived" in report for report in ours.reports))
    seconds = f"{max(others) - killed:.1f} s" if killed and None not in others else "never"
    row(f"last rank killed: the others ended after {seconds}, with {ours.codes[:-1]}{'' if good else ': WRONG'}", good)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libfusco.so.1, to be preloaded")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--parts", nargs="+", default=["check", "time", "kill"], choices=["check", "time", "kill"])
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--mode", choices=["lazy", "eager", "nonblocking"])
    parser.add_argument("--sizes", nargs="+", default=["1", "16", "128"], help="MB a rank")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each size")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for one start of all ranks")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds for everything")
    parser.add_argument("--own-gpus", action="store_true", help="rank r has GPU r; NCCL then uses the links between GPUs")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options)
    if not options.library or not os.path.exists(options.library):
        parser.error("--library must name libfusco.so.1")
    if options.mode == "nonblocking":
        options.checks = [name for name in options.checks if name != "graph"]
    library = os.path.abspath(options.library)
    start, wrong = time.monotonic(), 0

    def run(ranks, parts, library):
        left = options.budget - (time.monotonic() - start)
        return Run(options, ranks, parts, library, max(1.0, min(options.limit, left)))

    def row(text, good):
        nonlocal wrong
        wrong += not good
        print(f"{ranks} ranks | {text}", flush=True)

    parts = [part for part in options.parts if part != "kill"]
    for ranks in options.ranks if parts else []:
        before = wrong
        plain, ours = run(ranks, parts, None), run(ranks, parts, library)
        if "check" in parts:
            check(options, plain, ours, row)
        if "time" in parts:
            measure(options, plain, ours, row)
        row(f"calls carried by each: {ours.carried}, late: {plain.late} and {ours.late}, "
            f"{time.monotonic() - start:.0f} s since the start", min(ours.carried) > 0 and not plain.late and not ours.late)
        if wrong > before:
            plain.show("NCCL alone")
            ours.show("with libfusco")
    if "kill" in options.parts:
        runs = {}

        def one(ranks):
            runs[ranks] = run(ranks, ["kill"], library)

        threads = [threading.Thread(target=one, args=(ranks,)) for ranks in options.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ranks in options.ranks:
            before = wrong
            kill(runs[ranks], row)
            if wrong > before:
                runs[ranks].show("one killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
