"""Time of one layer's split: balanced k-means and co-activation graph partition on made-up data of a layer's size.

    python -m benchmarks.split --units 11008 --dim 4096 --groups 16

scikit-learn's k-means without equal sizes is printed beside ours: equal sizes can only cost inertia, so a good run of
it is about a lower bound (about: it has local optima too). On a CPU peak memory is the whole process's so far.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from dyn.core import split


def measure(name: str, device: torch.device, run, describe) -> None:
    """Run once; print seconds, peak memory and what `describe` makes of the result."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(f"{name:<14} {seconds:9.2f} s   peak {peak / 2**30:5.2f} GiB   {describe(result)}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=11008)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument(
        "--decay", type=float, default=0.5, help="spectrum of the rows: feature j scales with j**-decay"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens behind the co-activations")
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["kmeans", "coactivation"])
    args = parser.parse_args()

    device = torch.device(args.device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"device: {what}; {args.units} units x {args.dim}, {args.groups} groups, {args.restarts} restarts")
    generator = torch.Generator().manual_seed(0)

    if args.only != "coactivation":
        scale_D = torch.arange(1, args.dim + 1) ** -args.decay
        features_ND = (torch.randn(args.units, args.dim, generator=generator) * scale_D).to(device)
        measure(
            "kmeans",
            device,
            lambda: split.kmeans(
                features_ND, args.groups, generator=generator, restarts=args.restarts, iterations=args.iterations
            ),
            lambda groups_EF: f"inertia {split.inertia(features_ND, groups_EF):.2f}",
        )
        random_EF = split.random(args.units, args.groups, generator=generator).to(device)
        print(f"{'random':<14} inertia {split.inertia(features_ND, random_EF):.2f}")
        from sklearn.cluster import KMeans

        free = KMeans(args.groups, n_init=1, max_iter=args.iterations, random_state=0)
        rows_ND = torch.nn.functional.normalize(features_ND).cpu().numpy()
        measure(
            "unbalanced",
            torch.device("cpu"),
            lambda: free.fit(rows_ND),
            lambda fit: f"inertia {fit.inertia_:.2f} (scikit-learn, 1 restart)",
        )
        del features_ND, rows_ND

    if args.only != "kmeans":
        topics = 4 * args.groups  # a neuron fires at 40% of its own topic's tokens, at 2% of the others
        topic_T, topic_N = (torch.randint(0, topics, (n,), generator=generator) for n in (args.tokens, args.units))
        chance_TN = torch.where(topic_T[:, None] == topic_N, 0.4, 0.02)
        h_TN = torch.bernoulli(chance_TN, generator=generator).to(device)
        adjacency_NN = split.coactivate(h_TN, kernel="abs", clamp=float("inf"))

        def within(groups_EF):
            share = sum(adjacency_NN[g_F][:, g_F].sum().item() for g_F in groups_EF) / adjacency_NN.sum().item()
            return f"co-activation inside groups {share:.4f} of all; equal sizes at random {1 / args.groups:.4f}"

        measure(
            "coactivation",
            device,
            lambda: split.coactivation(adjacency_NN, args.groups, generator=generator),
            within,
        )


if __name__ == "__main__":
    main()
