"""Parts of `benchmarks/sft_cpu.py`: what is run, one process for each run, and the report."""
