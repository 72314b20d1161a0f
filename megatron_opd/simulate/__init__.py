"""One rank of a training stage on a simulated GPU: real PyTorch, Megatron-Core and Transformer Engine, tensors that only have shapes.

It shows memory, host waits, copies, arithmetic and communication of a step with no GPU at hand; it computes no number. docs/simulation.md
says what it can't show. What no stand-in knows the memory or the traffic of is refused (NotImplementedError) rather than guessed; the recipes
of tests/fake_gpu never come there. `gpu` must be imported before torch, so a simulation is a process of its own: `python -m megatron_opd.simulate`.
"""
