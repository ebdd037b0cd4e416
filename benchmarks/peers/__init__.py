"""The workloads of each library. Only `benchmarks.worker` imports these, one library per process."""
