"""``python -m flex_model`` is the command ``flex-model``."""

from flex_model.cli import app

if __name__ == "__main__":
    app(prog_name="flex-model")
