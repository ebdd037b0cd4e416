"""The program `python -m benchmarks`: this package beside its peers, on the same weights, images and machine.

One module per benchmark, each with `main(arguments) -> exit code`; `__main__` lists them. Nothing imports this package.
"""
