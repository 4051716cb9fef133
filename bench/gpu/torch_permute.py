#!/usr/bin/env python3
"""The permutes of a staged shuffle as PyTorch does them, eager and compiled, on one GPU.

    bench/gpu/torch_permute.py [--tokens 4096] [--ranks 1] [--hidden 7168] [--topk 8] [--experts 256] [-J FILE]

permute: expert ids sorted, tokens gathered in that order (T K rows). unpermute: rows back to [T, K] order, weighted and
summed. --ranks: tokens of so many ranks that share the GPU, in one batch. Times are medians of single calls, from CUDA
event to event. Each result is compared before it is timed: rows bit by bit, sums with float64 within two roundings a term. -J writes rows with the keys of shuffle_perf's, as far as they apply.
"""

import argparse
import json
import statistics
import sys
import time


def permute(x, ids):
    order = ids.flatten().argsort(stable=True)
    return x.index_select(0, order // ids.shape[1]), order


def unpermute(rows, order, weights):
    back = rows.new_empty(rows.shape)
    back = back.index_copy(0, order, rows)
    return (back.view(*weights.shape, -1).float() * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def unpermute_by_index(rows, order, weights):
    """Gathers instead of scattering, and leaves the sum to a batched product: less memory traffic in eager mode."""
    import torch
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    gathered = rows.index_select(0, inverse).view(*weights.shape, -1)
    return torch.bmm(weights.to(rows.dtype).unsqueeze(1), gathered).squeeze(1)


def median_us(torch, work, rounds):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times), times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("-J", "--json")
    o = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"# missing: torch: {error}")
        return 0
    if not torch.cuda.is_available():
        print("# missing: torch: it sees no GPU")
        return 0
    tokens = o.tokens * o.ranks
    torch.manual_seed(time.time_ns() % 2**31)
    x = torch.randn(tokens, o.hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(tokens, o.experts, device="cuda").topk(o.topk, dim=1).indices
    weights = torch.rand(tokens, o.topk, device="cuda")
    wanted_rows = x[ids.flatten().argsort(stable=True) // o.topk]
    exact = x.double() * weights.double().sum(1, keepdim=True)
    bound = (2 * 2**-8) * (x.double().abs() * weights.double().sum(1, keepdim=True)) + 1e-6

    rows = []
    ways = [("torch-eager", permute, unpermute), ("torch-eager-bmm", None, unpermute_by_index),
            ("torch-compiled", torch.compile(permute), torch.compile(unpermute))]
    for name, there, back in ways:
        try:
            if there is not None:
                got, order = there(x, ids)
                rows.append(row(o, name, "permute", int((got != wanted_rows).sum()), *median_us(torch, lambda: there(x, ids), o.rounds)))
            got, order = permute(x, ids)
            summed = back(got, order, weights)
            wrong = int(((summed.double() - exact).abs() > bound).sum())
            rows.append(row(o, name, "unpermute", wrong, *median_us(torch, lambda: back(got, order, weights), o.rounds)))
        except Exception as error:  # a compiler that is not there is no failure of the others
            print(f"# missing: {name}: {str(error).splitlines()[0][:200]}")
    for r in rows:
        print(f"  {r['op']:<10} {r['impl']:<16} {r['tokens']} tokens x {r['ranks']}: {r['p50_us']:.1f} us, {r['wrong']} wrong")
    if o.json:
        with open(o.json, "w") as stream:
            json.dump(rows, stream, indent=1)
    return 0


def row(o, impl, op, wrong, median, times):
    import torch
    return {"impl": impl, "op": op, "device": "cuda", "ranks": o.ranks, "gpus": 1, "nodes": 1, "tokens": o.tokens, "hidden": o.hidden,
            "dtype": "bfloat16", "topk": o.topk, "experts": o.experts, "routing": "uniform", "p50_us": median, "round_p50_us": times,
            "wrong": wrong, "versions": {"torch": torch.__version__}, "command": " ".join(sys.argv)}


if __name__ == "__main__":
    sys.exit(main())
