"""The engine's process: started, guarded, started again. On a CPU its LoRA product, put right (`cpu_lora`),
and its norms, by vLLM's own kernels (`cpu_norms`).

All but `entry`, `cpu_lora` and `cpu_norms` runs in `ah serve`'s own process, without vLLM.
"""
