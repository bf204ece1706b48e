"""Scripts that train the models in `models/examples`."""
