"""The contenders, one module for each library; imported only by `benchmarks.worker`, each in a process of its own."""
