"""The program `python -m benchmarks`: this package compared with PyTorch, ONNX Runtime, OpenVINO and tf.data.

One module per benchmark, each with `main(arguments) -> exit code`; `__main__` lists them. Nothing imports this package.
"""
