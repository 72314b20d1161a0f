"""One rank of a training stage on a simulated GPU: real PyTorch, Megatron-Core and Transformer Engine, tensors that only have shapes.

It shows memory, host waits, copies, arithmetic and communication of a step with no GPU at hand; it computes no number. docs/simulation.md
says what it can't show. `gpu` must be imported before torch, so a simulation is a process of its own: `python -m megatron_opd.simulate`.
"""
