"""Trains a model as conf/train.yaml says; ``python scripts/train.py --help`` lists what can be changed."""

from diagnostics.cli import train

if __name__ == "__main__":
    train()
