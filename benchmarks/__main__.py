"""Run the benchmarks on this machine: experts and routing (checked against float64 first), whole models, adapters; then compare with what is committed.

    python -m benchmarks [--quick | --tiny] [--device cuda] [--parts ops,routing,steps,adapters] [--only TEXT] [--out FOLDER] [--save]

Writes Markdown, JSON and a plot a part. `--cpu-time --threads 1` counts the process's own time, for a machine that is busy. Exit status 1 where a
result of ours is wrong, fails, is lost or has a ratio twice as bad as the committed one of the same device.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import adapters, compare, ops, routing, steps
from benchmarks.measure import begin

PARTS = ("ops", "routing", "steps", "adapters")
ROUNDS = {"tiny": 2, "quick": 5, "full": 15}


def main(argv: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="some shapes, few rounds: under five minutes on two cores")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="the whole path on tiny shapes; with TRITON_INTERPRET=1 our kernels too")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--only", default="", help="tables of ops whose name has this text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of the reports")
    parser.add_argument("--rounds", type=int, help=f"of each table (default: {ROUNDS})")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--plain-malloc", action="store_true", help="leave freed memory to the C library, as programs do that do not ask otherwise")
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time, not the wall's (CPU only)")
    parser.add_argument("--save", action="store_true", help="make the results the committed ones of this device")
    args = parser.parse_args(argv)
    size, device = args.size or "full", args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rounds, parts = args.rounds or ROUNDS[size], args.parts.split(",")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs the same path on any device")
    if rounds < 2:
        parser.error("--rounds must be 2 or more: quartiles need them")
    if args.cpu_time and device == "cuda":
        parser.error("--cpu-time would leave out the device's time")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))} is unknown; allowed: {', '.join(PARTS)}")
    if args.save and (size == "tiny" or args.only):
        parser.error("--save needs all tables of a quick or full run")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock, env = begin(device, args.cpu_time, keep=not args.plain_malloc)
    for part in parts:
        (args.out / f"{part}.json").unlink(missing_ok=True)  # of an earlier run, should this one fail before it writes its own
    for part, run in (("ops", lambda: ops.run(env, size, args.out, rounds, clock, args.only)),
                      ("routing", lambda: routing.run(env, size, args.out, rounds, clock)),
                      ("steps", lambda: steps.run(env, size, args.out, rounds, clock)),
                      ("adapters", lambda: adapters.run(env, size, args.out, rounds, clock))):
        if part in parts:
            start = time.perf_counter()
            run()
            print(f"{part} took {time.perf_counter() - start:.0f} s\n\n{(args.out / f'{part}.md').read_text()}", flush=True)
    if compare.guard(args.out, compare.COMMITTED, store=args.save, parts=parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
