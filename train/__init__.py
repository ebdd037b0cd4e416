"""The program `python -m train`: data, augmentation, optimizer, sharded loop, evaluation."""
