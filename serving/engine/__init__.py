"""The engine's process: started, guarded, started again. On a CPU its LoRA product, put right (`cpu_lora`).

All but `entry` and `cpu_lora` runs in `ah serve`'s own process, without vLLM.
"""
