#!/usr/bin/env python3
"""torch.distributed over NCCL with libfusco preloaded and without, ranks as processes that share one GPU.

    bench/gpu/face_torch.py --library build/plugin/nccl/libfusco.so.1 [--ranks 2 4] [--parts check time kill]

check: every operation with and without libfusco, outputs compared bit by bit, and FUSCO's counters above zero with it.
time:  all_to_all_single of 1, 16 and 128 MB a rank, both ways in turn.
kill:  one rank is killed while the others wait for it; they must end within 30 s.

NCCL takes several ranks on a GPU when each has a host id of its own; it then uses sockets. So the times tell whether
libfusco chooses the path that is there, and nothing about NCCL. Ends with 1 when anything is wrong.
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


def run_rank(options):
    import datetime
    import torch
    import torch.distributed as dist
    rank, ranks = options.rank, options.ranks[0]
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=20),
                            init_method=f"file://{options.meeting}")
    report = {"rank": rank}
    if options.work == "check":
        checks = Checks(rank, ranks)
        for name in CHECKS:
            if name not in options.checks:
                continue
            try:
                report[name] = digest(getattr(checks, name)())
            except Exception as error:  # told, and the other ranks are not kept waiting
                report[name] = f"failed: {error}"
                print(json.dumps(report), flush=True)
                os._exit(1)
    elif options.work == "time":
        report["times"] = times(rank, ranks, [int(float(size) * MB) for size in options.sizes], options.seconds)
    else:
        given = torch.ones(ranks * MB, device="cuda")
        out = torch.empty_like(given)
        dist.all_to_all_single(out, given)
        torch.cuda.synchronize()
        print(json.dumps({"rank": rank, "ready": True}), flush=True)
        if rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_to_all_single(out, given)
        torch.cuda.synchronize()
        report["survived"] = True
    print(json.dumps(report), flush=True)
    dist.destroy_process_group()


def run_ranks(options, ranks, work, library, seconds):
    """Returns each rank's last report, what they printed, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = dict(os.environ, NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1",
                               FUSCO_STATS="1", TORCH_NCCL_DUMP_ON_TIMEOUT="0")
            if library:
                environment["LD_PRELOAD"] = library
            command = [sys.executable, os.path.abspath(__file__), "--rank", str(rank), "--ranks", str(ranks), "--work",
                       work, "--meeting", os.path.join(folder, "meeting"), "--seconds", str(options.seconds),
                       "--sizes", *map(str, options.sizes), "--checks", *options.checks]
            output = open(os.path.join(folder, f"{rank}.txt"), "w+")
            processes.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
        start = time.monotonic()
        for process, _ in processes:
            try:
                process.wait(max(0.1, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                pass
        took = time.monotonic() - start
        late = [rank for rank, (process, _) in enumerate(processes) if process.poll() is None]
        for rank in late:
            processes[rank][0].kill()
            processes[rank][0].wait()
        reports, texts = [], []
        for process, output in processes:
            output.seek(0)
            texts.append(output.read())
            output.close()
            lines = [line for line in texts[-1].splitlines() if line.startswith("{")]
            reports.append(json.loads(lines[-1]) if lines else {})
        return reports, texts, took, late, [process.returncode for process, _ in processes]


def carried(texts):
    return [sum(int(n) for n in re.findall(r": carried (\d+) calls", text)) for text in texts]


def check(options, ranks):
    wrong = 0
    plain, plain_texts, *_ = run_ranks(options, ranks, "check", None, options.limit)
    ours, texts, took, late, _ = run_ranks(options, ranks, "check", options.library, options.limit)
    for name in options.checks:
        expected = [report.get(name, "nothing") for report in plain]
        got = [report.get(name, "nothing") for report in ours]
        same = expected == got and not any(word.startswith(("failed", "nothing")) for word in got)
        wrong += not same
        print(f"{ranks} ranks, {name}: {'the same' if same else f'WRONG: {got}, NCCL {expected}'}", flush=True)
    counts = carried(texts)
    wrong += min(counts) == 0 or bool(late)
    print(f"{ranks} ranks: carried {counts} calls, {took:.1f} s, late {late}", flush=True)
    if wrong:
        for rank, text in enumerate(texts):
            print(f"--- rank {rank}\n{text[-3000:]}", flush=True)
        for rank, text in enumerate(plain_texts):
            print(f"--- plain rank {rank}\n{text[-600:]}", flush=True)
    return wrong


def measure(options, ranks):
    plain, plain_texts, *_ = run_ranks(options, ranks, "time", None, options.limit)
    ours, texts, _, late, _ = run_ranks(options, ranks, "time", options.library, options.limit)
    wrong = 0
    for size in options.sizes:
        key = str(int(float(size) * MB))
        try:
            before = max(report["times"][key] for report in plain)
            after = max(report["times"][key] for report in ours)
        except KeyError:
            print(f"{ranks} ranks, {size} MB: WRONG: no time", flush=True)
            wrong += 1
            continue
        print(f"{ranks} ranks, all_to_all_single, {size} MB a rank: NCCL {before * 1e3:.3f} ms, FUSCO "
              f"{after * 1e3:.3f} ms ({int(key) / after / 1e9:.1f} GB/s a rank), {before / after:.1f} times", flush=True)
    wrong += min(carried(texts)) == 0 or bool(late)
    print(f"{ranks} ranks: carried {carried(texts)} calls", flush=True)
    if wrong:
        for text in texts + plain_texts:
            print(f"---\n{text[-2000:]}", flush=True)
    return wrong


def kill(options, ranks):
    _, texts, took, late, codes = run_ranks(options, ranks, "kill", options.library, 45)
    good = not late and took < 40 and codes[-1] == -signal.SIGKILL and all(code not in (None, 0) for code in codes[:-1])
    print(f"{ranks} ranks, the last killed: all ended {took:.1f} s after the start, with {codes}"
          f"{'' if good else ': WRONG'}", flush=True)
    if not good:
        for text in texts:
            print(f"---\n{text[-2000:]}", flush=True)
    return not good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="libfusco.so.1, to be preloaded")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--parts", nargs="+", default=["check", "time", "kill"], choices=["check", "time", "kill"])
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--sizes", nargs="+", default=["1", "16", "128"], help="MB a rank")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a run of all ranks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options)
    if not options.library or not os.path.exists(options.library):
        parser.error("--library must name libfusco.so.1")
    options.library = os.path.abspath(options.library)
    wrong = 0
    for ranks in options.ranks:
        for part in options.parts:
            wrong += {"check": check, "time": measure, "kill": kill}[part](options, ranks)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
