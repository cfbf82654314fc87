"""The model's side of ``epmoe serve``: transformers on one thread, its experts computed by whoever is asked."""
