"""A policy that is split over several devices (tensor parallelism), each with a process of its own.

    rank 0, the process that serves                           ranks 1 … N−1
    engine's thread ── Coordinator ── pipe ── Participant     Participant
                            └───────────────── pipe ──────────────┘
                                                 └─ torch.distributed ─┘

All participants run the same engine on the same groups, each with its part of the weights, and meet in the
model's collectives. What they must decide alike they ask the coordinator, which waits for all of them and
answers all of them. It never waits in a collective: when a process ends, or one fails while others wait for
it, it knows, and gives up. What then hangs is left hanging, and ends with the process.
"""
