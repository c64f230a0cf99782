"""Workers of one stage that share pieces, simulated: time, GPU-hours, and small reads of the run folder.

    python3 scripts/scale/simulate.py                      the tables of docs/scale.md
    python3 scripts/scale/simulate.py --contexts 5000 --secs 3.1 --workers 100 --shard 16

As the program does it: piece i belongs to worker i mod N; a worker that is pre-empted loses the piece in hand, waits in the queue and
continues; when its pieces are done it looks at the marker of every piece, and the last one writes the index. `--secs` are those of one
context, as `launch status --json` or run.json give them. Only the standard library is used.
"""

import argparse
import random


def around_one(draw, spread):
    return draw.lognormvariate(-spread * spread / 2, spread)


def simulate(a, seed=1):
    draw = random.Random(seed)
    pieces = -(-a.contexts // a.shard)
    rows = [a.shard] * (pieces - 1) + [a.contexts - a.shard * (pieces - 1)]
    # Contexts differ in length, nodes in speed: the spread of a context's time, and of a worker's.
    speed = [around_one(draw, a.node_spread) for _ in range(a.workers)]
    ends, done_at, reads, lost, busy, preempted = [], [], 0, 0.0, 0.0, 0
    for worker in range(a.workers):
        now = a.queue * draw.random() + a.start
        mine = range(worker, pieces, a.workers)
        busy += a.start
        for piece in mine:
            length = sum(a.secs * speed[worker] * around_one(draw, a.spread) for _ in range(rows[piece]))
            while True:
                until = draw.expovariate(a.preemptions / 3600) if a.preemptions else float("inf")
                if until >= length:
                    break
                preempted += 1
                lost += until
                now += until + a.queue + a.start
                busy += until + a.start
            now += length
            busy += length
            done_at.append(now)
        ends.append(now)
    finished = sorted(done_at)
    # Markers that are there when a worker ends; a worker without pieces looks as well.
    at = 0
    for end in sorted(ends):
        while at < len(finished) and finished[at] <= end:
            at += 1
        reads += at
    last = max(ends)
    return {
        "pieces": pieces,
        "hours": last / 3600,
        "gpu_hours": busy / 3600,
        "at_work": a.contexts * a.secs / (a.workers * last),
        "preempted": preempted,
        "lost_gpu_hours": lost / 3600,
        "reads": reads,
    }


def table(a, key, values):
    print(f"| {key} | pieces | hours | GPU-hours | share of N x time at work | pre-emptions | lost GPU-hours | small reads |")
    print("|" + "---|" * 8)
    for value in values:
        setattr(a, key, value)
        s = simulate(a)
        print(
            f"| {value} | {s['pieces']} | {s['hours']:.2f} | {s['gpu_hours']:.0f} | {s['at_work']:.0%} | {s['preempted']} "
            f"| {s['lost_gpu_hours']:.1f} | {s['reads']:,} |"
        )
    print()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--contexts", type=int, default=50_000)
    p.add_argument("--secs", type=float, default=12.24, help="of one context on one worker (170 GPU-hours for 50,000)")
    p.add_argument("--spread", type=float, default=0.3, help="of a context's time, as the deviation of its logarithm")
    p.add_argument("--node-spread", type=float, default=0.05, help="the same of a worker's speed")
    p.add_argument("--start", type=float, default=90.0, help="seconds until a worker has loaded its model")
    p.add_argument("--queue", type=float, default=120.0, help="seconds in the queue, at most at first, always after a pre-emption")
    p.add_argument("--preemptions", type=float, default=0.0, help="of one worker in an hour")
    p.add_argument("--shard", type=int, default=64, help="data.shard_examples")
    p.add_argument("--workers", type=int)
    a = p.parse_args()
    if a.workers:
        table(a, "workers", [a.workers])
        return
    a.workers = 1
    table(a, "workers", [1, 10, 100, 300, 1000])
    a.workers = 1000
    table(a, "shard", [64, 32, 16, 8, 4])
    a.shard, a.workers = 16, 300
    table(a, "preemptions", [0.0, 0.1, 1.0, 4.0])


if __name__ == "__main__":
    main()
